"""Compare the runs below this folder with the paper: tables in Markdown, and figures.

    python models/report.py --all --figure models/results.png

A row averages the finished runs of one setting, on one kind of device, on the same data: one run per seed, and for Superclass
one value per task order. Runs of code that was changed and not committed make rows of their own, runs whose flags are not the
published ones a second table. What counts nowhere is named below. A finished run receives its accuracy.png if it has none.
"""
import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# Rows that are always there, by benchmark and --official_data: label, the paper's ACC ± standard deviation / BWT in percent,
# and (a, b, c, d): the paper is reproduced where the mean ACC lies within a ± b, and the mean BWT between c and d
VARIANTS = {
    ("pmnist", False): ("Permuted MNIST", "93.91 ± 0.16 / -3", (93.9, 0.6, -4.5, -2)),
    ("cifar100", False): ("10-split CIFAR-100", "72.48 ± 0.40 / -0.9", (72.5, 1.2, -2, 100)),
    ("cifar100_superclass", True): ("CIFAR-100 Superclass, `--official_data`", "57.72 / not given", (57.7, 1.2, -100, 100)),
    ("cifar100_superclass", False): ("CIFAR-100 Superclass, correct images", "-", None),
    ("five_datasets", True): ("5-Datasets, `--official_data`", "91.22 ± 0.20 / -1", (91.2, 1, -100, 100)),
    ("five_datasets", False): ("5-Datasets, with Fashion-MNIST", "-", None),
}
NEEDED = {"seed": 3, "order": 5}  # fewer seeds say too little to be judged; the paper's Superclass is the mean over five orders
COLUMNS = ("Benchmark", "Paper: ACC / BWT", "Here: ACC / BWT", "Difference", "In the band", "Data", "Time per run", "Memory")
OTHER_COLUMNS = ("Benchmark", "Flags that differ", "Here: ACC / BWT", "Data", "Time per run", "Memory")
BANDS = "; ".join("{}: {:g} ± {:g}, BWT {:g} to {:g}".format(label, *band).removesuffix(", BWT -100 to 100")
                  for label, _, band in VARIANTS.values() if band)
LEGEND = f"""
ACC and BWT in percent; mean ± sample standard deviation over seeds, for Superclass over the task orders.
The band, for the mean of at least {NEEDED["seed"]} seeds, or of all {NEEDED["order"]} orders: {BANDS}.
Memory: floats in the bases after the last task, as a share of GPM_Max.
`--official_data`: the data as the released code makes them, on which the published numbers probably rest."""
OTHER_METHODS = """
### The paper's other methods (ACC / BWT)

| Method                  | Permuted MNIST     | 10-split CIFAR-100 | 5-Datasets         |
|-------------------------|--------------------|--------------------|--------------------|
| Multitask (upper bound) | 96.70 ± 0.02       | 79.58 ± 0.54       | 91.54 ± 0.28       |
| OWM                     | 90.71 ± 0.11 / -1  | 50.94 ± 0.60 / -30 |                    |
| EWC                     | 89.97 ± 0.57 / -4  | 68.80 ± 0.88 / -2  | 88.64 ± 0.26 / -4  |
| HAT                     |                    | 72.06 ± 0.50 / 0   | 91.32 ± 0.18 / -1  |
| A-GEM                   | 83.56 ± 0.16 / -14 | 63.98 ± 1.22 / -15 | 84.04 ± 0.33 / -12 |
| ER_Res                  | 87.24 ± 0.53 / -11 | 71.73 ± 0.63 / -6  | 88.31 ± 0.22 / -4  |

CIFAR-100 Superclass: single-task networks 61.00, APD 56.81, RCL 51.99, DEN 51.10, PGN 50.76."""


def parse_args(argv=None):
    """Read the flags. Wrong values end in one line and exit status 2."""
    parser = argparse.ArgumentParser(description="Compare finished runs with the paper")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("--models_dir", type=Path, default=Path(__file__).parent, help="holds <benchmark>/<run>/results.json")
    parser.add_argument("--all", action="store_true", help="add the paper's other methods")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw accuracies and ranks of the table's rows")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.models_dir):
        parser.error(f"--models_dir {args.models_dir} is not a folder")
    if args.figure and not (args.figure.suffix == ".png" and os.path.isdir(args.figure.parent)):
        parser.error(f"--figure must name a .png file in a folder that exists, not {args.figure}")
    return args


