"""Compare runs with the paper: tables, figures, LaTeX and CSV.

    python models/report.py                       tables in Markdown
    python models/report.py --all                 ... and the paper's other methods
    python models/report.py --latex               the tables for a paper
    python models/report.py --csv > results.csv   each accuracy of each run
    python models/report.py --figure FILE.pdf     ACC over the tasks, with and without projection
    python models/report.py --sweep FILE.pdf      what eps and n_s trade on Permuted MNIST

models/reference holds the runs that come with the repository, models/<benchmark>/<run> what was
trained here. A row is the mean over runs that differ in nothing but the seed (for Superclass: the
order of the tasks), i.e. runs of the same script, flags, network, code, kind of device and data.
It is compared with the paper if all of these are as published (section 2), the code included.
Each finished run that was trained here receives a figure of its own, accuracy.png.
"""

# 1. Imports ---------------------------------------------------------------------------------------
import argparse
import csv
import io
import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

# 2. The published protocol ------------------------------------------------------------------------
BENCHMARKS = ("pmnist", "cifar100", "cifar100_superclass", "five_datasets")
MLP_EPS = [0.95, 0.99, 0.99]
ALEXNET_IMAGES = [24, 100, 100, 125, 125]
LENET_IMAGES = [24, 100, 125, 125]
RESNET_IMAGES = [10] * 9 + [50] * 4 + [100] * 7
# fmt: off
PROTOCOL = {  # {flag: its value for each of BENCHMARKS}; None: the script has no such flag
    "seed":                (2,       1,              1,            37),
    "n_epochs":            (5,       200,            50,           100),
    "batch_size_train":    (10,      64,             64,           64),
    "batch_size_test":     (64,      64,             64,           64),
    "pc_valid":            (0.1,     0.05,           0.05,         0.05),
    "lr":                  (0.01,    0.01,           0.01,         0.1),
    "momentum":            (0.0,     0.0,            0.0,          0.0),
    "lr_min":              (1e-5,    1e-5,           1e-5,         1e-3),
    "lr_patience":         (0,       6,              6,            5),
    "lr_factor":           (2.0,     2.0,            2.0,          3.0),
    "threshold":           (MLP_EPS, 0.97,           0.98,         0.965),
    "threshold_increment": (0.0,     0.003,          0.001,        0.0),
    "n_samples":           (300,     ALEXNET_IMAGES, LENET_IMAGES, RESNET_IMAGES),
    "n_tasks":             (10,      10,             20,           5),
    "n_hidden":            (100,     None,           None,         None),
    "t_order":             (None,    None,           0,            None),
    "official_data":       (None,    None,           False,        False),
}
WIDTHS = {  # d of each projected layer
    "pmnist":              [784, 100, 100],
    "cifar100":            [48, 576, 512, 1024, 2048],
    "cifar100_superclass": [75, 500, 3200, 800],
    "five_datasets":       [27, 180, 180, 180, 180, 180, 360, 20, 360, 360,
                            360, 720, 40, 720, 720, 720, 1440, 80, 1440, 1440],
}
# fmt: on
SAMPLES = ("seed", "t_order")  # flags that choose one of the runs of a row
CHOICES = (*SAMPLES, "official_data")  # flags that choose one of the published runs

# Test images per task
TEST_IMAGES = {
    "pmnist": {"mnist": 10_000},
    "cifar100": {"cifar100": 1_000},
    "cifar100_superclass": {"cifar100": 500},
    "five_datasets": {
        "cifar10": 10_000,
        "mnist": 10_000,
        "svhn": 26_032,
        "fashion_mnist": 10_000,
        "notmnist": 1_873,
    },
}
SLACK = 0.01  # for notMNIST, the size of whose released file is known roughly

# The code that is the published method, as digests: what digest_of_code() of each script returned.
# A script whose method was edited can keep the published flags and widths; only its digest tells it
# apart. If a new version computes the same numbers, add its digest here and to the docstring of the
# script. If not, measure anew with it, and remove the old digests together with their runs in
# models/reference.
PUBLISHED_CODE = {  # of each script the last two differ only in messages
    "main_pmnist": (
        "22a653a159aa0bf8",  # commit b251346, of the sweep in models/reference
        "46e1f6bf86d2645e",  # eight whole runs gave the same results
        "80ce7ba70580eebf",
    ),
    "main_cifar100": ("2c27d891437cd129", "7e87aeda8f055870"),
    "main_cifar100_superclass": ("6cb535803b9f230d", "fb131df84cf98008"),
    "main_five_datasets": ("855400ce682f7ee8", "4b52a8e0aabb853d"),
}

# Results of the first form name a commit instead of their code. The scripts of these commits
# compute the same up to rounding, so they count as one. Short runs of Superclass (order 0, 2 tasks,
# 5 epochs, 1 thread) gave equal accuracies and ranks, except for those of 8e7ef98: it differs from
# the others by up to 6 of 500 test images and a rank of 1, as much as a second thread changes.
EQUAL_COMMITS = ("8e7ef98", "298a7fa", "9ef8d34", "d9aae29", "28ae65a", "06bcea0")
# Runs of the first form drew their validation batches once. With BatchNorm that matters.
BATCHNORM = ("cifar100", "five_datasets")


def published_flags(benchmark):
    """{flag: value} of a benchmark's published protocol."""
    column = BENCHMARKS.index(benchmark)
    values = {flag: row[column] for flag, row in PROTOCOL.items()}
    return {flag: value for flag, value in values.items() if value is not None}


PUBLISHED = {benchmark: published_flags(benchmark) for benchmark in BENCHMARKS}


def simple_form(value):
    """A list of equal values, one per layer, as that value; all else as it is."""
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        return value[0]
    return value


