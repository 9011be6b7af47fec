"""The report: numbers worked by hand, what is averaged with what, what does not count, figures."""

import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "models" / "report.py"
sys.path.insert(0, str(SCRIPT.parent))
import report  # noqa: E402

CPU = {"type": "cpu", "name": "x86_64", "threads": 1}
GPU = {"type": "cuda", "name": "NVIDIA H200", "threads": 8}
CODE = report.PUBLISHED_CODE["main_pmnist"][0]
EDITED = "1" * 16
GPM = [
    "93.91 ± 0.16 / -3",
    "72.48 ± 0.40 / -0.9",
    "57.72 / not given",
    "-",
    "91.22 ± 0.20 / -1",
    "-",
]
SETS = {
    "pmnist": ["mnist"],
    "cifar100": ["cifar100"],
    "cifar100_superclass": ["cifar100"],
    "five_datasets": ["cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"],
}


@pytest.fixture
def models(tmp_path):
    """A folder for runs, with an empty reference."""
    (tmp_path / "models" / "reference").mkdir(parents=True)
    return tmp_path / "models"


def matrix(ACC, BWT, done, n_tasks):
    """Each task is learned to ACC - BWT, the last to ACC, and all end at ACC."""
    learned = [[ACC] * t + [ACC - BWT] + [None] * (done - 1 - t) for t in range(done)]
    if done == n_tasks:
        learned[-1] = [ACC] * done
    return learned


def data_of(benchmark, partial=(), tests=None):
    """The data of a results.json. tests: {set: test images}, where not the official number."""
    return {
        f"task {name}": {
            "set": name,
            "source": "somewhere",
            "complete": name not in partial,
            "train": 900,
            "valid": 100,
            "test": (tests or {}).get(name, report.TEST_IMAGES[benchmark][name]),
            "digest": "0123",
        }
        for name in SETS[benchmark]
    }


def origin(code=CODE, device=CPU, dirty=False, commit="c" * 40):
    """One process that worked on a run."""
    return {"code": code, "commit": commit, "dirty": dirty, "device": device}


def results(benchmark="pmnist", ACC=90.0, BWT=-3.0, done=None, **more):
    """A results.json of format 2, by default of a finished run of the published protocol.

    more: args to change, or other keys of the file.
    """
    args = dict(report.PUBLISHED[benchmark])
    flags = {key: more.pop(key) for key in list(more) if key in args}
    args.update(flags)
    n_tasks = args["n_tasks"]
    done = n_tasks if done is None else done
    acc = matrix(ACC, BWT, done, n_tasks)
    widths = {f"layer{i}": d for i, d in enumerate(report.WIDTHS[benchmark])}
    content = {
        "format": 2,
        "benchmark": benchmark,
        "script": f"main_{benchmark}",
        "args": args,
        "changed": {},
        "data": data_of(benchmark),
        "origins": [origin(report.PUBLISHED_CODE[f"main_{benchmark}"][0])],
        "widths": widths,
        "accuracy_matrix": acc,
        "ACC": np.mean(acc[-1]) if done == n_tasks else ACC - BWT / done if done else None,
        "BWT": None if done == 0 else BWT if done == n_tasks else 0.0,
        "ranks": [{name: t + 1 for name in widths} for t in range(done)],
        "memory": [5.0 * (t + 1) for t in range(done)],
        "seconds": 60.0,
        "finished": done == n_tasks,
    }
    return content | more


def write(models, place, content=None, figure=True, **more):
    """Write a results.json. Its figure is there already: drawing takes longer than all else."""
    folder = models / place
    folder.mkdir(parents=True)
    content = content or results(place.removeprefix("reference/").split("/")[0], **more)
    (folder / "results.json").write_text(json.dumps(content))
    if figure:
        (folder / "accuracy.png").touch()
    return folder


def run_report(capsys, models, *flags):
    """What the report prints."""
    folders = ["--models_dir", models, "--reference", models / "reference"]
    report.main(report.parse_args([str(word) for word in (*folders, *flags)]))
    return capsys.readouterr().out


def rows(text, title, label=""):
    """The rows of a table as {column: cell}, those whose first cell starts with the label."""
    part = text.split(f"### {title}\n\n")
    if len(part) == 1:
        return []
    lines = part[1].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    found = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return [row for row in found if next(iter(row.values())).startswith(label)]


def column(text, title, name, label=""):
    """One column of a table."""
    return [row[name] for row in rows(text, title, label)]


# Numbers ------------------------------------------------------------------------------------------
def test_every_row_is_there_without_any_result(models, capsys):
    figure = models / "figure.png"
    text = run_report(capsys, models, "--all", "--figure", figure)
    assert column(text, "Reference", "Paper: ACC / BWT") == GPM
    assert column(text, "Reference", "Here: ACC / BWT") == ["not measured yet"] * 6
    assert "Permuted MNIST 93.9 ± 0.6, BWT -4.5 to -2; " in text
    assert "10-split CIFAR-100 72.5 ± 1.2, BWT above -2; " in text
    assert rows(text, "All methods, from the paper: ACC / BWT", "EWC")
    assert "Not counted" not in text and "Unfinished" not in text
    assert not figure.exists()


