"""The report: numbers worked by hand, what is averaged with what, and what it does with files that are no results."""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("report", ROOT / "models" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

CPU = {"type": "cpu", "name": "x86_64", "threads": 2}
GPU = {"type": "cuda", "name": "NVIDIA H200", "threads": 8}
SEEDS = {"pmnist": 2, "cifar100": 1, "cifar100_superclass": 1, "five_datasets": 37}
WIDTHS = {"pmnist": {"fc1": 784, "fc2": 100, "fc3": 100}, "cifar100": {"conv1": 48, "fc1": 1024}, "cifar100_superclass": {"conv1": 75},
          "five_datasets": {f"layer{i}": 20 * i for i in range(1, 21)}}


def write_run(models, benchmark, name, ACC=90.0, BWT=-3.0, tasks=None, device=CPU, seconds=60.0, memory=69.0, incomplete=(), more=None, **args):
    """Write the results.json that a run of the benchmark's script leaves, with the ACC and BWT that are asked for.

    tasks: how many are done, all by default. incomplete: data sets that lack images. args: flags that are not the defaults.
    """
    args = {"seed": SEEDS[benchmark], **report.PUBLISHED[benchmark], "device": "auto", "data_dir": "data", "models_dir": str(models),
            "run_name": name, "overwrite": False, "evaluate": False, **args}
    if benchmark == "cifar100_superclass":
        args = {"t_order": 0, **args}
    if benchmark in ("cifar100_superclass", "five_datasets"):
        args = {"official_data": False, **args}
    T = tasks or args["n_tasks"]
    acc = np.tril(np.full((T, T), ACC))
    np.fill_diagonal(acc, ACC - BWT)
    acc[-1] = ACC  # every task falls by -BWT from what it was right after training
    sets = ["cifar10", "mnist", "svhn", "mnist", "notmnist"] if benchmark == "five_datasets" else ["cifar100"] * args["n_tasks"]
    widths = WIDTHS[benchmark]
    results = {
        "args": args, "commit": "0" * 40, "dirty": False, "versions": {"python": "3.11", "torch": "2.6", "numpy": "2.0"}, "device": device,
        "data": [{"task": f"task {t}", "train": 4750, "valid": 250, "test": 1000, "set": s, "source": "here", "complete": s not in incomplete}
                 for t, s in enumerate(sets)],
        "widths": widths, "accuracy_matrix": acc.tolist(), "ACC": float(ACC), "BWT": float(BWT) if T > 1 else 0.0,
        "ranks": [{layer: int(d * (t + 1) / (T + 1)) for layer, d in widths.items()} for t in range(T)],
        "memory": [{"floats": 1000 * (t + 1), "percent_of_max": memory * (t + 1) / T} for t in range(T)],
        "epochs": [5] * T, "finished": T == args["n_tasks"],
        "seconds": {"data": 0.0, "training": seconds - 10, "evaluation": 5.0, "bases": 4.0, "saving": 1.0}, **(more or {})}
    folder = models / benchmark / name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    return folder / "results.json"


def run_report(capsys, models, *flags):
    """What the report prints."""
    report.main(report.parse_args(["--models_dir", str(models), *map(str, flags)]))
    return capsys.readouterr().out


def rows(text, label):
    """Cells of the rows of all printed tables whose first cell starts with the label."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {label}")]


def test_every_row_appears_without_any_result(tmp_path, capsys):
    text = run_report(capsys, tmp_path)
    table = text.split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(report.VARIANTS)
    assert all("| not measured yet |" in re.sub(" +", " ", line) for line in table[2:])
    assert rows(text, "Permuted MNIST")[0][1] == "93.91 ± 0.16 / -3"
    assert rows(text, "10-split CIFAR-100")[0][1] == "72.48 ± 0.40 / -0.9"
    assert rows(text, "CIFAR-100 Superclass, `--off")[0][1] == "57.72 / not given"
    assert rows(text, "CIFAR-100 Superclass, correct")[0][1] == rows(text, "5-Datasets, with")[0][1] == "-"
    assert rows(text, "5-Datasets, `--off")[0][1] == "91.22 ± 0.20 / -1"
    assert "###" not in text


def test_mean_over_seeds(tmp_path, capsys):
    for seed, ACC, BWT, seconds, memory in (2, 93.2, -3.5, 60, 69), (3, 93.5, -3.3, 70, 69.3), (4, 94.1, -3.1, 80, 69.6):
        write_run(tmp_path, "pmnist", f"seed_{seed}", ACC, BWT, seed=seed, seconds=seconds, memory=memory)
    # Mean 93.6; deviations -0.4, -0.1, 0.5: variance (0.16 + 0.01 + 0.25) / 2 = 0.21, standard deviation 0.458.
    [row] = rows(run_report(capsys, tmp_path), "Permuted MNIST")
    assert row == ["Permuted MNIST", "93.91 ± 0.16 / -3", "93.60 ± 0.46 / -3.30 (3 seeds)", "-0.31", "yes", "complete",
                   "70 s (CPU x86_64, 2 threads)", "69.3 %"]


def test_one_run_has_no_deviation(tmp_path, capsys):
    write_run(tmp_path, "cifar100", "seed_1", 72.5, -1, device=GPU, seconds=150)
    [row] = rows(run_report(capsys, tmp_path), "10-split")
    assert row[2:7] == ["72.50 / -1.00 (1 seed)", "+0.02", "fewer than 3 runs", "complete", "2 min (NVIDIA H200)"]


@pytest.mark.parametrize("benchmark, ACC, BWT, expected", [
    ("pmnist", 93.3, -3, "yes"), ("pmnist", 94.5, -3, "yes"), ("pmnist", 93.29, -3, "no"), ("pmnist", 94.51, -3, "no"),
    ("pmnist", 93.9, -4.6, "no"), ("pmnist", 93.9, -1.9, "no"), ("pmnist", 93.9, -2.1, "yes"), ("pmnist", 93.9, -4.4, "yes"),
    ("cifar100", 71.3, -0.5, "yes"), ("cifar100", 73.7, 0.5, "yes"), ("cifar100", 71.29, -0.5, "no"), ("cifar100", 72.5, -2, "no"),
    ("five_datasets", 90.2, -9, "yes"), ("five_datasets", 92.21, -1, "no")])
def test_band(tmp_path, capsys, benchmark, ACC, BWT, expected):
    official = {"official_data": True} if benchmark == "five_datasets" else {}
    for seed in range(3):
        write_run(tmp_path, benchmark, f"seed_{seed}", ACC, BWT, seed=seed, **official)
    [row] = [row for row in rows(run_report(capsys, tmp_path), "") if "3 seeds" in row[2]]
    assert row[4] == expected


def test_superclass_is_judged_by_all_orders(tmp_path, capsys):
    for order, ACC in enumerate((56, 57, 58, 59)):
        write_run(tmp_path, "cifar100_superclass", f"seed_1_order_{order}", ACC, t_order=order, official_data=True)
    write_run(tmp_path, "cifar100_superclass", "seed_2_order_3", 61, t_order=3, seed=2, official_data=True)
    row, _ = rows(run_report(capsys, tmp_path), "CIFAR-100 Superclass")
    # Order 3 counts once, with (59 + 61) / 2 = 60: mean 57.75, deviations -1.75, -0.75, 0.25, 2.25, variance 8.75 / 3.
    assert row[2:5] == ["57.75 ± 1.71 / -3.00 (4 orders, 5 runs)", "+0.03", "fewer than 5 orders"]
    write_run(tmp_path, "cifar100_superclass", "seed_1_order_4", 57.75, t_order=4, official_data=True)
    row, other = rows(run_report(capsys, tmp_path), "CIFAR-100 Superclass")
    assert row[2:5] == ["57.75 ± 1.48 / -3.00 (5 orders, 6 runs)", "+0.03", "yes"]
    assert other[2] == "not measured yet"


def test_data_of_the_released_code_is_a_row_of_its_own(tmp_path, capsys):
    write_run(tmp_path, "cifar100_superclass", "seed_1_order_0", 65)
    write_run(tmp_path, "cifar100_superclass", "seed_1_order_0_official_data", 58, official_data=True)
    official, correct = rows(run_report(capsys, tmp_path), "CIFAR-100 Superclass")
    assert official[2:5] == ["58.00 / -3.00 (1 order)", "+0.28", "fewer than 5 orders"]
    assert correct[1:5] == ["-", "65.00 / -3.00 (1 order)", "-", "n/a (other data)"]


def test_partial_data_stay_apart(tmp_path, capsys):
    for seed in 1, 2, 3:
        write_run(tmp_path, "five_datasets", f"seed_{seed}", 88, official_data=True, seed=seed, incomplete=("svhn", "notmnist"))
    write_run(tmp_path, "five_datasets", "seed_4", 80, official_data=True, seed=4, incomplete=("svhn",))
    nothing, *partial = rows(run_report(capsys, tmp_path), "5-Datasets, `--off")
    assert nothing[1:3] == ["91.22 ± 0.20 / -1", "not measured yet"]
    assert [row[1:6] for row in partial] == [
        ["-", "88.00 ± 0.00 / -3.00 (3 seeds)", "-", "n/a (partial data)", "partial: notmnist, svhn"],
        ["-", "80.00 / -3.00 (1 seed)", "-", "n/a (partial data)", "partial: svhn"]]
    write_run(tmp_path, "five_datasets", "seed_5", 91, official_data=True, seed=5)
    complete, *partial = rows(run_report(capsys, tmp_path), "5-Datasets, `--off")
    assert complete[2:6] == ["91.00 / -3.00 (1 seed)", "-0.22", "fewer than 3 runs", "complete"] and len(partial) == 2


def test_modified_code_is_not_averaged_in(tmp_path, capsys):
    write_run(tmp_path, "pmnist", "seed_2", 93, seed=2)
    write_run(tmp_path, "pmnist", "seed_3", 94, seed=3, more={"dirty": True})
    write_run(tmp_path, "pmnist", "seed_4", 95, seed=4, more={"resumed_with": [{"device": CPU, "dirty": True}]})
    write_run(tmp_path, "pmnist", "seed_5", 96, seed=5, more={"commit": None, "dirty": None})  # not a git checkout
    assert [(row[0], row[2], row[4]) for row in rows(run_report(capsys, tmp_path), "Permuted MNIST")] == [
        ("Permuted MNIST", "94.50 ± 2.12 / -3.00 (2 seeds)", "fewer than 3 runs"),
        ("Permuted MNIST, modified code", "94.50 ± 0.71 / -3.00 (2 seeds)", "n/a (modified code)")]


def test_results_that_were_not_trained_here_are_named(tmp_path, capsys):
    for seed in 2, 3, 4:
        write_run(tmp_path, "pmnist", f"seed_{seed}", seed=seed)
    (tmp_path / "pmnist" / "seed_3" / "checkpoint.pt").touch()
    assert "beside them: `pmnist/seed_2`, `pmnist/seed_4`." in run_report(capsys, tmp_path)
    for seed in 2, 4:
        (tmp_path / "pmnist" / f"seed_{seed}" / "checkpoint.pt").touch()
    assert "Not trained here" not in run_report(capsys, tmp_path)


def test_kinds_of_device_are_not_averaged(tmp_path, capsys):
    write_run(tmp_path, "pmnist", "seed_2", 93, seed=2, device=CPU)
    write_run(tmp_path, "pmnist", "seed_3", 94, seed=3, device=CPU | {"threads": 1})
    write_run(tmp_path, "pmnist", "seed_4", 95, seed=4, device=GPU)
    write_run(tmp_path, "pmnist", "seed_5", 96, seed=5, device=CPU, more={"resumed_with": [{"device": GPU}, {"device": GPU}]})
    assert [(row[2], row[6]) for row in rows(run_report(capsys, tmp_path), "Permuted MNIST")] == [
        ("93.50 ± 0.71 / -3.00 (2 seeds)", "60 s (CPU x86_64, 1 thread / CPU x86_64, 2 threads)"),
        ("95.00 / -3.00 (1 seed)", "60 s (NVIDIA H200)"),
        ("96.00 / -3.00 (1 seed)", "60 s (CPU x86_64, 2 threads then NVIDIA H200)")]


def test_other_settings_are_never_averaged_in(tmp_path, capsys):
    write_run(tmp_path, "pmnist", "seed_2", 93.9)
    for seed in 2, 3:
        write_run(tmp_path, "pmnist", f"seed_{seed}_lr", 90 + seed, seed=seed, lr=0.1, threshold=[0.9])
    write_run(tmp_path, "pmnist", "other_folders", 93.7, seed=5, device=GPU | {"type": "cpu"}, data_dir="/data", models_dir="/m")
    write_run(tmp_path, "pmnist", "seed_2_tasks_3", 97, n_tasks=3)
    write_run(tmp_path, "pmnist", "unknown_flag", 10, faster=True)
    text = run_report(capsys, tmp_path)
    main, other = text.split("### Other settings")
    [row] = rows(main, "Permuted MNIST")
    assert row[2] == "93.80 ± 0.14 / -3.00 (2 seeds)"
    assert [row[:3] for row in rows(other, "Permuted MNIST")] == [
        ["Permuted MNIST", "`--lr 0.1 --threshold 0.9`", "92.50 ± 0.71 / -3.00 (2 seeds)"],
        ["Permuted MNIST", "`--n_tasks 3`", "97.00 / -3.00 (1 seed)"],
        ["Permuted MNIST", "`--faster`", "10.00 / -3.00 (1 seed)"]]


def test_a_flag_younger_than_the_run_had_its_default(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, "pmnist", "seed_2", 93.9)
    monkeypatch.setitem(report.PUBLISHED["pmnist"], "nesterov", False)
    assert rows(run_report(capsys, tmp_path), "Permuted MNIST")[0][2] == "93.90 / -3.00 (1 seed)"


def test_another_network_is_another_setting(tmp_path, capsys):
    write_run(tmp_path, "cifar100", "seed_1", 72)
    write_run(tmp_path, "cifar100", "seed_2", 74, seed=2, more={"widths": {"conv1": 48}})
    assert [row[2][:5] for row in rows(run_report(capsys, tmp_path), "10-split")] == ["72.00", "74.00"]


def test_quick_unfinished_and_repeated_runs_do_not_count(tmp_path, capsys):
    write_run(tmp_path, "pmnist", "again", 93.0)
    write_run(tmp_path, "pmnist", "seed_2", 94.0)
    write_run(tmp_path, "pmnist", "seed_3", 95.0, seed=3, tasks=4)
    write_run(tmp_path, "pmnist", "seed_4", 80.0, seed=4, tasks=1, lr=0.1)
    write_run(tmp_path, "pmnist", "quick_seed_5", 85.0, seed=5, n_epochs=1)
    write_run(tmp_path, "pmnist", "quick_seed_6", 86.0, seed=6)
    main, notes = run_report(capsys, tmp_path).split("### Not counted")
    assert rows(main, "Permuted MNIST")[0][2] == "93.00 / -3.00 (1 seed)"
    assert "### Other" not in main
    assert notes.strip().splitlines() == [
        "- `pmnist/quick_seed_5`: a quick run, ACC 85.00, BWT -3.00 (`--n_epochs 1`)",
        "- `pmnist/quick_seed_6`: a quick run, ACC 86.00, BWT -3.00",
        "- `pmnist/seed_2`: the setting and seed of `pmnist/again`, which counts, ACC 94.00, BWT -3.00",
        "- `pmnist/seed_3`: unfinished, 4 of 10 tasks, so far ACC 95.00, BWT -3.00",
        "- `pmnist/seed_4`: unfinished, 1 of 10 tasks, so far ACC 80.00, BWT 0.00 (`--lr 0.1`)"]


def test_a_fifth_benchmark_is_named(tmp_path, capsys):
    write_run(tmp_path, "pmnist", "seed_2", 50).parents[1].rename(tmp_path / "fifth")
    text = run_report(capsys, tmp_path)
    assert "- `fifth/seed_2`: not one of the paper's benchmarks, ACC 50.00, BWT -3.00" in text
    assert rows(text, "Permuted MNIST")[0][2] == "not measured yet"


@pytest.mark.parametrize("content, reason", [
    (b"", "JSONDecodeError"), (b'{"args": {', "JSONDecodeError"), (b'{"args": "\xff"}', "UnicodeDecodeError"), (b"[" * 100_000, "RecursionError"),
    (b"[1, 2]", "TypeError"), (b'"text"', "TypeError"), (b"{}", "KeyError: 'args'"), (b'{"args": {"seed": 1}}', "KeyError: 'accuracy_matrix'")])
def test_a_file_that_is_no_result_is_named_and_skipped(tmp_path, capsys, content, reason):
    write_run(tmp_path, "pmnist", "seed_2", 93.9)
    path = write_run(tmp_path, "pmnist", "seed_3", seed=3)
    path.write_bytes(content)
    text = run_report(capsys, tmp_path)
    [note] = [line for line in text.splitlines() if line.startswith("- ")]
    assert note.startswith("- `pmnist/seed_3/results.json`: skipped") and reason in note
    assert rows(text, "Permuted MNIST")[0][2] == "93.90 / -3.00 (1 seed)"


@pytest.mark.parametrize("change", [
    {"ACC": 99.0}, {"BWT": 0.0}, {"ACC": None}, {"finished": False}, {"accuracy_matrix": []}, {"accuracy_matrix": [[90.0, 0.0], [90.0]]},
    {"accuracy_matrix": [[90.0, 0.0]]}, {"accuracy_matrix": [[float("nan")]]}, {"accuracy_matrix": [[90.0]], "ACC": 90.0, "BWT": 0.0},
    {"ranks": []}, {"memory": []}, {"seconds": {"data": None}}, {"device": {"type": []}}, {"data": [{}]}, {"args": {"seed": []}}])
def test_an_inconsistent_result_is_named_and_skipped(tmp_path, capsys, change):
    write_run(tmp_path, "pmnist", "seed_2", more=change)
    text = run_report(capsys, tmp_path)
    assert "- `pmnist/seed_2/results.json`: skipped" in text
    assert rows(text, "Permuted MNIST")[0][2] == "not measured yet"


def test_a_folder_in_place_of_the_file_is_named(tmp_path, capsys):
    (tmp_path / "pmnist" / "seed_2" / "results.json").mkdir(parents=True)
    assert "- `pmnist/seed_2/results.json`: skipped, it cannot be read as a result (Is a directory)" in run_report(capsys, tmp_path)


def test_other_methods_on_request(tmp_path, capsys):
    assert "Multitask" not in run_report(capsys, tmp_path)
    text = run_report(capsys, tmp_path, "--all")
    assert rows(text, "EWC") == [["EWC", "89.97 ± 0.57 / -4", "68.80 ± 0.88 / -2", "", "88.64 ± 0.26 / -4"]]
    [gpm] = rows(text, "GPM")
    assert [cell.removesuffix(" / not given") for cell in (row[1] for row in rows(text, "")[1:]) if cell != "-"][:4] == gpm[1:]


def test_tables_are_markdown(tmp_path, capsys):
    write_run(tmp_path, "pmnist", "seed_2")
    write_run(tmp_path, "pmnist", "seed_2_lr", lr=0.1)
    tables = [block.splitlines() for block in run_report(capsys, tmp_path, "--all").split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
        assert len({len(line) for line in table}) == 1
        assert set(table[1]) == {"|", "-"}


def test_figure(tmp_path, capsys):
    for seed in 2, 3:
        write_run(tmp_path, "pmnist", f"seed_{seed}", 90 + seed, seed=seed)
    write_run(tmp_path, "five_datasets", "seed_37", 88, incomplete=("svhn",), device=GPU)
    path = tmp_path / "figure.png"
    path.write_text("an old figure")
    run_report(capsys, tmp_path, "--figure", path)
    height, width, _ = imread(path).shape
    assert 1000 < width < 2000 and 2 * 300 < height < 2 * 600  # two rows
    assert [p.name for p in tmp_path.glob("figure*")] == ["figure.png"]


def test_figure_shows_the_mean_and_the_spread(tmp_path):
    write_run(tmp_path, "pmnist", "seed_2", 92, -4, seed=2)
    write_run(tmp_path, "pmnist", "seed_3", 94, -4, seed=3)
    [runs], _ = report.collect(tmp_path)
    axes = report.Figure().subplots(1, 3)
    report.draw(report.VARIANTS[0], runs, *axes)
    matrix, means, ranks = axes
    image = matrix.images[0].get_array().filled(-1)
    assert image[9].tolist() == [93] * 10 and image[4, 3:6].tolist() == [93, 97, -1]
    curve, paper = means.lines
    # After task 5 the last of five accuracies is 4 higher than the others, 93.
    assert curve.get_ydata()[[0, 4, 9]] == pytest.approx([97, 93 + 4 / 5, 93])
    assert set(paper.get_ydata()) == {93.91}
    low, high = (bound(means.collections[0].get_paths()[0].vertices[:, 1]) for bound in (np.min, np.max))
    assert (low, high) == pytest.approx((93 - 2**0.5, 97 + 2**0.5))
    assert ranks.lines[0].get_ydata()[-1] == pytest.approx(100 * 712 / 784)


def test_no_figure_without_a_result(tmp_path, capsys):
    write_run(tmp_path, "pmnist", "quick_seed_2")
    assert "figure.png is not written" in run_report(capsys, tmp_path, "--figure", tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_a_figure_that_cannot_be_written_leaves_no_rest(tmp_path, capsys):
    write_run(tmp_path, "pmnist", "seed_2")
    (tmp_path / "figure.png").mkdir()
    with pytest.raises(SystemExit) as end:
        run_report(capsys, tmp_path, "--figure", tmp_path / "figure.png")
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.glob("figure*")] == ["figure.png"]


@pytest.mark.parametrize("flags", [
    ["--models_dir", "nowhere"], ["--figure", "figure.pdf"], ["--figure", "nowhere/figure.png"], ["--figure"], ["--best"], ["models"]])
def test_bad_flags_end_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as end:
        report.parse_args(flags)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("report.py: error: ") and err.count("\n") == 1


def test_as_a_program_from_another_folder(tmp_path):
    copy = tmp_path / "models" / "report.py"
    write_run(copy.parent, "pmnist", "seed_2", 93.9)
    copy.write_text((ROOT / "models" / "report.py").read_text())
    done = subprocess.run([sys.executable, copy], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert rows(done.stdout, "Permuted MNIST")[0][2] == "93.90 / -3.00 (1 seed)"
    assert done.stderr == ""


@pytest.mark.parametrize("benchmark", report.PUBLISHED)
def test_published_settings_are_the_defaults_of_the_script(benchmark, monkeypatch):
    if not (ROOT / f"main_{benchmark}.py").exists():
        pytest.skip(f"there is no main_{benchmark}.py yet")
    monkeypatch.syspath_prepend(ROOT)
    script = importlib.import_module(f"main_{benchmark}")
    args = vars(script.parse_args([]))
    assert {flag: value for flag, value in args.items() if flag not in report.FREE} == report.PUBLISHED[benchmark]
    for paper in (variant.paper for variant in report.VARIANTS if variant.benchmark == benchmark and variant.paper):
        assert script.PAPER["ACC"].startswith(f"{paper.ACC:.2f}" + ("" if paper.std is None else f" ± {paper.std:.2f}"))
        assert paper.BWT is None or script.PAPER["BWT"].startswith(f"{paper.BWT:g}")


def test_a_reader_that_stops_early():
    process = subprocess.Popen([sys.executable, ROOT / "models" / "report.py", "--all"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before anything is written, which takes numpy's import and longer
    assert process.wait() == 0 and process.stderr.read() == b""
    process.stderr.close()