def differing_flags(benchmark, args, changed=()):
    """{flag: value} where the flags are not the published protocol.

    changed: what differs from the script's own defaults. Only there can a flag that the protocol
    does not know count. A flag of the protocol that args lack has the value None.
    """
    published = PUBLISHED[benchmark]
    differing = {}
    for flag, value in published.items():
        if flag not in CHOICES and simple_form(args.get(flag)) != simple_form(value):
            differing[flag] = args.get(flag)
    unknown = [flag for flag in changed if flag not in published]
    return differing | {flag: args.get(flag) for flag in unknown}


# 3. The paper's results ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Tolerance:
    """How far the means may lie from the paper's for a benchmark to count as reproduced."""

    ACC: float
    width: float
    lowest_BWT: float = -math.inf
    highest_BWT: float = math.inf

    def holds(self, ACC, BWT):
        """Judge the numbers as they are printed."""
        near = round(abs(round(ACC, 2) - self.ACC), 2) <= self.width
        return near and self.lowest_BWT < round(BWT, 2) < self.highest_BWT

    def __str__(self):
        text = f"{self.ACC:g} ± {self.width:g}"
        if math.isfinite(self.highest_BWT):
            return f"{text}, BWT {self.lowest_BWT:g} to {self.highest_BWT:g}"
        if math.isfinite(self.lowest_BWT):
            return f"{text}, BWT above {self.lowest_BWT:g}"
        return text


@dataclass(frozen=True)
class Row:
    """A benchmark on one kind of data. paper: ACC ± standard deviation / BWT in percent."""

    benchmark: str
    official_data: bool
    label: str
    paper: str = "-"
    tolerance: Tolerance | None = None

    @property
    def ACC(self):
        """The paper's mean ACC, or None."""
        return None if self.paper == "-" else float(self.paper.split()[0])

    @property
    def deviation(self):
        """The paper's standard deviation of ACC, 0 where it gives none."""
        words = self.paper.split()
        return float(words[2]) if "±" in words else 0


ROWS = (
    Row("pmnist", False, "Permuted MNIST", "93.91 ± 0.16 / -3", Tolerance(93.9, 0.6, -4.5, -2)),
    Row("cifar100", False, "10-split CIFAR-100", "72.48 ± 0.40 / -0.9", Tolerance(72.5, 1.2, -2)),
    Row(
        "cifar100_superclass",
        True,
        "CIFAR-100 Superclass, `--official_data`",
        "57.72 / not given",
        Tolerance(57.7, 1.2),
    ),
    Row("cifar100_superclass", False, "CIFAR-100 Superclass, correct images"),
    Row(
        "five_datasets",
        True,
        "5-Datasets, `--official_data`",
        "91.22 ± 0.20 / -1",
        Tolerance(91.2, 1),
    ),
    Row("five_datasets", False, "5-Datasets, with Fashion-MNIST"),
)
NEEDED = {"seed": 3, "order": 5}  # the paper's Superclass is the mean over five orders
OTHER_METHODS = (
    ("Multitask (upper bound)", "96.70 ± 0.02", "79.58 ± 0.54", "91.54 ± 0.28"),
    ("OWM", "90.71 ± 0.11 / -1", "50.94 ± 0.60 / -30", "-"),
    ("EWC", "89.97 ± 0.57 / -4", "68.80 ± 0.88 / -2", "88.64 ± 0.26 / -4"),
    ("HAT", "-", "72.06 ± 0.50 / 0", "91.32 ± 0.18 / -1"),
    ("A-GEM", "83.56 ± 0.16 / -14", "63.98 ± 1.22 / -15", "84.04 ± 0.33 / -12"),
    ("ER_Res", "87.24 ± 0.53 / -11", "71.73 ± 0.63 / -6", "88.31 ± 0.22 / -4"),
    ("GPM", "93.91 ± 0.16 / -3", "72.48 ± 0.40 / -0.9", "91.22 ± 0.20 / -1"),
)
OTHER_METHODS_SUPERCLASS = (
    "CIFAR-100 Superclass: single-task networks 61.00, GPM 57.72, APD 56.81, RCL 51.99, "
    "DEN 51.10, PGN 50.76."
)


# 4. Runs ------------------------------------------------------------------------------------------
@dataclass
class Run:
    """What a results.json says, and what follows from it."""

    folder: Path
    place: str  # the folder as the report calls it
    form: int  # of the file: 1 or 2
    benchmark: str
    script: str
    args: dict
    changed: dict
    data: dict
    origins: list
    widths: dict
    acc: np.ndarray  # (T, T) in percent, nan above the diagonal
    ranks: list
    memory: list
    seconds: float
    finished: bool
    quick: bool

    def __post_init__(self):
        self.seed = int(self.args["seed"])
        self.order = int(self.args["t_order"]) if "t_order" in self.args else None
        self.sample = self.seed, self.order
        self.row_key = self.benchmark, bool(self.args.get("official_data"))
        self.code = code_of(self.form, self.origins)
        self.uncommitted = any(o["dirty"] or not o["commit"] for o in self.origins)
        self.devices = {
            (origin["device"]["type"], origin["device"]["name"], origin["device"]["threads"])
            for origin in self.origins
        }
        self.partial = sorted({part["set"] for part in self.data.values() if not part["complete"]})
        self.missing_tests = missing_test_images(self.benchmark, self.data)
        self.own = self.script != f"main_{self.benchmark}"
        self.differences = differences(self) if self.benchmark in PUBLISHED else []
        self.published = not (self.own or self.differences)
        self.setting = setting(self)

    @property
    def ACC(self):
        """Mean of the last row."""
        return self.acc[-1].mean()

    @property
    def BWT(self):
        """Mean change of the accuracy on a task since it was learned; 0 after the first task."""
        change = self.acc[-1] - self.acc.diagonal()
        return change[:-1].mean() if len(change) > 1 else 0.0

    @property
    def learned(self):
        """Mean accuracy on each task right after it was learned."""
        return self.acc.diagonal().mean()

    @property
    def result(self):
        """How far the run came, as text."""
        text = f"{len(self.acc)} of {self.args['n_tasks']} tasks"
        if len(self.acc):
            text += f", ACC {self.ACC:.2f}, BWT {self.BWT:.2f}"
        return f"{text}, {duration(float(self.seconds))}"