def test_means_and_deviations(models, capsys):
    """Mean 93.6; deviations -0.4, -0.1, 0.5; variance (0.16 + 0.01 + 0.25) / 2; root 0.458."""
    for seed, ACC, BWT, seconds in (2, 93.2, -3.5, 60), (3, 93.5, -3.3, 70), (4, 94.1, -3.1, 80):
        place = f"reference/pmnist/seed_{seed}"
        write(models, place, ACC=ACC, BWT=BWT, seed=seed, seconds=seconds)
    # Learned: 9 of 10 tasks to ACC - BWT, one to ACC, so the mean is 93.6 + 0.9 * 3.3.
    assert rows(run_report(capsys, models), "Reference", "Permuted")[0] == {
        "Benchmark": "Permuted MNIST",
        "Paper: ACC / BWT": "93.91 ± 0.16 / -3",
        "Here: ACC / BWT": "93.60 ± 0.46 / -3.30 (3 seeds)",
        "Learned": "96.57",
        "Difference": "-0.31",
        "Within tolerance": "yes",
        "Time per run": "70 s (CPU, 1 thread)",
        "Memory": "50.0 %",
    }


def test_superclass_is_a_mean_over_orders(models, capsys):
    """Order 3 counts once, with (59 + 61) / 2 = 60: mean 57.75, variance 8.75 / 3."""
    for order, seed, ACC in (0, 1, 56), (1, 1, 57), (2, 1, 58), (3, 1, 59), (3, 2, 61):
        place = f"reference/cifar100_superclass/{order}_{seed}"
        write(models, place, ACC=ACC, seed=seed, t_order=order, official_data=True)
    write(models, "reference/cifar100_superclass/correct", ACC=65)
    official, correct = rows(run_report(capsys, models), "Reference", "CIFAR-100 Superclass")
    assert official["Here: ACC / BWT"] == "57.75 ± 1.71 / -3.00 (4 orders)"
    assert official["Within tolerance"] == "fewer than 5 orders"
    assert correct["Here: ACC / BWT"] == "65.00 / -3.00 (1 order)"
    assert (
        correct["Paper: ACC / BWT"] == correct["Difference"] == correct["Within tolerance"] == "-"
    )
    place = "reference/cifar100_superclass/4_1"
    write(models, place, ACC=57.75, t_order=4, official_data=True)
    official = rows(run_report(capsys, models), "Reference", "CIFAR-100 Superclass")[0]
    assert official["Here: ACC / BWT"] == "57.75 ± 1.48 / -3.00 (5 orders)"
    assert official["Within tolerance"] == "yes"


@pytest.mark.parametrize(
    "benchmark, ACC, BWT, expected",
    [
        ("pmnist", 93.3, -2.01, True),
        ("pmnist", 94.5, -4.49, True),
        ("pmnist", 93.29, -3, False),
        ("pmnist", 94.51, -3, False),
        ("pmnist", 93.9, -4.5, False),
        ("pmnist", 93.9, -2, False),
        ("cifar100", 71.3, 0.5, True),
        ("cifar100", 71.29, 0, False),
        ("cifar100", 72.5, -2, False),
        ("five_datasets", 90.2, -9, True),
        ("five_datasets", 92.21, 0, False),
    ],
)
def test_tolerance(benchmark, ACC, BWT, expected):
    row = next(row for row in report.ROWS if row.benchmark == benchmark)
    assert row.tolerance.holds(ACC, BWT) == expected


def test_first_task(models, capsys):
    """Task 1 ends at 90 and was learned to 93; between them 88."""
    content = results("five_datasets", ACC=90, BWT=-3, official_data=True)
    content["accuracy_matrix"][2][0] = 88
    write(models, "reference/five_datasets/a", content)
    row = rows(run_report(capsys, models), "Accuracy on the first task")[0]
    assert [row[name] for name in ("Learned", "At the end", "Lowest", "Tasks")] == [
        "93.00",
        "90.00",
        "88.00",
        "5",
    ]


# What is the published protocol -------------------------------------------------------------------
def test_a_changed_default_is_not_the_published_protocol(models, capsys):
    """lr 0.02 written into the script: for the script it is no changed flag."""
    write(models, "pmnist/seed_2", lr=0.02, changed={})
    text = run_report(capsys, models)
    assert not rows(text, "Trained here")
    assert column(text, "Other settings", "Not as published") == ["`--lr 0.02`"]


def test_one_file_of_three_with_other_args_is_not_averaged(models, capsys):
    for seed, lr in (1, 0.01), (2, 0.01), (3, 0.02):
        write(models, f"reference/pmnist/{seed}", ACC=90 + seed, seed=seed, lr=lr)
    text = run_report(capsys, models)
    here = column(text, "Reference", "Here: ACC / BWT", "Permuted")
    assert here == ["91.50 ± 0.71 / -3.00 (2 seeds)"]
    assert column(text, "Other settings", "Here: ACC / BWT") == ["93.00 / -3.00 (1 seed)"]


@pytest.fixture
def two_versions(monkeypatch):
    """The digests of two versions of main_pmnist that count as the published method."""
    codes = "a" * 16, "b" * 16
    monkeypatch.setitem(report.PUBLISHED_CODE, "main_pmnist", codes)
    return codes


def test_two_versions_of_a_script_are_not_averaged(models, capsys, two_versions):
    first, second = two_versions
    write(models, "reference/pmnist/1", ACC=94, seed=1, origins=[origin(first)])
    for seed, code in (1, first), (2, second):
        write(models, f"pmnist/{seed}", ACC=95 - seed, seed=seed, origins=[origin(code)])
    text = run_report(capsys, models)
    found = [(r["Benchmark"], r["Here: ACC / BWT"]) for r in rows(text, "Trained here")]
    assert found == [
        ("Permuted MNIST, code aaaaaaaa", "94.00 / -3.00 (1 seed)"),
        ("Permuted MNIST, code bbbbbbbb", "93.00 / -3.00 (1 seed)"),
    ]
    assert "code bbbbbbbb, the reference's aaaaaaaa: two versions of the published" in text
    assert "code aaaaaaaa, the reference's" not in text


