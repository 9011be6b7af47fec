"""Compare the runs below this folder with the paper: a table in Markdown and, on request, a figure.

    python models/report.py
    python models/report.py --all --figure models/results.png

A row of the table averages the finished runs of one setting, on one kind of device, on the same data: one run per seed, and for
Superclass one value per task order. Runs of code that was changed and not committed make rows of their own, runs whose flags are
not the published ones those of a second table. Runs that count nowhere (quick, unfinished, a seed once more, a file that cannot
be read) are named below it.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Flags that may differ between runs that are averaged, or that the table keeps apart by itself (official_data).
FREE = ("seed", "t_order", "official_data", "device", "data_dir", "models_dir", "run_name", "overwrite", "evaluate")

# All other flags as published: the defaults of the scripts (a test compares the two; importing them would import torch).
PUBLISHED = {
    "pmnist": {
        "n_epochs": 5, "batch_size_train": 10, "batch_size_test": 64, "pc_valid": 0.1, "lr": 0.01, "momentum": 0.0,
        "lr_min": 1e-5, "lr_patience": 0, "lr_factor": 2.0, "threshold": [0.95, 0.99, 0.99], "threshold_increment": 0.0,
        "n_samples": [300], "n_tasks": 10, "n_hidden": 100},
    "cifar100": {
        "n_epochs": 200, "batch_size_train": 64, "batch_size_test": 64, "pc_valid": 0.05, "lr": 0.01, "momentum": 0.0,
        "lr_min": 1e-5, "lr_patience": 6, "lr_factor": 2.0, "threshold": [0.97], "threshold_increment": 0.003,
        "n_samples": [24, 100, 100, 125, 125], "n_tasks": 10},
    "cifar100_superclass": {
        "n_epochs": 50, "batch_size_train": 64, "batch_size_test": 64, "pc_valid": 0.05, "lr": 0.01, "momentum": 0.0,
        "lr_min": 1e-5, "lr_patience": 6, "lr_factor": 2.0, "threshold": [0.98], "threshold_increment": 0.001,
        "n_samples": [24, 100, 125, 125], "n_tasks": 20},
    "five_datasets": {
        "n_epochs": 100, "batch_size_train": 64, "batch_size_test": 64, "pc_valid": 0.05, "lr": 0.1, "momentum": 0.0,
        "lr_min": 1e-3, "lr_patience": 5, "lr_factor": 3.0, "threshold": [0.965], "threshold_increment": 0.0,
        "n_samples": [10] * 9 + [50] * 4 + [100] * 7, "n_tasks": 5},
}


class Paper(NamedTuple):
    """The paper's numbers in percent (None: not given), and where ACC and BWT must lie to count as the same."""
    ACC: float
    std: float
    BWT: float
    centre: float
    width: float
    lowest_BWT: float = -math.inf
    highest_BWT: float = math.inf


class Variant(NamedTuple):
    """A benchmark on one kind of data: a row that is always there. paper: None where no published number belongs to it."""
    benchmark: str
    official_data: bool
    label: str
    paper: Paper


VARIANTS = (
    Variant("pmnist", False, "Permuted MNIST", Paper(93.91, 0.16, -3, 93.9, 0.6, -4.5, -2)),
    Variant("cifar100", False, "10-split CIFAR-100", Paper(72.48, 0.40, -0.9, 72.5, 1.2, -2)),
    Variant("cifar100_superclass", True, "CIFAR-100 Superclass, `--official_data`", Paper(57.72, None, None, 57.7, 1.2)),
    Variant("cifar100_superclass", False, "CIFAR-100 Superclass, correct images", None),
    Variant("five_datasets", True, "5-Datasets, `--official_data`", Paper(91.22, 0.20, -1, 91.2, 1)),
    Variant("five_datasets", False, "5-Datasets, with Fashion-MNIST", None),
)