# Runs -----------------------------------------------------------------------------------------------------------------
def read_run(path, models_dir):
    """A results.json, and what the report makes of it. Raises an exception of some kind where no run would write it."""
    run = SimpleNamespace(**json.loads(path.read_bytes()))
    run.acc = np.array(run.accuracy_matrix, dtype=float)  # (T, T)
    run.shares = np.array([[100 * rank[layer] / d for layer, d in run.widths.items()] for rank in run.ranks])  # (T, layers)
    T, n_tasks = len(run.acc), run.args["n_tasks"]
    if T > n_tasks or run.finished != (T == n_tasks) or not T == len(run.ranks) == len(run.memory):
        raise ValueError(f"accuracies of {T} of {n_tasks} tasks, ranks of {len(run.ranks)}, finished is {run.finished!r}")
    if T > 0:
        ACC, BWT = run.acc[-1].mean(), (run.acc[-1] - run.acc.diagonal())[:-1].mean() if T > 1 else 0.0
        if run.acc.shape != (T, T) or not np.allclose([ACC, BWT], [run.ACC, run.BWT], rtol=0, atol=1e-6):
            raise ValueError("its ACC and BWT are not those of its accuracy matrix")
    run.result = f"{T} of {n_tasks} tasks" + (f", ACC {run.ACC:.2f}, BWT {run.BWT:.2f}" if T > 0 else "")
    run.place, run.trained_here = path.parent.relative_to(models_dir).as_posix(), path.with_name("checkpoint.pt").exists()
    run.figure = path.with_name("accuracy.png")
    run.drawn = run.figure.exists() and run.figure.stat().st_mtime >= path.stat().st_mtime  # else it shows an earlier run
    run.variant = run.place.split("/")[0], bool(run.args.get("official_data"))
    run.noun = "order" if "t_order" in run.args else "seed"  # of what a run is a sample
    run.seed, run.sample = int(run.args["seed"]), int(run.args.get("t_order", run.args["seed"]))
    run.seconds, run.percent = float(run.seconds), float(sum(run.memory[-1:]))
    run.flags = " ".join(f"--{flag} {str(value).strip('[]').replace(',', '')}" for flag, value in run.changed.items())
    lacking = sorted((task["set"], task["train"] + task["valid"], task["test"])
                     for task in run.data.values() if not task["complete"])
    run.partial = ", ".join(dict.fromkeys(name for name, *_ in lacking))
    run.modified = any(origin["dirty"] for origin in run.origins)
    run.devices = {tuple(origin["device"][key] for key in ("type", "name", "threads")) for origin in run.origins}
    # What runs that are averaged have in common; widths, because the network may change from commit to commit
    common = [run.variant, run.changed, n_tasks, run.widths, lacking, sorted({kind for kind, *_ in run.devices})]
    run.setting = run.partial, run.modified, json.dumps(common, sort_keys=True)
    return run


def collect(models_dir):
    """All runs below the folder; those of them that count, in lists of one setting each; lines on what does not count."""
    runs, settings, notes = [], {}, []
    for path in sorted(models_dir.glob("*/**/results.json")):
        try:
            runs.append(run := read_run(path, models_dir))
        except Exception as error:  # whatever is wrong with one file, the others still count
            notes.append(f"- `{path.relative_to(models_dir)}`: no result ({type(error).__name__}: {error})")
            continue
        counted = settings.get(run.setting, [])
        reasons = {"a quick run": "/quick" in f"/{run.place}",
                   "not one of the paper's benchmarks": run.variant not in VARIANTS,
                   "unfinished": not run.finished,
                   "a seed once more": (run.seed, run.sample) in [(other.seed, other.sample) for other in counted]}
        if any(reasons.values()):
            notes.append(f"- `{run.place}`: {next(filter(reasons.get, reasons))}, {run.result}")
        else:
            settings[run.setting] = [*counted, run]
    return runs, [settings[setting] for setting in sorted(settings)], notes


def per_sample(runs, value):
    """Array of value(run), one for each seed; for Superclass one for each task order, the mean over its seeds."""
    samples = dict.fromkeys(run.sample for run in runs)
    return np.array([np.mean([value(run) for run in runs if run.sample == sample], axis=0) for sample in samples])


# Tables ---------------------------------------------------------------------------------------------------------------
def describe(runs):
    """What the tables say of runs that are averaged, {column: text}."""
    run, (label, paper, band) = runs[0], VARIANTS.get(runs[0].variant, (runs[0].variant[0], "-", None))
    ACCs, BWTs = per_sample(runs, lambda run: (run.ACC, run.BWT)).T
    n, ACC, BWT = len(ACCs), ACCs.mean(), BWTs.mean()
    spread = f" ± {ACCs.std(ddof=1):.2f}" if n > 1 else ""
    seconds = np.mean([run.seconds for run in runs])
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    devices = set().union(*(run.devices for run in runs))
    names = sorted({name if kind == "cuda" else f"{kind.upper()} {name}" for kind, name, _ in devices})
    threads = sorted({f"{n} thread{'s' * (n != 1)}" for kind, _, n in devices if kind != "cuda"})
    doubts = {"partial data": run.partial, "other data": band is None, "modified code": run.modified}
    if any(doubts.values()):
        verdict = f"n/a ({next(filter(doubts.get, doubts))})"
    elif n < NEEDED[run.noun]:
        verdict = f"fewer than {NEEDED[run.noun]} {'runs' if run.noun == 'seed' else 'orders'}"
    else:  # judged by the numbers as they are printed
        centre, width, lowest, highest = band
        verdict = "yes" if round(abs(round(ACC, 2) - centre), 2) <= width and lowest < round(BWT, 2) < highest else "no"
    row = {"Benchmark": label + (", modified code" if run.modified else ""),
           "Flags that differ": f"`{run.flags}`",
           "Here: ACC / BWT": f"{ACC:.2f}{spread} / {BWT:.2f} ({n} {run.noun}{'s' * (n > 1)})",
           "In the band": verdict,
           "Data": f"partial: {run.partial}" if run.partial else "complete",
           "Time per run": f"{time} ({' and '.join(names)}{', ' * bool(threads)}{' or '.join(threads)})",
           "Memory": f"{np.mean([run.percent for run in runs]):.1f} %"}
    if band and not (run.partial or run.changed):
        row |= {"Paper: ACC / BWT": paper, "Difference": f"{ACC - float(paper.split()[0]):+.2f}"}
    return row