def test_edited_code_is_not_the_published_method(models, capsys):
    """Another learning rate schedule was written into the script and committed."""
    for seed in 1, 2, 3:
        write(models, f"reference/cifar100/{seed}", ACC=72 + seed / 10, seed=seed)
        edited = results("cifar100", ACC=72.5, seed=seed, origins=[origin(EDITED)])
        write(models, f"cifar100/{seed}", edited)
    text = run_report(capsys, models)
    assert not rows(text, "Trained here") and "the reference (expected" not in text
    (row,) = rows(text, "Other settings")
    assert row["Not as published"] == "edited code 11111111"
    assert row["Here: ACC / BWT"] == "72.50 ± 0.00 / -3.00 (3 seeds)"
    assert not row.keys() & {"Paper: ACC / BWT", "Difference", "Within tolerance"}
    assert "- Edited code: " in text
    lines = csv.DictReader(io.StringIO(run_report(capsys, models, "--csv")))
    settings = {line["run"]: line["setting"] for line in lines}
    assert settings["cifar100/1"] == "edited code 11111111"
    assert settings["reference/cifar100/1"] == "as published"


def test_edited_code_in_the_reference_is_no_reference(models, capsys):
    write(models, "reference/pmnist/2", origins=[origin(EDITED)])
    write(models, "pmnist/2")
    text = run_report(capsys, models)
    assert column(text, "Reference", "Here: ACC / BWT", "Permuted") == ["not measured yet"]
    assert column(text, "Trained here", "Reference") == ["-"]
    assert not rows(text, "Accuracy on the first task")


@pytest.mark.parametrize(
    "origins, expected",
    [
        ([origin("a" * 16, device=GPU), origin("a" * 16)], []),
        ([origin("a" * 16), origin("b" * 16)], ["code changed during the run"]),
        (
            [origin("a" * 16), origin(EDITED)],
            ["edited code 11111111+aaaaaaaa", "code changed during the run"],
        ),
        ([origin("a" * 16), origin("a" * 16, dirty=True)], []),  # e.g. an edited docstring
        ([origin("a" * 16, commit="")], []),  # an archive, not a checkout
        ([origin(EDITED, dirty=True)], ["edited code 11111111"]),
        ([origin(report.PUBLISHED_CODE["main_cifar100"][0])], None),
    ],
)
def test_each_process_must_have_run_the_published_code(models, two_versions, origins, expected):
    write(models, "pmnist/2", origins=origins)
    ((run,),) = collections(models)[0].groups
    if expected is None:  # the published code, but of another script
        expected = [f"edited code {origins[0]['code'][:8]}"]
    assert run.differences == expected
    assert run.published == (not expected)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"n_samples": [300, 300, 300]}, {}),
        ({"n_samples": [300]}, {}),
        ({"n_samples": [300, 300, 200]}, {"n_samples": [300, 300, 200]}),
        ({"threshold": [0.95, 0.99, 0.99]}, {}),
        ({"threshold": [0.95, 0.95, 0.95]}, {"threshold": [0.95, 0.95, 0.95]}),
        ({"seed": 7}, {}),
        ({"lr": 0.02}, {"lr": 0.02}),
        ({"nesterov": False}, {}),
    ],
)
def test_flags_that_differ(flags, expected):
    args = report.PUBLISHED["pmnist"] | flags
    assert report.differing_flags("pmnist", args) == expected


def test_flags_that_the_protocol_does_not_know_or_the_script_lacks():
    args = report.PUBLISHED["cifar100"] | {"nesterov": True, "cosine": False}
    differing = report.differing_flags("cifar100", args, changed={"nesterov": True})
    assert differing == {"nesterov": True}
    del args["lr"]
    assert report.differing_flags("cifar100", args) == {"lr": None}


def test_how_differences_are_printed(models, capsys):
    flags = {"threshold": [0.0, 0.0, 0.0], "n_samples": [1, 2, 3], "changed": {"nesterov": True}}
    content = results(**flags)
    content["args"]["nesterov"] = True
    del content["args"]["lr_min"]
    content["widths"]["layer0"] = 9
    write(models, "pmnist/1", content)
    assert column(run_report(capsys, models), "Other settings", "Not as published") == [
        "`no --lr_min` `--threshold 0` `--n_samples 1 2 3` `--nesterov` layer widths 9 100 100"
    ]


def test_runs_without_projection_are_called_a_lower_bound(models, capsys):
    write(models, "pmnist/1", lr=0.02)
    assert "lower bound" not in run_report(capsys, models)
    write(models, "reference/pmnist/2", results(threshold=[0.0]))
    text = run_report(capsys, models)
    assert column(text, "Other settings", "From") == ["reference", "trained here"]
    assert "a lower bound of what plain SGD can do." in text