OTHER_METHODS = (  # from the paper's tables: ACC / BWT
    ("Method", "Permuted MNIST", "10-split CIFAR-100", "CIFAR-100 Superclass", "5-Datasets"),
    ("GPM", "93.91 ± 0.16 / -3", "72.48 ± 0.40 / -0.9", "57.72", "91.22 ± 0.20 / -1"),
    ("Multitask (upper bound)", "96.70 ± 0.02", "79.58 ± 0.54", "", "91.54 ± 0.28"),
    ("Single-task networks", "", "", "61.00", ""),
    ("OWM", "90.71 ± 0.11 / -1", "50.94 ± 0.60 / -30", "", ""),
    ("EWC", "89.97 ± 0.57 / -4", "68.80 ± 0.88 / -2", "", "88.64 ± 0.26 / -4"),
    ("HAT", "", "72.06 ± 0.50 / 0", "", "91.32 ± 0.18 / -1"),
    ("A-GEM", "83.56 ± 0.16 / -14", "63.98 ± 1.22 / -15", "", "84.04 ± 0.33 / -12"),
    ("ER_Res", "87.24 ± 0.53 / -11", "71.73 ± 0.63 / -6", "", "88.31 ± 0.22 / -4"),
    ("APD", "", "", "56.81", ""),
    ("RCL", "", "", "51.99", ""),
    ("DEN", "", "", "51.10", ""),
    ("PGN", "", "", "50.76", ""),
)

N_ORDERS = 5  # of Superclass; the paper's number is the mean over them
MIN_RUNS = 3  # fewer say too little to be judged