def read_run(path, place, quick):
    """The Run of a results.json. Raises some exception if no script would have written it."""
    content = json.loads(path.read_bytes())
    form = content.get("format", 1)
    if form not in (1, 2):
        raise ValueError(f"format {form} is not known")
    benchmark = content.get("benchmark", path.parts[-3])
    acc = np.array(content["accuracy_matrix"], dtype=float)
    acc = acc.reshape(len(acc), -1 if len(acc) else 0)
    acc[np.triu_indices_from(acc, 1)] = np.nan  # 0 in the first form
    names = "args", "changed", "data", "origins", "widths", "ranks", "finished"
    run = Run(
        folder=path.parent,
        place=place,
        form=form,
        benchmark=benchmark,
        script=content.get("script", f"main_{benchmark}"),
        acc=acc,
        memory=[float(share) for share in content["memory"]],
        seconds=float(content["seconds"]),
        quick=quick,
        **{name: content[name] for name in names},
    )
    check(run, content)
    return run


def check(run, content):
    """Raise ValueError if the parts of a results.json contradict each other."""
    done, n_tasks = len(run.acc), run.args["n_tasks"]
    if run.acc.shape != (done, done) or done > n_tasks:
        raise ValueError(f"an accuracy matrix of {run.acc.shape} for {n_tasks} tasks")
    if run.finished != (done == n_tasks):
        raise ValueError(f"{done} of {n_tasks} tasks, but finished is {run.finished!r}")
    if not done == len(run.ranks) == len(run.memory):
        raise ValueError(f"{done} tasks, but ranks of {len(run.ranks)}")
    if not run.origins:
        raise ValueError("it does not say what it was made with")
    if any(rank.keys() != run.widths.keys() for rank in run.ranks):
        raise ValueError("its ranks and its widths are of other layers")
    known = run.acc[np.tril_indices(done)]
    if not np.all((known >= 0) & (known <= 100)):
        raise ValueError("accuracies are missing or not in percent")
    if done:
        stated = [content["ACC"], content["BWT"]]
        if not np.allclose([run.ACC, run.BWT], stated, rtol=0, atol=1e-6):
            raise ValueError("its ACC and BWT are not those of its accuracy matrix")


def code_of(form, origins):
    """The digests of a run's code; of the first form the commits, equal ones under one name."""
    if form == 2:
        names = {origin["code"] for origin in origins}
    else:
        names = {origin["commit"][:7] for origin in origins}
        names = {EQUAL_COMMITS[0] if name in EQUAL_COMMITS else name for name in names}
    return "+".join(sorted(names))


def missing_test_images(benchmark, data):
    """Texts like "svhn 16,419 of 26,032", where not all official test images are there."""
    official = TEST_IMAGES.get(benchmark, {})
    texts = []
    for part in data.values():
        n, wanted = part["test"], official.get(part["set"], 0)
        slack = SLACK * wanted if part["set"] == "notmnist" else 0
        if n < wanted - slack:
            texts.append(f"{part['set']} {n:,} of {wanted:,}")
    return list(dict.fromkeys(texts))


def differences(run):
    """What a run has in other ways than the published protocol, as texts."""
    differing = differing_flags(run.benchmark, run.args, run.changed)
    texts = [flag_text(flag, value) for flag, value in differing.items()]
    widths = list(run.widths.values())
    if widths != WIDTHS[run.benchmark] and "n_hidden" not in differing:
        texts.append(f"layer widths {' '.join(map(str, widths))}")
    if run.form == 1 and run.benchmark in BATCHNORM:
        texts.append("fixed validation batches")
    if run.form == 2 and not run.own:
        texts += code_differences(run)
    return texts


def code_differences(run):
    """Why the code of a run is not known to be the published method, as texts."""
    texts, codes = [], run.code.split("+")
    if not set(codes) <= set(PUBLISHED_CODE[run.script]):
        texts.append(f"edited code {short(run.code)}")
    if len(codes) > 1:
        texts.append("code changed during the run")
    return texts


def short(code):
    """The first digits of each digest in a run's code."""
    return "+".join(digest[:8] for digest in code.split("+"))


def flag_text(flag, value):
    """A flag as one would write it on the command line."""
    if value is None:
        return f"no --{flag}"
    if value is True:
        return f"--{flag}"
    value = simple_form(value)
    values = value if isinstance(value, list) else [value]
    words = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return f"--{flag} {' '.join(words)}"


def setting(run):
    """All that runs must have in common to be averaged, as text."""
    args = {flag: simple_form(value) for flag, value in run.args.items() if flag not in SAMPLES}
    images = sorted({(p["set"], p["complete"], p["test"]) for p in run.data.values()})
    kinds = sorted({kind for kind, *_ in run.devices})
    protocol = [run.benchmark, run.script, args, run.widths, run.differences]
    return json.dumps([protocol, run.form, run.code, kinds, images], sort_keys=True)