def test_forms_of_one_setting_are_averaged(models, capsys):
    write(models, "reference/pmnist/1", seed=1, n_samples=[300], ACC=92)
    write(models, "reference/pmnist/2", seed=2, n_samples=[300, 300, 300], ACC=94)
    threads = [origin(device=CPU | {"threads": 2})]
    write(models, "reference/pmnist/3", seed=3, origins=threads, ACC=93)
    row = rows(run_report(capsys, models), "Reference", "Permuted")[0]
    assert row["Here: ACC / BWT"] == "93.00 ± 1.00 / -3.00 (3 seeds)"
    assert row["Time per run"] == "60 s (CPU, 1 or 2 threads)"


@pytest.mark.parametrize(
    "other",
    [
        {"origins": [origin(device=GPU)]},
        {"origins": [origin(device=CPU), origin(device=GPU)]},
        {"widths": {"layer0": 784, "layer1": 100, "other": 100}},
        {"data": data_of("pmnist", tests={"mnist": 9_000})},
    ],
    ids=["GPU", "both", "widths", "test images"],
)
def test_what_is_not_averaged(models, capsys, other):
    write(models, "pmnist/1", seed=1)
    content = results(seed=2) | other
    content["ranks"] = [dict.fromkeys(content["widths"], 1)] * 10
    write(models, "pmnist/2", content)
    found = column(run_report(capsys, models), "Trained here", "Here: ACC / BWT")
    assert found == ["90.00 / -3.00 (1 seed)"] * 2


# Files of the first form --------------------------------------------------------------------------
def first_form(benchmark, commit, dirty=False, **more):
    """A results.json without format: zeros above the diagonal, a commit in place of the code."""
    content = results(benchmark, **more)
    for key in "format", "benchmark", "script":
        del content[key]
    acc = content["accuracy_matrix"]
    content["accuracy_matrix"] = [[0.0 if a is None else a for a in row] for row in acc]
    content["origins"] = [{"commit": commit.ljust(40, "0"), "dirty": dirty, "device": CPU}]
    return content


def test_first_form_is_averaged_by_commit(models, capsys):
    for seed, commit in (1, "1111111"), (2, "1111111"), (3, "2222222"):
        content = first_form("pmnist", commit, seed=seed, ACC=90 + seed)
        write(models, f"reference/pmnist/{seed}", content)
    content = first_form("pmnist", "1111111", dirty=True, seed=4)
    write(models, "reference/pmnist/4", content)
    text = run_report(capsys, models)
    found = column(text, "Reference", "Here: ACC / BWT", "Permuted")
    assert found == ["91.50 ± 0.71 / -3.00 (2 seeds)", "93.00 / -3.00 (1 seed)"]
    assert "`reference/pmnist/4`: code that was not committed" in text
    assert column(text, "Accuracy on the first task", "Lowest") == ["91.50"]


def test_commits_shown_to_be_equal_are_averaged(models, capsys):
    for seed, commit in enumerate(report.EQUAL_COMMITS[:2]):
        write(models, f"reference/pmnist/{seed}", first_form("pmnist", commit, seed=seed))
    found = column(run_report(capsys, models), "Reference", "Here: ACC / BWT", "Permuted")
    assert found == ["90.00 ± 0.00 / -3.00 (2 seeds)"]


def test_fixed_validation_batches_are_another_protocol(models, capsys):
    write(models, "reference/cifar100/1", first_form("cifar100", "1111111"))
    text = run_report(capsys, models)
    assert column(text, "Reference", "Here: ACC / BWT", "10-split") == ["not measured yet"]
    assert column(text, "Other settings", "Not as published") == ["fixed validation batches"]


def test_the_results_of_the_repository_can_be_read():
    reference = report.collect(SCRIPT.parent / "reference", prefix="reference/")
    assert len(reference.runs) >= 15
    assert not [note for note in reference.notes if "cannot be read" in note]
    assert not [run.place for run in reference.runs if "edited code" in " ".join(run.differences)]


# The user's own runs ------------------------------------------------------------------------------
def write_reference(models):
    """Three runs of PMNIST: mean 93.6, standard deviation 0.4583."""
    for seed, ACC in (2, 93.2), (3, 93.5), (4, 94.1):
        write(models, f"reference/pmnist/seed_{seed}", ACC=ACC, seed=seed)


def test_a_single_run_is_judged_by_the_reference(models, capsys):
    """t of 2 degrees of freedom is 4.303: 93.6 ± 4.303 * 0.4583 * sqrt(1 + 1/3) = 93.6 ± 2.28."""
    write_reference(models)
    folder = write(models, "pmnist/seed_2", ACC=93.0)
    text = run_report(capsys, models)
    row = rows(text, "Trained here")[0]
    assert row["Paper: ACC / BWT"] == "93.91 ± 0.16 / -3"
    assert row["Reference"] == "93.60 ± 0.46 / -3.00 (3 seeds)"
    assert row["Here: ACC / BWT"] == "93.00 / -3.00 (1 seed)"
    assert row["Difference"] == "-0.91"
    assert row["Within tolerance"] == "fewer than 3 seeds"
    assert "ACC 93.00 agrees with the reference (expected 91.3 to 95.9)." in text
    shutil.rmtree(folder)
    write(models, "pmnist/seed_2", ACC=91.3)
    assert "ACC 91.30 differs from the reference (expected 91.3" in run_report(capsys, models)


def test_two_runs_are_judged_by_their_mean(models, capsys):
    """93.6 ± 4.303 * 0.4583 * sqrt(1/2 + 1/3) = 93.6 ± 1.80."""
    write_reference(models)
    for seed, ACC in (2, 91.5), (3, 92.5):
        write(models, f"pmnist/seed_{seed}", ACC=ACC, seed=seed)
    text = run_report(capsys, models)
    assert "ACC 92.00 agrees with the reference (expected 91.8 to 95.4)." in text