def markdown(columns, rows):
    """Lines of a Markdown table, aligned for readers of the plain text as well."""
    cells = [columns, *([row.get(column, "-") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    header, *body = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [header, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body]


# Figures --------------------------------------------------------------------------------------------------------------
def write_figure(path, settings):
    """For each list of runs the mean accuracy matrix, ACC over tasks with its deviation, and rank / width of the layers."""
    from matplotlib.figure import Figure  # here, because the tables do not need it

    figure = Figure(figsize=(13, 3.8 * len(settings)), layout="constrained")
    for part, runs in zip(figure.subfigures(len(settings), squeeze=False).flat, settings):
        row, T = describe(runs), len(runs[0].acc)
        tasks = np.arange(1, T + 1)
        title = f"{row['Benchmark']}: ACC / BWT {row['Here: ACC / BWT']}, {row['Time per run'].split(' (')[0]} {runs[0].flags}"
        part.suptitle(title.replace("`", ""), fontweight="bold", parse_math=False)
        matrix, means, ranks = part.subplots(1, 3)
        acc = per_sample(runs, lambda run: run.acc).mean(axis=0)
        image = matrix.imshow(np.where(np.tri(T), acc, np.nan), extent=(0.5, T + 0.5, T + 0.5, 0.5))
        part.colorbar(image, ax=matrix)
        matrix.set(title="test accuracy (%) on each task", xlabel="task", ylabel="trained up to task")
        curves = per_sample(runs, lambda run: [run.acc[t - 1, :t].mean() for t in tasks])  # (samples, T)
        means.errorbar(tasks, curves.mean(axis=0), curves.std(axis=0, ddof=len(curves) > 1), marker="o", label="here")
        if "Difference" in row:
            means.axhline(float(row["Paper: ACC / BWT"].split()[0]), color="black", linestyle="--", label="paper, all tasks")
        means.set(title="ACC over the tasks so far (%)", xlabel="trained up to task")
        means.legend(fontsize="small")
        shares = per_sample(runs, lambda run: run.shares).mean(axis=0)  # (T, layers)
        for i, (layer, d) in enumerate(runs[0].widths.items()):
            ranks.plot(tasks, shares[:, i], marker=".", color=image.cmap(0.9 * i / len(shares.T)), label=f"{layer} ({d})")
        ranks.set(title="rank / width of the bases (%)", xlabel="trained up to task", ylim=(0, 103))
        ranks.legend(fontsize="x-small", labelspacing=0.3, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
        for axis in matrix.xaxis, matrix.yaxis, means.xaxis, ranks.xaxis:
            axis.get_major_locator().set_params(integer=True)
    temporary = path.with_name(path.name + ".part")  # killed at any moment, an old file or the new one is there, whole
    try:
        with open(temporary, "wb") as file:
            figure.savefig(file, dpi=110)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(args):
    """Print the tables, then draw the figures."""
    runs, settings, notes = collect(args.models_dir)
    rows, published, others = [], [], [runs for runs in settings if runs[0].changed]
    for variant, (label, paper, _) in VARIANTS.items():
        found = [runs for runs in settings if runs[0].variant == variant and not runs[0].changed]
        if not found or found[0][0].partial or found[0][0].modified:  # complete data and committed code come first
            rows.append({"Benchmark": label, "Paper: ACC / BWT": paper, "Here: ACC / BWT": "not measured yet"})
        rows += map(describe, found)
        published += found
    lines = [*markdown(COLUMNS, rows), LEGEND]
    elsewhere = sum(not run.trained_here for runs in settings for run in runs)
    lines += [f"\n{elsewhere} of these runs have no checkpoint beside them: they were trained elsewhere."] if elsewhere else []
    lines += ["\n### Other settings\n", *markdown(OTHER_COLUMNS, map(describe, others))] if others else []
    lines += ["\n### Not counted\n", *notes] if notes else []
    lines += [OTHER_METHODS] if args.all else []
    lines += [f"\nNothing measured yet: {args.figure} is not written."] if args.figure and not published else []
    print("\n".join(lines), flush=True)

    figures = {run.figure: [[run]] for run in runs if run.finished and not run.drawn}
    figures |= {args.figure: published} if args.figure and published else {}
    for path, settings in figures.items():
        try:
            write_figure(path, settings)
        except OSError as error:
            print(f"report.py: cannot write {path}: {error.strerror}", file=sys.stderr)
            if path == args.figure:
                raise SystemExit(2)


if __name__ == "__main__":
    try:
        main(parse_args())
    except BrokenPipeError:  # who reads the output, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