# 5. Which runs count, and which are averaged ------------------------------------------------------
@dataclass
class Collection:
    """The runs of a folder. groups: lists of runs that are averaged, one per seed and order."""

    runs: list = field(default_factory=list)
    groups: list = field(default_factory=list)
    sweep: list = field(default_factory=list)  # groups too, outside of the tables
    unfinished: list = field(default_factory=list)
    notes: list = field(default_factory=list)  # on what does not count

    def published(self, row):
        """The groups of a row by the published protocol."""
        return [g for g in self.groups if g[0].published and g[0].row_key == key_of(row)]


def key_of(row):
    """What a row and its runs have in common."""
    return row.benchmark, row.official_data


def collect(folder, prefix="", without=None):
    """Read all runs below the folder, but for those below the folder "without"."""
    collection = Collection()
    for path in sorted(folder.rglob("results.json")):
        if without and path.is_relative_to(without):
            continue
        place = path.parent.relative_to(folder).as_posix()
        quick = "quick" in (folder.name, place.split("/")[0])
        try:
            run = read_run(path, prefix + place, quick)
        except Exception as error:  # whatever is wrong with one file, the others still count
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            line = f"- `{prefix}{place}/results.json` cannot be read ({reason})"
            collection.notes.append(line)
            continue
        sort_in(run, collection)
    return collection


def sort_in(run, collection):
    """Put a run where it belongs."""
    collection.runs.append(run)
    reason = reason_not_to_count(run)
    if reason:
        collection.notes.append(f"- `{run.place}`: {reason}; {run.result}")
    elif not run.finished:
        collection.unfinished.append(run)
    elif run.place.startswith("reference/sweep/"):
        add_to_group(run, collection.sweep, collection.notes)
    else:
        add_to_group(run, collection.groups, collection.notes)


def add_to_group(run, groups, notes):
    """Put a run with others of its setting, unless its seed and order are there already."""
    group = next((group for group in groups if group[0].setting == run.setting), None)
    if group is None:
        groups.append([run])
    elif any(run.sample == other.sample for other in group):
        notes.append(f"- `{run.place}`: a {noun(group)} that was counted already; {run.result}")
    else:
        group.append(run)


def reason_not_to_count(run):
    """Why a run appears in no row, or ""."""
    if run.quick:
        return "a quick run"
    if run.benchmark not in PUBLISHED:
        return "not one of the paper's benchmarks"
    if run.partial:
        return f"training images are missing ({', '.join(run.partial)})"
    if run.form == 1 and run.uncommitted:
        return "code that was not committed"
    return ""


# 6. Numbers ---------------------------------------------------------------------------------------
def per_sample(runs, value):
    """Array of value(run) for each seed; for Superclass for each order, the mean over its seeds."""
    samples = {}
    for run in runs:
        key = run.seed if run.order is None else run.order
        samples.setdefault(key, []).append(value(run))
    return np.array([np.mean(values, axis=0) for values in samples.values()])


def noun(runs):
    """What the samples of a row are."""
    return "seed" if runs[0].order is None else "order"


def ACCs(runs):
    """ACC for each seed or order."""
    return per_sample(runs, lambda run: run.ACC)


def mean_text(values, sign=""):
    """93.54 ± 0.18: mean and sample standard deviation."""
    text = f"{np.mean(values):{sign}.2f}"
    return f"{text} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else text


def result_text(runs):
    """93.54 ± 0.18 / -3.42 (5 seeds)."""
    n = len(ACCs(runs))
    BWT = per_sample(runs, lambda run: run.BWT).mean()
    return f"{mean_text(ACCs(runs))} / {BWT:.2f} ({n} {noun(runs)}{'s' * (n > 1)})"


def duration(seconds):
    """Seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def time_text(runs):
    """109 s (CPU, 1 thread)."""
    devices = sorted(set().union(*(run.devices for run in runs)))
    names = dict.fromkeys(name if kind == "cuda" else kind.upper() for kind, name, _ in devices)
    threads = sorted({n for kind, _, n in devices if kind == "cpu"})
    text = " and ".join(names)
    if threads:
        text += f", {' or '.join(map(str, threads))} thread{'s' * (threads != [1])}"
    return f"{duration(np.mean([run.seconds for run in runs]))} ({text})"


def prediction_interval(reference, n=1):
    """Where the mean of n further values is expected with 95 % confidence, low and high.

    mean ± t s sqrt(1/n + 1/m) for the m values of the reference, t of m - 1 degrees of freedom.
    """
    m = len(reference)
    t = stdtrit(m - 1, 0.975)  # scipy.stats.t.ppf, without the import of scipy.stats
    half = t * np.std(reference, ddof=1) * math.sqrt(1 / n + 1 / m)
    return np.mean(reference) - half, np.mean(reference) + half


def verdict(runs, reference):
    """Whether runs agree with those of the reference, as text."""
    if len(ACCs(reference)) < 3:
        return "cannot be judged by fewer than 3 runs of the reference"
    low, high = prediction_interval(ACCs(reference), len(ACCs(runs)))
    agrees = low <= ACCs(runs).mean() <= high
    expected = f"(expected {low:.1f} to {high:.1f})"
    return f"{'agrees with' if agrees else 'differs from'} the reference {expected}"


def within_tolerance(runs, row):
    """yes, no, or why there is no answer."""
    if row.tolerance is None:
        return "-"
    needed = NEEDED[noun(runs)]
    if len(ACCs(runs)) < needed:
        return f"fewer than {needed} {noun(runs)}s"
    BWT = per_sample(runs, lambda run: run.BWT).mean()
    return "yes" if row.tolerance.holds(ACCs(runs).mean(), BWT) else "no"


def largest(groups):
    """The group of the most runs, or an empty one."""
    return max(groups, key=len, default=[])


def gpm_of_same_seeds(method, own, reference):
    """Runs of GPM with the flags, seeds and orders of a method's runs, and where they are from.

    Those trained here come first. Returns [], "" if there are none.
    """
    wanted = {run.sample for run in method}
    for collection, origin in (own, "trained here"), (reference, "reference"):
        groups = [g for g in collection.groups if is_gpm_with_flags_of(method[0], g[0])]
        matches = [[run for run in group if run.sample in wanted] for group in groups]
        if largest(matches):
            return largest(matches), origin
    return [], ""


def is_gpm_with_flags_of(method, run):
    """Whether a run is GPM, unedited, with the flags of a run of another method.

    Flags that only the other method has do not matter.
    """
    flags = differing_flags(run.benchmark, run.args)
    same = run.row_key == method.row_key and flags == differing_flags(run.benchmark, method.args)
    unedited = run.differences == [flag_text(*item) for item in flags.items()]
    return same and unedited and not run.own


def row_of(runs):
    """The row of the paper's tables that runs belong to."""
    return next(row for row in ROWS if key_of(row) == runs[0].row_key)