def test_a_reference_of_two_runs_judges_nothing(models, capsys):
    for seed in 2, 3:
        write(models, f"reference/pmnist/{seed}", seed=seed, ACC=90 + seed)
    write(models, "pmnist/seed_2", ACC=93.0)
    assert "cannot be judged by fewer than 3 runs" in run_report(capsys, models)


def mine(seed, ACC, **more):
    """A result of a method of one's own on PMNIST."""
    return results(script="main_pmnist_mine", seed=seed, ACC=ACC, **more)


def test_a_method_of_ones_own_beside_the_reference(models, capsys):
    """94 - 93.2 = 0.8 and 93.9 - 93.5 = 0.4: mean 0.6, deviation 0.283. No reference for seed 9."""
    write_reference(models)
    for seed, ACC in (2, 94.0), (3, 93.9), (9, 10.0):
        write(models, f"pmnist_mine/seed_{seed}", mine(seed, ACC))
    text = run_report(capsys, models)
    assert not rows(text, "Trained here") and not rows(text, "Other settings")
    row = rows(text, "Own methods")[0]
    assert row["Method"] == "`pmnist_mine`" and row["Benchmark"] == "Permuted MNIST"
    assert row["Here: ACC / BWT"].endswith("(3 seeds)")
    assert row["GPM, same seeds"] == "93.35 ± 0.21 / -3.00 (2 seeds), reference"
    assert row["Difference"] == "+0.60 ± 0.28"


def test_a_method_of_ones_own_beside_own_runs_of_gpm(models, capsys):
    write_reference(models)
    write(models, "pmnist/seed_2", ACC=93.7)
    write(models, "pmnist_mine/seed_2", mine(2, 93.0, changed={"alpha": 2}))
    row = rows(run_report(capsys, models), "Own methods")[0]
    assert row["GPM, same seeds"] == "93.70 / -3.00 (1 seed), trained here"
    assert row["Difference"] == "-0.70"
    assert "alpha" in row["Not as published"]


def test_a_method_with_changed_flags_beside_gpm_with_the_same(models, capsys):
    """93.0 - 70.0, and not 93.0 less the ACC of runs with other flags or of edited code."""
    write_reference(models)
    write(models, "pmnist/seed_2", ACC=91.0)
    write(models, "pmnist/seed_2_lr", ACC=70.0, lr=0.02)
    write(models, "pmnist/edited", ACC=60.0, lr=0.02, origins=[origin(EDITED)])
    write(models, "pmnist_mine/seed_2_lr", mine(2, 93.0, lr=0.02))
    row = rows(run_report(capsys, models), "Own methods")[0]
    assert row["GPM, same seeds"] == "70.00 / -3.00 (1 seed), trained here"
    assert row["Difference"] == "+23.00"


def test_a_method_without_gpm_of_the_same_seeds(models, capsys):
    write(models, "pmnist_mine/seed_2", mine(2, 93.0))
    row = rows(run_report(capsys, models), "Own methods")[0]
    assert (
        row["GPM, same seeds"] == "no run with these flags and seeds" and row["Difference"] == "-"
    )


def test_a_method_of_ones_own_has_other_code(models, capsys):
    """It is compared with GPM as published, not with runs of an edited main_pmnist.py."""
    write(models, "pmnist/seed_2", origins=[origin(EDITED)])
    write(models, "pmnist_mine/seed_2", mine(2, 93.0, origins=[origin(EDITED, dirty=True)]))
    text = run_report(capsys, models)
    row = rows(text, "Own methods")[0]
    assert row["Not as published"] == "-" and row["Benchmark"] == "Permuted MNIST"
    assert row["GPM, same seeds"] == "no run with these flags and seeds"
    assert "- Permuted MNIST: the code was not committed." in text


# What does not count ------------------------------------------------------------------------------
def test_missing_test_images_are_told(models, capsys):
    """notMNIST's official number is known to 1 % only."""
    data = data_of("five_datasets", tests={"svhn": 16_419, "notmnist": 1_860})
    write(models, "reference/five_datasets/1", official_data=True, data=data)
    text = run_report(capsys, models)
    assert rows(text, "Reference", "5-Datasets, `")[0]["Difference"] == "-1.22"
    assert "of the test images svhn 16,419 of 26,032." in text


def test_missing_training_images_do_not_count(models, capsys):
    data = data_of("five_datasets", partial=["svhn", "notmnist"])
    write(models, "five_datasets/1", official_data=True, data=data)
    text = run_report(capsys, models)
    assert not rows(text, "Trained here")
    assert "- `five_datasets/1`: training images are missing (notmnist, svhn); 5 of 5" in text


def test_unfinished_runs_are_listed_apart(models, capsys):
    write(models, "reference/five_datasets/37", done=4, BWT=0.0, seconds=36_000)
    write(models, "pmnist/4", done=0)
    text = run_report(capsys, models)
    assert text.split("### Unfinished\n\n")[1].splitlines()[:2] == [
        "- `reference/five_datasets/37`: 4 of 5 tasks, ACC 90.00, BWT 0.00, 10.0 h",
        "- `pmnist/4`: 0 of 10 tasks, 60 s",
    ]
    assert not rows(text, "Trained here") and "Not counted" not in text