def parse_args(argv=None):
    """Read the flags. Wrong values end in one line and exit status 2."""
    parser = argparse.ArgumentParser(description="Compare finished runs with the paper",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    parser.add_argument("--models_dir", type=Path, default=Path(__file__).parent,
                        help="folder that holds <benchmark>/<run>/results.json")
    parser.add_argument("--all", action="store_true", help="add the paper's other methods")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw accuracies and ranks of the table's rows")
    args = parser.parse_args(argv)
    if not args.models_dir.is_dir():
        fail(f"--models_dir {args.models_dir} is not a folder")
    if args.figure and args.figure.suffix != ".png":
        fail(f"--figure must name a .png file, not {args.figure}")
    if args.figure and not args.figure.parent.is_dir():
        fail(f"--figure {args.figure}: there is no folder {args.figure.parent}")
    return args


def fail(message):
    """End the program with one line that says what is wrong."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------
class Run(NamedTuple):
    """What the report needs of a results.json."""
    benchmark: str
    name: str
    place: str  # its folder, relative to the one that the report is on
    seed: int
    order: int  # of the tasks; None where the benchmark has only one
    official_data: bool
    changed: dict  # flags that are not as published
    n_tasks: int
    finished: bool
    acc: np.ndarray  # (T, T)
    ACC: float
    BWT: float
    widths: dict  # {layer: d}
    ranks: np.ndarray  # (T, layers), percent of d
    memory: float  # percent of GPM_Max
    seconds: float
    devices: list  # of {type, name, threads}; several where the run was resumed elsewhere
    incomplete: list  # (data set, training images, test images) of each task that lacks images
    modified: bool  # whether the code differed from its commit
    checkpoint: bool  # whether the weights lie beside it: the results that come with the repository have none

    @property
    def path(self):
        """Where the run lies, as the report names it."""
        return f"`{self.place}`"

    @property
    def setting(self):
        """What runs that are averaged have in common; widths, because the network may change from commit to commit."""
        kinds = sorted({device["type"] for device in self.devices})
        return json.dumps([self.benchmark, self.official_data, self.changed, self.widths, kinds, self.incomplete, self.modified],
                          sort_keys=True)


def read_run(path, models_dir):
    """The Run of a results.json. Raises an exception of some kind where the file is not what a run writes."""
    *place, benchmark, name = path.parent.relative_to(models_dir).parts  # place: where --models_dir pointed, if below this folder
    results = json.loads(path.read_bytes())
    published = PUBLISHED.get(benchmark, {})
    args = {**published, **results["args"]}  # a flag that is younger than the run: its default is what the run did
    acc, widths = np.array(results["accuracy_matrix"], dtype=float), results["widths"]
    T = len(acc)
    if T == 0 or acc.shape != (T, T) or not np.isfinite(acc).all():
        raise ValueError("its accuracy matrix is not a square of numbers")
    if T > args["n_tasks"] or results["finished"] != (T == args["n_tasks"]):
        raise ValueError(f"finished is {results['finished']} after {T} of {args['n_tasks']} tasks")
    ACC, BWT = acc[-1].mean(), (acc[-1] - acc.diagonal())[:-1].mean() if T > 1 else 0.0
    if not np.allclose([ACC, BWT], [results["ACC"], results["BWT"]], rtol=0, atol=1e-6):
        raise ValueError("its ACC and BWT are not those of its accuracy matrix")
    ranks = np.array([[100 * rank[layer] / d for layer, d in widths.items()] for rank in results["ranks"]])
    if len(ranks) != T:
        raise ValueError(f"it has ranks of {len(ranks)} tasks and accuracies of {T}")
    origins = results, *results.get("resumed_with", ())
    return Run(
        benchmark, name, "/".join([*place, benchmark, name]), int(args["seed"]), int(args["t_order"]) if "t_order" in args else None,
        bool(args.get("official_data")),
        {flag: value for flag, value in args.items() if flag not in FREE and (flag not in published or value != published[flag])},
        args["n_tasks"], results["finished"], acc, ACC, BWT, widths, ranks, float(results["memory"][-1]["percent_of_max"]),
        float(sum(results["seconds"].values())),
        [{key: origin["device"][key] for key in ("type", "name", "threads")} for origin in origins],
        sorted((part["set"], part["train"] + part["valid"], part["test"]) for part in results["data"] if not part["complete"]),
        any(origin.get("dirty") for origin in origins), (path.parent / "checkpoint.pt").exists())


def collect(models_dir):
    """All runs below the folder: those that count, in lists of one setting each, and lines on the others."""
    settings, notes = {}, []
    for path in sorted(models_dir.glob("*/**/results.json")):
        try:
            run = read_run(path, models_dir)
        except Exception as error:  # whatever is wrong with one file, the others still count
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            notes.append(f"`{path.relative_to(models_dir)}`: skipped, it cannot be read as a result ({reason})")
            continue
        result = f"ACC {run.ACC:.2f}, BWT {run.BWT:.2f}" + (f" ({flags(run.changed)})" if run.changed else "")
        if run.benchmark not in PUBLISHED:
            notes.append(f"{run.path}: not one of the paper's benchmarks, ACC {run.ACC:.2f}, BWT {run.BWT:.2f}")
        elif run.name.startswith("quick_"):
            notes.append(f"{run.path}: a quick run, {result}")
        elif not run.finished:
            notes.append(f"{run.path}: unfinished, {len(run.acc)} of {run.n_tasks} tasks, so far {result}")
        else:
            # Runs of one seed are no independent samples: the first by name counts, whatever it gave.
            runs = settings.setdefault(run.setting, [])
            same = [other for other in runs if (other.seed, other.order) == (run.seed, run.order)]
            if same:
                notes.append(f"{run.path}: the setting and seed of {same[0].path}, which counts, {result}")
            else:
                runs.append(run)
    return list(settings.values()), notes


def per_sample(runs, what):
    """Array of what(run), one for each seed; for Superclass one for each task order, averaged over the order's seeds."""
    samples = {}
    for run in runs:
        samples.setdefault(run.seed if run.order is None else run.order, []).append(what(run))
    return np.array([np.mean(values, axis=0) for values in samples.values()])


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------
def flags(changed):
    """Flags and their values as on a command line."""
    words = []
    for flag, value in changed.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words.append(" ".join(["--" + flag, *map(str, values)]))
    return "`" + " ".join(words) + "`"


def result_text(runs):
    """ACC ± std / BWT (number of samples)."""
    ACC, BWT = per_sample(runs, lambda run: (run.ACC, run.BWT)).T
    spread = f" ± {ACC.std(ddof=1):.2f}" if len(ACC) > 1 else ""
    number = count(len(ACC), "seed" if runs[0].order is None else "order")
    if len(runs) > len(ACC):
        number += f", {len(runs)} runs"
    return f"{ACC.mean():.2f}{spread} / {BWT.mean():.2f} ({number})"


def count(n, noun):
    """A number and its noun."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def verdict(variant, runs):
    """Whether the runs reproduce the paper's numbers, or why that cannot be said. Judged by the numbers as they are printed."""
    if runs[0].incomplete:
        return "n/a (partial data)"
    if variant.paper is None:
        return "n/a (other data)"
    if runs[0].modified:
        return "n/a (modified code)"
    ACC, BWT = per_sample(runs, lambda run: (run.ACC, run.BWT)).T
    if runs[0].order is None and len(ACC) < MIN_RUNS:
        return f"fewer than {MIN_RUNS} runs"
    if runs[0].order is not None and len(ACC) < N_ORDERS:
        return f"fewer than {N_ORDERS} orders"
    near = round(abs(round(ACC.mean(), 2) - variant.paper.centre), 2) <= variant.paper.width
    return "yes" if near and variant.paper.lowest_BWT < round(BWT.mean(), 2) < variant.paper.highest_BWT else "no"


def data_text(runs):
    """Whether the data sets were complete, and which were not."""
    return "partial: " + ", ".join(dict.fromkeys(part[0] for part in runs[0].incomplete)) if runs[0].incomplete else "complete"


def device_text(device):
    """Name of a GPU, or number of threads of a CPU."""
    if device["type"] == "cuda":
        return device["name"]
    return f"{device['type'].upper()} {device['name']}, {count(device['threads'], 'thread')}"


def devices_text(runs):
    """The devices that the runs ran on."""
    return " / ".join(sorted({" then ".join(dict.fromkeys(map(device_text, run.devices))) for run in runs}))


def cost_text(runs):
    """Mean time of a run, and where it ran."""
    seconds = np.mean([run.seconds for run in runs])
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return f"{time} ({devices_text(runs)})"


def memory_text(runs):
    """Mean size of the bases after the last task."""
    return f"{np.mean([run.memory for run in runs]):.1f} %"


def paper_text(paper):
    """ACC ± std / BWT."""
    spread = "" if paper.std is None else f" ± {paper.std:.2f}"
    return f"{paper.ACC:.2f}{spread} / {'not given' if paper.BWT is None else format(paper.BWT, 'g')}"


def markdown(rows):
    """Lines of a Markdown table whose first row is the header, aligned for readers of the plain text as well."""
    width = [max(map(len, column)) for column in zip(*rows)]
    header, *body = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, width)) + " |" for row in rows]
    return [header, "|" + "|".join("-" * (w + 2) for w in width) + "|", *body]