# 7. Tables ----------------------------------------------------------------------------------------
@dataclass
class Table:
    """rows: {column: text}, "-" where a column is missing. below: lines of text."""

    title: str
    columns: tuple
    rows: list
    below: list = field(default_factory=list)


COLUMNS = (
    "Benchmark",
    "Paper: ACC / BWT",
    "Here: ACC / BWT",
    "Learned",
    "Difference",
    "Within tolerance",
    "Time per run",
    "Memory",
)


def legend():
    """What the columns of the tables mean."""
    limits = [f"{row.label.split(',')[0]} {row.tolerance}" for row in ROWS if row.tolerance]
    return [
        "- ACC and BWT in percent: mean ± sample standard deviation over seeds, for Superclass "
        "over the orders of the tasks, which share a seed. Difference: of ACC, to the paper.",
        "- Learned: mean accuracy on a task right after it was learned.",
        "- Within tolerance: the mean over at least 3 seeds, or all 5 orders, lies within "
        f"{'; '.join(limits)}. These limits were set in the first commit (76c6b3f), before any "
        "result.",
        "- Memory: floats in the bases after the last task, as a share of GPM_Max. The paper "
        "reports 69 % on Permuted MNIST, 55 % on CIFAR-100, 78 % on 5-Datasets.",
        "- `--official_data`: the data as the released code makes them, on which the published "
        "numbers probably rest.",
    ]


def describe(runs):
    """What the tables say of runs that are averaged."""
    row = row_of(runs)
    cells = {
        "Benchmark": row.label,
        "Here: ACC / BWT": result_text(runs),
        "Learned": f"{per_sample(runs, lambda run: run.learned).mean():.2f}",
        "Time per run": time_text(runs),
        "Memory": f"{np.mean([run.memory[-1] for run in runs]):.1f} %",
        "Not as published": " ".join(map(as_code, runs[0].differences)) or "-",
    }
    if runs[0].published:
        cells["Paper: ACC / BWT"] = row.paper
        cells["Within tolerance"] = within_tolerance(runs, row)
        if row.ACC is not None:
            cells["Difference"] = f"{ACCs(runs).mean() - row.ACC:+.2f}"
    return cells


def as_code(text):
    """Flags as code for Markdown, other words as they are."""
    return f"`{text}`" if "--" in text else text


def describe_all(groups):
    """Rows for all groups. Those that would be called the same say of which code they are."""
    rows = [describe(group) for group in groups]
    names = [(row["Benchmark"], row["Not as published"]) for row in rows]
    for group, row, name in zip(groups, rows, names, strict=True):
        if names.count(name) > 1:
            row["Benchmark"] += f", code {short(group[0].code)}"
    return rows


def remarks(groups):
    """Lines on test images that are missing, and on code that was changed."""
    lines = []
    for group in groups:
        label = row_of(group).label
        if group[0].missing_tests:
            images = ", ".join(group[0].missing_tests)
            lines.append(f"- {label}: all training images, but of the test images {images}.")
        if group[0].own and any(run.uncommitted for run in group):
            lines.append(f"- {label}: the code was not committed.")
        if "+" in group[0].code:
            lines.append(f"- {label}: the code was changed during the runs.")
    return list(dict.fromkeys(lines))


def reference_table(reference):
    """The runs of the repository beside the paper; each row of the paper, measured or not."""
    rows, groups = [], []
    for row in ROWS:
        found = reference.published(row)
        groups += found
        rows += describe_all(found)
        if not found:
            missing = {"Benchmark": row.label, "Paper: ACC / BWT": row.paper}
            rows.append(missing | {"Here: ACC / BWT": "not measured yet"})
    return Table("Reference", COLUMNS, rows, remarks(groups) + legend())


def own_table(own, reference):
    """What was trained here, beside the paper and the reference."""
    groups = [group for row in ROWS for group in own.published(row)]
    rows, below = describe_all(groups), []
    for group, row in zip(groups, rows, strict=True):
        known = largest(reference.published(row_of(group)))
        if not known:
            continue
        row["Reference"] = result_text(known)
        below.append(f"- {row['Benchmark']}: ACC {ACCs(group).mean():.2f} {verdict(group, known)}.")
        if group[0].code != known[0].code:
            here, there = short(group[0].code), short(known[0].code)
            text = f"code {here}, the reference's {there}: two versions of the published method"
            below.append(f"- {row['Benchmark']}: {text}.")
    columns = (*COLUMNS[:2], "Reference", *COLUMNS[2:])
    return Table("Trained here", columns, rows, below + remarks(groups))