def test_what_does_not_count_is_named(models, capsys):
    write(models, "pmnist/2", ACC=93)
    write(models, "pmnist/2_again")
    write(models, "quick/pmnist/5", results(seed=5))
    write(models, "sixth/1", results() | {"benchmark": "sixth", "script": "main_sixth"})
    text = run_report(capsys, models)
    found = column(text, "Trained here", "Here: ACC / BWT")
    assert found == ["93.00 / -3.00 (1 seed)"]
    end = "; 10 of 10 tasks, ACC 90.00, BWT -3.00, 60 s"
    assert text.split("### Not counted\n\n")[1].splitlines() == [
        f"- `pmnist/2_again`: a seed that was counted already{end}",
        f"- `quick/pmnist/5`: a quick run{end}",
        f"- `sixth/1`: not one of the paper's benchmarks{end}",
    ]


def test_a_folder_of_quick_runs(models, capsys):
    write(models, "quick/pmnist/2", results())
    folders = ["--models_dir", models / "quick", "--reference", models / "reference"]
    report.main(report.parse_args(list(map(str, folders))))
    assert "- `pmnist/2`: a quick run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"args": {',
        "[" * 100_000,
        "[1, 2]",
        "{}",
        {"format": 3},
        {"ACC": 99.0},
        {"BWT": 0.0},
        {"ACC": None},
        {"finished": False},
        {"accuracy_matrix": [[9.0], []]},
        {"accuracy_matrix": [[9.0, 0.0]] * 10},
        {"accuracy_matrix": [[None] * 10] * 10},
        {"accuracy_matrix": [[101.0] * 10] * 10, "ACC": 101.0, "BWT": 0.0},
        {"ranks": []},
        {"ranks": [{"other": 1}] * 10},
        {"memory": []},
        {"memory": [None] * 10},
        {"seconds": None},
        {"origins": []},
        {"origins": [{}]},
        {"data": {"a": {}}},
        {"args": {"seed": [], "n_tasks": 10}},
        {"args": {"seed": 2, "n_tasks": 3}},
    ],
    ids=lambda content: str(content)[:40],
)
def test_a_file_that_is_no_result_is_named_and_skipped(models, capsys, content):
    write(models, "pmnist/2", ACC=93.9)
    text = content if isinstance(content, str) else json.dumps(results(seed=3) | content)
    (write(models, "pmnist/3", figure=False) / "results.json").write_text(text)
    text = run_report(capsys, models)
    assert column(text, "Trained here", "Here: ACC / BWT") == ["93.90 / -3.00 (1 seed)"]
    assert text.splitlines()[-1].startswith("- `pmnist/3/results.json` cannot be read (")


# The sweep ----------------------------------------------------------------------------------------
def write_sweep(models):
    """Two values of eps with two seeds each, one of n_s, and three runs that are of no sweep."""
    sweep = "reference/sweep/pmnist"
    for name, eps in ("a", 0.9), ("b", 0.5):  # not in order of eps
        for seed in 1, 2:
            flags = {"threshold": [eps] * 3, "seed": seed, "ACC": 100 * eps + seed}
            write(models, f"{sweep}/{name}_{seed}", results(**flags))
    write(models, f"{sweep}/n_10", results(n_samples=[10], ACC=80))
    write(models, f"{sweep}/both", results(n_samples=[10], threshold=[0.7]))
    write(models, f"{sweep}/edited", results(threshold=[0.7], origins=[origin(EDITED)]))
    write(models, f"{sweep}/mine", mine(1, 80.0, threshold=[0.7]))


def test_the_sweep_has_tables_of_its_own(models, capsys):
    write_sweep(models)
    text = run_report(capsys, models)
    assert not rows(text, "Other settings")
    assert column(text, "Reference", "Here: ACC / BWT", "Permuted") == ["not measured yet"]
    found = rows(text, "Permuted MNIST with other eps")
    assert [(row["eps"], row["Here: ACC / BWT"]) for row in found] == [
        ("0.5", "51.50 ± 0.71 / -3.00 (2 seeds)"),
        ("0.9", "91.50 ± 0.71 / -3.00 (2 seeds)"),
    ]
    found = rows(text, "Permuted MNIST with other n_s")
    assert [(row["n_s"], row["Here: ACC / BWT"]) for row in found] == [
        ("10", "80.00 / -3.00 (1 seed)")
    ]


def test_figure_of_the_sweep(models):
    write_sweep(models)
    reference = report.collect(models / "reference", prefix="reference/")
    ACC, BWT, memory, images = report.draw_sweep(reference).axes
    assert ACC.lines[0].get_ydata() == pytest.approx([51.5, 91.5])
    assert BWT.lines[0].get_ydata() == pytest.approx([-3, -3])
    assert memory.lines[0].get_ydata() == pytest.approx([50, 50])
    assert images.lines[0].get_ydata() == pytest.approx([80])
    assert [label.get_text() for label in ACC.get_xticklabels()] == ["0.5", "0.9"]