def group(settings):
    """Which runs make which row of the table: (variant, runs) for each, runs empty where nothing was measured.

    Complete data and committed code come first, and are a row even if nothing but other runs was measured.
    """
    rows = []
    for variant in VARIANTS:
        found = [runs for runs in settings if not runs[0].changed
                 and (runs[0].benchmark, runs[0].official_data) == (variant.benchmark, variant.official_data)]
        comparable = [runs for runs in found if not (runs[0].incomplete or runs[0].modified)]
        others = [runs for runs in found if runs[0].incomplete or runs[0].modified]
        rows += [(variant, runs) for runs in (comparable or [[]]) + others]
    return rows


def label(variant, runs):
    """The name of a row."""
    return variant.label + (", modified code" if runs and runs[0].modified else "")


def main_table(rows):
    """Lines of the table that compares with the paper."""
    table = [("Benchmark", "Paper: ACC / BWT", "Here: ACC / BWT", "Difference", "In the band", "Data", "Time per run", "Memory")]
    for variant, runs in rows:
        paper = variant.paper if not runs or not runs[0].incomplete else None
        start = (label(variant, runs), "-" if paper is None else paper_text(paper))
        if not runs:
            table.append((*start, "not measured yet", "-", "-", "-", "-", "-"))
            continue
        difference = "-" if paper is None else f"{per_sample(runs, lambda run: run.ACC).mean() - paper.ACC:+.2f}"
        table.append((*start, result_text(runs), difference, verdict(variant, runs), data_text(runs), cost_text(runs),
                      memory_text(runs)))
    return markdown(table)


def other_table(settings):
    """Lines of the table of runs whose flags are not the published ones."""
    variants = {(variant.benchmark, variant.official_data): variant for variant in VARIANTS}
    table = [("Benchmark", "Flags that differ", "Here: ACC / BWT", "Data", "Time per run", "Memory")]
    for runs in settings:
        variant = variants[runs[0].benchmark, runs[0].official_data]
        table.append((label(variant, runs), flags(runs[0].changed), result_text(runs), data_text(runs), cost_text(runs), memory_text(runs)))
    return markdown(table)


def legend():
    """Lines that say what the numbers of the table are."""
    bands = []
    for variant in VARIANTS:
        if variant.paper:
            lowest, highest = variant.paper.lowest_BWT, variant.paper.highest_BWT
            BWT = f", BWT between {lowest:g} and {highest:g}" if highest < math.inf else f", BWT > {lowest:g}" if lowest > -math.inf else ""
            bands.append(f"{variant.label} {variant.paper.centre:g} ± {variant.paper.width:g}{BWT}")
    return [
        "ACC and BWT in percent; mean ± sample standard deviation over seeds, for Superclass over the task orders.",
        f"The band, for the mean of at least {MIN_RUNS} seeds, or of all {N_ORDERS} orders: {'; '.join(bands)}.",
        "Memory: floats in the bases after the last task, as a share of GPM_Max.",
        "`--official_data`: the data as the released code makes them, on which the published numbers probably rest."]