def methods_table(own, reference):
    """Methods of one's own, beside GPM's runs of the same seeds."""
    groups = [g for c in (reference, own) for g in c.groups if g[0].own]
    rows = describe_all(groups)
    for group, row in zip(groups, rows, strict=True):
        name = group[0].script.removeprefix("main_")
        row["Method"] = f"`{name}`"
        gpm, origin = gpm_of_same_seeds(group, own, reference)
        if not gpm:
            row["GPM, same seeds"] = "no run with these flags and seeds"
            continue
        samples = {run.sample: run.ACC for run in gpm}
        same = [run for run in group if run.sample in samples]
        change = [run.ACC - samples[run.sample] for run in same]
        row["GPM, same seeds"] = f"{result_text(gpm)}, {origin}"
        row["Difference"] = mean_text(change, sign="+")
    columns = (
        "Method",
        "Benchmark",
        "Not as published",
        "Here: ACC / BWT",
        "Learned",
        "GPM, same seeds",
        "Difference",
        "Time per run",
        "Memory",
    )
    below = ["- Difference: of ACC, mean ± sample standard deviation over the seeds in common."]
    return Table("Own methods", columns, rows, below + remarks(groups))


def others_table(own, reference):
    """Runs of the scripts that are not of the published protocol."""
    rows = []
    for collection, origin in (reference, "reference"), (own, "trained here"):
        groups = [g for g in collection.groups if g[0].differences and not g[0].own]
        groups.sort(key=lambda group: BENCHMARKS.index(group[0].benchmark))
        rows += [row | {"From": origin} for row in describe_all(groups)]
    columns = ("Benchmark", "Not as published", "From", *COLUMNS[2:4], *COLUMNS[-2:])
    below = []
    if any("`--threshold 0`" in row["Not as published"] for row in rows):
        below.append(
            "- `--threshold 0`: without projection, but with GPM's hyperparameters and with "
            "BatchNorm frozen after the first task: a lower bound of what plain SGD can do."
        )
    if any("edited code" in row["Not as published"] for row in rows):
        below.append(
            "- Edited code: the script or its loaders are not those of the published method, so "
            "the numbers do not compare with the paper's. models/report.py lists the digests."
        )
    return Table("Other settings", columns, rows, below)


def first_task_table(reference):
    """How the accuracy on the first task develops while the others are learned."""
    rows = []
    for row in ROWS:
        group = largest(reference.published(row))
        if group:
            curve = per_sample(group, lambda run: run.acc[:, 0]).mean(axis=0)
            values = {"Learned": curve[0], "At the end": curve[-1], "Lowest": curve.min()}
            cells = {name: f"{value:.2f}" for name, value in values.items()}
            rows.append({"Benchmark": row.label, **cells, "Tasks": str(len(curve))})
    columns = ("Benchmark", "Learned", "At the end", "Lowest", "Tasks")
    below = ["- Mean over the runs; lowest after any of the tasks."]
    return Table("Accuracy on the first task", columns, rows, below)


def sweep_points(reference, flag):
    """[(value, runs)] of the sweep over --threshold or --n_samples, in order of the value.

    Runs of main_pmnist of which only this flag is not as published, and one value for all layers.
    """
    points = []
    for group in reference.sweep:
        run = group[0]
        others = [text for text in run.differences if not text.startswith(f"--{flag} ")]
        value = simple_form(run.args[flag])
        if run.script == "main_pmnist" and not others and not isinstance(value, list):
            points.append((value, group))
    return sorted(points, key=lambda point: point[0])


SWEEPS = {"threshold": "eps", "n_samples": "n_s"}


def sweep_tables(reference):
    """What eps and n_s trade."""
    tables = []
    for flag, symbol in SWEEPS.items():
        rows = [{symbol: f"{v:g}"} | describe(runs) for v, runs in sweep_points(reference, flag)]
        columns = (symbol, "Here: ACC / BWT", "Learned", "Memory")
        tables.append(Table(f"Permuted MNIST with other {symbol}", columns, rows))
    return tables


def other_methods_table():
    """The paper's other methods."""
    columns = ("Method", "Permuted MNIST", "10-split CIFAR-100", "5-Datasets")
    rows = [dict(zip(columns, row, strict=True)) for row in OTHER_METHODS]
    title = "All methods, from the paper: ACC / BWT"
    return Table(title, columns, rows, [OTHER_METHODS_SUPERCLASS])


def all_tables(own, reference, other_methods):
    """All tables that have rows."""
    tables = [
        reference_table(reference),
        own_table(own, reference),
        methods_table(own, reference),
        others_table(own, reference),
        first_task_table(reference),
        *sweep_tables(reference),
    ]
    if other_methods:
        tables.append(other_methods_table())
    return [table for table in tables if table.rows]


# 8. Markdown, LaTeX, CSV --------------------------------------------------------------------------
def cells_of(table):
    """Lists of texts: the header, and the rows."""
    body = [[row.get(column, "-") for column in table.columns] for row in table.rows]
    return [list(table.columns), *body]


def markdown(table):
    """A table that is aligned for readers of the plain text as well."""
    cells = cells_of(table)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    below = ["", *table.below] if table.below else []
    return "\n".join([f"### {table.title}", "", *lines, *below, ""])


def markdown_report(own, reference, other_methods):
    """All tables, and lists of what is not in them."""
    parts = [markdown(table) for table in all_tables(own, reference, other_methods)]
    unfinished = reference.unfinished + own.unfinished
    if unfinished:
        lines = [f"- `{run.place}`: {run.result}" for run in unfinished]
        parts.append("\n".join(["### Unfinished", "", *lines, ""]))
    notes = reference.notes + own.notes
    if notes:
        parts.append("\n".join(["### Not counted", "", *notes, ""]))
    return "\n".join(parts)


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def latex_text(text):
    """Text for LaTeX: `code` in typewriter, and minus signs that are none of hyphens."""
    if text == "-":
        return "--"
    parts = [part.translate(LATEX) for part in text.split("`")]
    parts[::2] = [re.sub(r"(?<![\w-])-(?=\d)", "$-$", part) for part in parts[::2]]
    parts[1::2] = [f"\\texttt{{{part.replace('--', '-{}-')}}}" for part in parts[1::2]]
    return "".join(parts)