# CSV and LaTeX ------------------------------------------------------------------------------------
def test_csv_has_each_accuracy_of_the_runs_that_count(models, capsys):
    write(models, "reference/pmnist/2", ACC=93)
    write(models, "pmnist/3", results(seed=3, lr=0.02, n_samples=[1, 2, 3]))
    write(models, "pmnist/4", done=4, BWT=0.0)
    write(models, "quick/pmnist/2", results())
    write(models, "cifar100_superclass/a", t_order=4)
    lines = list(csv.DictReader(io.StringIO(run_report(capsys, models, "--csv"))))
    assert len(lines) == 55 + 55 + 210
    first = [line for line in lines if line["run"] == "reference/pmnist/2"]
    assert first[1] == {
        "benchmark": "pmnist",
        "script": "main_pmnist",
        "run": "reference/pmnist/2",
        "seed": "2",
        "order": "",
        "setting": "as published",
        "trained_task": "2",
        "tested_task": "1",
        "accuracy": "93",
        "code": CODE,
    }
    curve = [float(line["accuracy"]) for line in first if line["tested_task"] == "4"]
    assert curve == [96] + [93] * 6
    settings = {line["run"]: line["setting"] for line in lines}
    assert settings["pmnist/3"] == "--lr 0.02 --n_samples 1 2 3"
    assert {line["order"] for line in lines} == {"", "4"}


def test_latex_text_is_escaped():
    text = r"`--official_data` 50 % of A&B, 93.5 ± 0.1 / -3.42, Fashion-MNIST \ {x} #1 $ ~ ^"
    assert report.latex_text(text) == (
        r"\texttt{-{}-official\_data} 50 \% of A\&B, 93.5 $\pm$ 0.1 / $-$3.42, Fashion-MNIST "
        r"\textbackslash{} \{x\} \#1 \$ \textasciitilde{} \textasciicircum{}"
    )
    assert report.latex_text("-") == "--"


def test_latex_table(models, capsys):
    write_reference(models)
    write(models, "pmnist_mine/2", mine(2, 94.0))
    text = run_report(capsys, models, "--latex", "--all")
    tables = text.split(r"\begin{tabular}")[1:]
    assert len(tables) == text.count(r"\end{tabular}") == 4
    for table in tables:
        columns = table[1 : table.index("}")]
        cells = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert {line.count(" & ") for line in cells} == {len(columns) - 1}
        assert table.index(r"\toprule") < table.index(r"\midrule") < table.index(r"\bottomrule")
    assert r"\texttt{pmnist\_mine} & Permuted MNIST & -- & 94.00 / $-$3.00 (1 seed)" in text
    assert r"ER\_Res & 87.24 $\pm$ 0.53 / $-$11 &" in text


# Figures ------------------------------------------------------------------------------------------
def collections(models):
    """What was trained here, and the reference."""
    reference = models / "reference"
    own = report.collect(models, without=reference)
    return own, report.collect(reference, prefix="reference/")


def test_figure_of_the_results(models):
    """A panel for each measured row: with and without projection, and the paper's point."""
    for seed in 1, 2:
        write(models, f"reference/pmnist/{seed}", ACC=90 + 2 * seed, BWT=-4.0, seed=seed)
        write(models, f"reference/pmnist/lr_{seed}", lr=0.02, ACC=70, seed=seed)
    write(models, "reference/pmnist/0", results(ACC=50, BWT=-45, threshold=[0.0]))
    for seed in 1, 2, 3:  # in no panel
        edited = {"seed": seed, "origins": [origin(EDITED)]}
        write(models, f"pmnist/gpm_{seed}", results(**edited))
        write(models, f"pmnist/without_{seed}", results(threshold=[0.0], **edited))
    write(models, "cifar100_superclass/a", ACC=60)
    write(models, "pmnist_mine/2", mine(2, 95.0))
    pmnist, superclass = report.draw_results(*collections(models)).axes
    curves = {line.get_label(): line.get_ydata() for line in pmnist.lines[:3]}
    # After 5 of 10 tasks four are at their end and the fifth is 4 (or 45) above it.
    assert curves["GPM"][[0, 4, 9]] == pytest.approx([97, 93 + 4 / 5, 93])
    assert curves["without projection"][[0, 4, 9]] == pytest.approx([95, 50 + 45 / 5, 50])
    assert curves["pmnist_mine"][9] == pytest.approx(95)
    assert [text.get_text() for text in pmnist.texts] == ["50.0", "93.0"]
    assert "GPM, trained here" not in pmnist.get_legend_handles_labels()[1]
    (paper,) = [c for c in pmnist.containers if c.get_label() == "GPM, paper"]
    assert [paper.lines[0].get_xdata()[0], paper.lines[0].get_ydata()[0]] == [10, 93.91]
    assert [line.get_label() for line in superclass.lines] == ["GPM, trained here"]
    assert superclass.get_title() == "CIFAR-100 Superclass, correct images"


@pytest.mark.parametrize("form", [1, 2])
def test_figure_of_a_run(models, form):
    contents = first_form("five_datasets", "1111111", ACC=90, BWT=-5.0)
    if form == 2:
        contents = results("five_datasets", ACC=90, BWT=-5.0)
    write(models, "five_datasets/1", contents)
    own, _ = collections(models)
    image, means, ranks, _ = report.draw_run(own.runs[0]).axes
    shown = image.images[0].get_array().filled(-1)
    assert shown[1].tolist() == [90, 95, -1, -1, -1] and shown[4].tolist() == [90] * 5
    assert means.lines[0].get_ydata() == pytest.approx([95, 92.5, 90 + 5 / 3, 91.25, 90])
    assert ranks.lines[0].get_ydata()[4] == pytest.approx(100 * 5 / 27)