# ----------------------------------------------------------------------------------------------------------------------
# Figure
# ----------------------------------------------------------------------------------------------------------------------
def write_figure(rows, path):
    """For each measured row the mean accuracy matrix, ACC over tasks with its spread, and rank / width of the layers."""
    figure = Figure(figsize=(13, 3.8 * len(rows)), layout="constrained")
    for part, (variant, runs) in zip(figure.subfigures(len(rows), 1, squeeze=False).flat, rows):
        partial = f"; {data_text(runs)}" if runs[0].incomplete else ""
        part.suptitle(f"{label(variant, runs).replace('`', '')}: ACC / BWT {result_text(runs)}; {devices_text(runs)}{partial}", fontweight="bold")
        draw(variant, runs, *part.subplots(1, 3))
    temporary = path.with_name(path.name + ".part")  # killed at any moment, the old figure or the new one is there, whole
    try:
        with open(temporary, "wb") as file:
            figure.savefig(file, format="png", dpi=110)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error.strerror}")


def draw(variant, runs, matrix, means, ranks):
    """The three panels of a row of the figure, each on the axes of its name."""
    acc = per_sample(runs, lambda run: run.acc).mean(axis=0)
    T = len(acc)
    tasks = np.arange(1, T + 1)
    image = matrix.imshow(np.where(np.tri(T, dtype=bool), acc, np.nan), extent=(0.5, T + 0.5, T + 0.5, 0.5))
    matrix.figure.colorbar(image, ax=matrix)
    matrix.set(title="test accuracy (%) on each task", xlabel="task", ylabel="trained up to task")
    matrix.yaxis.set_major_locator(MaxNLocator(integer=True))

    curves = per_sample(runs, lambda run: [run.acc[t, :t + 1].mean() for t in range(T)])  # (samples, T)
    mean = curves.mean(axis=0)
    means.plot(tasks, mean, marker="o", label="here")
    if len(curves) > 1:
        std = curves.std(axis=0, ddof=1)
        means.fill_between(tasks, mean - std, mean + std, alpha=0.3, label="± standard deviation")
    if variant.paper and not runs[0].incomplete:
        means.axhline(variant.paper.ACC, color="black", linestyle="--", label=f"paper, all {T} tasks")
    means.set(title="ACC over the tasks so far (%)", xlabel="trained up to task")
    means.legend(fontsize="small")

    layers, share = runs[0].widths, per_sample(runs, lambda run: run.ranks).mean(axis=0)  # (T, layers)
    for i, (layer, d) in enumerate(layers.items()):
        named = i % math.ceil(len(layers) / 7) == 0 or i == len(layers) - 1  # colours run from the first layer to the last
        ranks.plot(tasks, share[:, i], marker=".", color=colormaps["viridis"](0.9 * i / max(1, len(layers) - 1)),
                   label=f"{layer} ({d})" if named else None)
    ranks.set(title="rank / width of the bases (%)", xlabel="trained up to task", ylim=(0, 103))
    ranks.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    for axes in (matrix, means, ranks):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def main(args):
    """Print the tables and draw the figure."""
    settings, notes = collect(args.models_dir)
    rows = group(settings)
    print("\n".join([*main_table(rows), "", *legend()]))
    elsewhere = [run.path for runs in settings for run in runs if not run.checkpoint]
    if elsewhere:
        print(f"\nNot trained here, there is no checkpoint beside them: {', '.join(elsewhere)}.")
    others = [runs for runs in settings if runs[0].changed]
    if others:
        print("\n".join(["", "### Other settings", "", *other_table(others)]))
    if notes:
        print("\n".join(["", "### Not counted", "", *(f"- {note}" for note in notes)]))
    if args.all:
        print("\n".join(["", "### The paper's other methods (ACC / BWT)", "", *markdown(OTHER_METHODS)]))
    measured = [(variant, runs) for variant, runs in rows if runs]
    if args.figure and measured:
        write_figure(measured, args.figure)
    elif args.figure:
        print(f"\nNothing measured yet: {args.figure} is not written.")


if __name__ == "__main__":
    try:
        main(parse_args())
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