def latex(table):
    """A table for a document that uses booktabs and graphicx, which shrinks what is too wide."""
    header, *body = [" & ".join(map(latex_text, row)) + r" \\" for row in cells_of(table)]
    return "\n".join(
        [
            f"% {table.title}",
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"\toprule",
            header,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "}",
            "",
        ]
    )


def latex_report(own, reference, other_methods):
    """All tables, without what is said below them."""
    tables = all_tables(own, reference, other_methods)
    return "\n".join(["% needs \\usepackage{booktabs,graphicx}", *map(latex, tables)])


CSV_COLUMNS = (
    "benchmark",
    "script",
    "run",
    "seed",
    "order",
    "setting",  # "flags" would be an attribute of a pandas.DataFrame
    "trained_task",
    "tested_task",
    "accuracy",
    "code",
)


def csv_report(own, reference):
    """A line for each run that counts, trained task and tested task, both counted from 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for collection in reference, own:
        for run in itertools.chain(*collection.groups, *collection.sweep):
            words = " ".join(run.differences) or "as published"
            start = [run.benchmark, run.script, run.place, run.seed, run.order, words]
            for t, u in zip(*np.tril_indices(len(run.acc)), strict=True):
                writer.writerow([*start, t + 1, u + 1, f"{run.acc[t, u]:g}", run.code])
    return text.getvalue()


# 9. Figures ---------------------------------------------------------------------------------------
def new_figure(width, height):
    """A figure that belongs to no window."""
    from matplotlib.figure import Figure  # here, because the tables do not need it

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Write a figure under another name first: a kill leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=120)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def ACC_curves(runs):
    """ACC after each task, (samples, T)."""
    tasks = range(len(runs[0].acc))
    return per_sample(runs, lambda run: [run.acc[t, : t + 1].mean() for t in tasks])


def plain(text):
    """Markdown as plain text."""
    return text.replace("`", "")


def whole_numbers(*axes):
    """Put ticks at whole numbers only, for tasks."""
    for axis in axes:
        axis.get_major_locator().set_params(integer=True)


def draw_run(run):
    """A run: its accuracy matrix, ACC over the tasks, and the ranks of its bases."""
    figure = new_figure(13, 4)
    title = f"{run.place}: ACC {run.ACC:.2f}, BWT {run.BWT:.2f}"
    figure.suptitle(title, fontweight="bold", parse_math=False)
    matrix, means, ranks = figure.subplots(1, 3)
    T = len(run.acc)
    tasks = np.arange(1, T + 1)
    image = matrix.imshow(run.acc, extent=(0.5, T + 0.5, T + 0.5, 0.5))
    figure.colorbar(image, ax=matrix)
    matrix.set(title="test accuracy (%)", xlabel="on task", ylabel="after task")
    means.plot(tasks, ACC_curves([run])[0], marker="o")
    means.set(title="ACC over the tasks so far (%)", xlabel="after task")
    for i, (layer, d) in enumerate(run.widths.items()):
        shares = [100 * rank[layer] / d for rank in run.ranks]
        color = image.cmap(0.9 * i / len(run.widths))
        ranks.plot(tasks, shares, marker=".", color=color, label=f"{layer} ({d})")
    ranks.set(title="rank / width of the bases (%)", xlabel="after task", ylim=(0, 103))
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "reverse": True}
    ranks.legend(fontsize="x-small", labelspacing=0.3, **beside)
    whole_numbers(matrix.xaxis, matrix.yaxis, means.xaxis, ranks.xaxis)
    return figure


NUMBERED = ("GPM", "without projection")  # lines whose last ACC is written beside them
METHOD_COLORS = ("tab:orange", "tab:purple", "tab:red", "tab:brown")


def lines_of(row, own, reference):
    """[(label, runs, style)] of a row's panel, from bottom to top."""
    without = [
        group
        for group in reference.groups + own.groups
        if group[0].row_key == key_of(row)
        and not group[0].own
        and group[0].differences == ["--threshold 0"]
    ]
    methods = [g for g in own.groups if g[0].own and g[0].row_key == key_of(row)]
    lines = [
        ("without projection", largest(without), {"color": "tab:gray", "marker": "s"}),
        ("GPM", largest(reference.published(row)), {"color": "tab:blue", "marker": "o"}),
        ("GPM, trained here", largest(own.published(row)), {"color": "tab:green", "marker": "^"}),
    ]
    for group, color in zip(methods, itertools.cycle(METHOD_COLORS), strict=False):
        style = {"color": color, "marker": "v"}
        lines.append((group[0].script.removeprefix("main_"), group, style))
    return [line for line in lines if line[1]]


def draw_panel(panel, row, lines):
    """ACC over the tasks, and the paper's ACC as a point at the last task."""
    for label, runs, style in lines:
        curves = ACC_curves(runs)
        mean = curves.mean(axis=0)
        tasks = np.arange(1, len(mean) + 1)
        (line,) = panel.plot(tasks, mean, label=label, markersize=4, **style)
        if len(curves) > 1:
            spread = curves.std(axis=0, ddof=1)
            band = {"alpha": 0.2, "color": line.get_color(), "linewidth": 0}
            panel.fill_between(tasks, mean - spread, mean + spread, **band)
        if label in NUMBERED:
            style = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            end = tasks[-1], mean[-1]
            panel.annotate(f"{mean[-1]:.1f}", end, color=line.get_color(), **style)
    if row.ACC is not None:
        style = {"fmt": "D", "color": "black", "capsize": 3, "zorder": 5, "markersize": 5}
        panel.errorbar(tasks[-1], row.ACC, row.deviation, label="GPM, paper", **style)
    panel.set_title(plain(row.label), fontsize="medium")
    panel.set_xlabel("tasks learned")
    panel.grid(alpha=0.3)
    panel.margins(y=0.1)
    panel.set_xlim(0.5, 1.18 * tasks[-1])  # the numbers stand beside the last point
    whole_numbers(panel.xaxis)