def test_each_run_is_drawn_once(models, capsys, monkeypatch):
    saved = []
    monkeypatch.setattr(report, "draw_run", lambda run: run)

    def save(run, path):
        path.write_bytes(b"new")
        saved.append(run.place)

    monkeypatch.setattr(report, "save_figure", save)
    folder = write(models, "pmnist/2", figure=False)
    write(models, "pmnist/3", seed=3, done=3, BWT=0.0, figure=False)
    write(models, "reference/pmnist/4", seed=4, figure=False)
    write(models, "quick/pmnist/5", results(), figure=False)
    run_report(capsys, models)
    run_report(capsys, models)
    assert saved == ["pmnist/2", "quick/pmnist/5"]
    figure = (folder / "accuracy.png").stat()
    later = (figure.st_atime + 10, figure.st_mtime + 10)
    (folder / "results.json").touch()
    os.utime(folder / "results.json", later)
    run_report(capsys, models)
    assert saved[2:] == ["pmnist/2"]


def test_figures_that_cannot_be_written(models, capsys):
    """Those of runs are a pity, the one that was asked for is an error; all else comes anyway."""
    (write(models, "pmnist/5", seed=5, figure=False) / "accuracy.png.part").mkdir()
    folder = write(models, "pmnist/6", seed=6, figure=False)
    run_report(capsys, models)
    refused = models / "refused.svg"
    refused.mkdir()
    with pytest.raises(SystemExit, match="2"):
        run_report(capsys, models, "--figure", refused)
    out, err = capsys.readouterr()
    assert "(2 seeds)" in out
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert err.count("\n") == err.count(": cannot write ") == 2
    assert not refused.with_name("refused.svg.part").exists()


@pytest.mark.parametrize("suffix, start", [(".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_any_suffix_of_matplotlib(models, capsys, suffix, start):
    write(models, "reference/five_datasets/1")
    figure = models / f"figure{suffix}"
    run_report(capsys, models, "--figure", figure)
    assert figure.read_bytes().startswith(start)
    assert not list(models.glob("*.part"))


# What belongs to the repository -------------------------------------------------------------------
def test_git_keeps_the_results_of_the_reference_only():
    ignored = [
        "models/pmnist/seed_2/results.json",
        "models/pmnist_mine/seed_2/accuracy.png",
        "models/quick/pmnist/seed_2/results.json",
        "models/logs/main_pmnist.txt",
        "models/reference/pmnist/seed_2/checkpoint.pt",
        "models/reference/pmnist/seed_2/lock",
    ]
    kept = [
        "models/report.py",
        "models/reference/results.png",
        "models/reference/pmnist/seed_99/results.json",
        "models/reference/sweep/pmnist/seed_99/results.json",
    ]
    command = ["git", "check-ignore", "--no-index", *ignored, *kept]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout.split() == ignored


# As a program -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags",
    [
        "--models_dir no",
        "--reference no",
        "--figure a.txt",
        "--figure a",
        "--figure no/a.png",
        "--sweep a.txt",
        "--figure",
        "--csv --latex",
        "--best",
        "a",
    ],
)
def test_bad_flags_end_in_one_line(capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        report.parse_args(flags.split())
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("report.py: error: ") and err.count("\n") == 1


def test_as_a_program(models):
    """A reader that stops early, then a stream that cannot show ±."""
    write_reference(models)
    folders = ["--models_dir", models, "--reference", models / "reference"]
    command = [sys.executable, "-E", SCRIPT, *folders]  # -E: output is buffered
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == b"" and process.wait() == 0
    command = ["env", "PYTHONIOENCODING=ascii", sys.executable, SCRIPT, *folders]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert b"93.60 ? 0.46" in done.stdout


def load_script(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaders():
    """The data loaders that are imported, {name: module}."""
    return {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == "dataloader"}


@pytest.fixture
def fresh_loaders():
    """No loader is imported, as in a new process: the digest of a script includes all that are."""
    before = loaders()
    for name in before:
        del sys.modules[name]
    yield
    for name in loaders():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("benchmark", report.BENCHMARKS)
def test_the_scripts_are_the_published_code(benchmark, fresh_loaders):
    name = f"main_{benchmark}"
    script = load_script(ROOT / f"{name}.py")
    digest = script.digest_of_code()
    message = (
        f"{name}.py or its loaders were changed: their digest is now {digest}. If the numbers of "
        "the method are unchanged, write it into the script's docstring and add it to "
        "PUBLISHED_CODE in models/report.py; else measure anew."
    )
    assert digest in report.PUBLISHED_CODE[name], message
    assert f"code        {digest}," in script.__doc__, message


def test_results_of_the_scripts(tmp_path, models):
    """A run of main_pmnist.py and one of a copy of it, as a user would make one."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in ("train", 400), ("test", 64):
        arrays[f"x_{part}"] = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % 10
    np.savez(tmp_path / "mnist.npz", **arrays)
    copy = tmp_path / "main_pmnist_mine.py"
    shutil.copy(ROOT / "main_pmnist.py", copy)
    flags = f"--n_tasks 2 --n_epochs 1 --data_dir {tmp_path} --models_dir {models} --device cpu"
    for path in ROOT / "main_pmnist.py", copy:
        script = load_script(path)
        script.main(script.parse_args(flags.split()))
    own, _ = collections(models)
    assert [(run.script, run.own, run.finished) for run in own.runs] == [
        ("main_pmnist", False, True),
        ("main_pmnist_mine", True, True),
    ]
    for run in own.runs:
        assert run.differences[:2] == ["--n_epochs 1", "--n_tasks 2"] and run.partial == ["mnist"]
        assert run.place.split("/")[0] == run.script.removeprefix("main_")
    assert own.runs[0].code == own.runs[1].code