def draw_results(own, reference):
    """A panel for each row that was measured; None if there is none."""
    contents = [(row, lines_of(row, own, reference)) for row in ROWS]
    contents = [(row, lines) for row, lines in contents if lines]
    if not contents:
        return None
    n_columns = min(3, len(contents))
    n_rows = math.ceil(len(contents) / n_columns)
    figure = new_figure(4 * n_columns, 3.3 * n_rows)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for panel, (row, lines) in zip(panels, contents, strict=False):
        draw_panel(panel, row, lines)
    for panel in panels[len(contents) :]:
        panel.set_axis_off()
    figure.supylabel("ACC on these tasks (%)", fontsize="medium")
    add_legend(figure)
    return figure


def add_legend(figure):
    """One legend below all panels, each label once."""
    handles = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)


def draw_sweep(reference):
    """ACC, BWT and memory against eps, ACC against n_s; None if there is no sweep."""
    eps_points = sweep_points(reference, "threshold")
    image_points = sweep_points(reference, "n_samples")
    if not eps_points and not image_points:
        return None
    panels = [
        ("ACC (%)", "eps", eps_points, lambda run: run.ACC),
        ("BWT (%)", "eps", eps_points, lambda run: run.BWT),
        ("memory (% of GPM_Max)", "eps", eps_points, lambda run: run.memory[-1]),
        ("ACC (%)", "n_s", image_points, lambda run: run.ACC),
    ]
    figure = new_figure(14, 3.4)
    for panel, (title, symbol, points, value) in zip(figure.subplots(1, 4), panels, strict=True):
        values = [per_sample(runs, value) for _, runs in points]
        means = [v.mean() for v in values]
        spreads = [v.std(ddof=len(v) > 1) for v in values]
        x = range(len(points))  # evenly spaced: eps crowds towards 1, n_s grows by factors
        panel.errorbar(x, means, spreads, marker="o", capsize=3)
        panel.set_xticks(x, [f"{value:g}" for value, _ in points])
        panel.set(title=title, xlabel=symbol)
        panel.grid(alpha=0.3)
    figure.suptitle("Permuted MNIST", fontweight="bold")
    return figure


def draw_all(args, own, reference):
    """Write the figures that were asked for, and one for each new run. Returns whether all went."""
    wanted = {}
    if args.figure:
        wanted[args.figure] = lambda: draw_results(own, reference)
    if args.sweep:
        wanted[args.sweep] = lambda: draw_sweep(reference)
    for run in own.runs:
        if run.finished and not drawn(run):
            wanted[run.folder / "accuracy.png"] = lambda run=run: draw_run(run)
    failed = False
    for path, draw in wanted.items():
        figure = draw()
        if figure is None:
            print(f"report.py: no results for it: {path} is not written", file=sys.stderr)
            continue
        try:
            save_figure(figure, path)
        except (OSError, RuntimeError) as error:  # RuntimeError: .pgf without LaTeX
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            print(f"report.py: error: cannot write {path}: {reason}", file=sys.stderr)
            failed = failed or path in (args.figure, args.sweep)
    return not failed


def drawn(run):
    """Whether the run has a figure that is not older than its results."""
    figure, results = run.folder / "accuracy.png", run.folder / "results.json"
    return figure.exists() and figure.stat().st_mtime >= results.stat().st_mtime


# 10. Main -----------------------------------------------------------------------------------------
HERE = Path(__file__).resolve().parent


def figure_file(text):
    """An argparse type: a file that matplotlib can write, in a folder that exists."""
    from matplotlib.backend_bases import FigureCanvasBase

    path, suffixes = Path(text), sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in suffixes:
        raise argparse.ArgumentTypeError(f"{text} must end in one of .{' .'.join(suffixes)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder")
    return path


def folder(text):
    """An argparse type: a folder that exists."""
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return Path(text).resolve()


def parse_args(argv=None):
    """Read the flags. Wrong values end in one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"report.py: error: {message}\n")
    add = parser.add_argument
    add("--models_dir", type=folder, default=HERE, help="what was trained here")
    add("--reference", type=folder, default=HERE / "reference", help="the repository's runs")
    add("--all", action="store_true", help="also the paper's other methods")
    add("--figure", type=figure_file, metavar="FILE", help="draw ACC over the tasks")
    add(
        "--sweep", type=figure_file, metavar="FILE", help="draw the reference's sweep over eps, n_s"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print each accuracy of each run")
    form.add_argument("--latex", action="store_true", help="print the tables for LaTeX")
    return parser.parse_args(argv)


def main(args):
    """Print what was asked for, then draw the figures."""
    reference = collect(args.reference, prefix="reference/")
    own = collect(args.models_dir, without=args.reference)
    if args.csv:
        text = csv_report(own, reference)
    elif args.latex:
        text = latex_report(own, reference, args.all)
    else:
        text = markdown_report(own, reference, args.all)
    print(text, end="", flush=True)
    if not draw_all(args, own, reference):
        raise SystemExit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show ±
    try:
        main(parse_args())
    except BrokenPipeError:  # the reader (e.g. head) closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
