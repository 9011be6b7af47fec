"""The report: numbers worked by hand, what is averaged with what, what does not count, and figures."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

SCRIPT = Path(__file__).resolve().parents[1] / "models" / "report.py"
sys.path.insert(0, str(SCRIPT.parent))
import report

CPU, GPU = {"type": "cpu", "name": "x86_64", "threads": 2}, {"type": "cuda", "name": "NVIDIA H200", "threads": 8}
GPM = ["93.91 ± 0.16 / -3", "72.48 ± 0.40 / -0.9", "57.72 / not given", "-", "91.22 ± 0.20 / -1", "-"]


def write_run(models, name, ACC=90.0, BWT=-3.0, seed=2, tasks=10, devices=(CPU,), lacking=(), drawn=True, more=None, **args):
    """Write the results.json that a run leaves after some of ten tasks. lacking: incomplete data sets. more: other content."""
    T = range(1, tasks + 1)
    results = {
        "args": {"seed": seed, "n_tasks": 10, **args}, "changed": {}, "widths": {"fc1": 784}, "seconds": 60.0,
        "origins": [{"dirty": False, "device": device} for device in devices], "finished": tasks == 10,
        "data": {s: {"set": s, "complete": s == "a", "train": 950, "valid": 50, "test": 100} for s in ("a", *lacking)},
        "accuracy_matrix": [[ACC if u < t or t == tasks else ACC - BWT if u == t else 0.0 for u in T] for t in T],
        "ACC": ACC, "BWT": BWT if tasks > 1 else 0.0, "ranks": [{"fc1": 70 * t} for t in T], "memory": [6.9 * t for t in T]}
    folder = models / name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**results, **(more or {})}))
    if drawn:  # a figure takes longer than all else
        (folder / "accuracy.png").touch()
    return folder


def run_report(capsys, models, *flags):
    report.main(report.parse_args(["--models_dir", str(models), *map(str, flags)]))
    return capsys.readouterr().out


def rows(text, label=""):
    """Cells of the rows of all printed tables whose first cell starts with the label."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith(f"| {label}")]


def test_every_row_is_there_without_any_result(tmp_path, capsys):
    text = run_report(capsys, tmp_path, "--all", "--figure", tmp_path / "figure.png")
    assert [row[1:3] for row in rows(text.split("\n\n")[0])[1:]] == [[paper, "not measured yet"] for paper in GPM]
    assert ": 93.9 ± 0.6, BWT -4.5 to -2; " in text and ": 57.7 ± 1.2; " in text and "| EWC " in text and "Not " not in text
    assert "figure.png is not written" in text and not (tmp_path / "figure.png").exists()


def test_means_and_deviations(tmp_path, capsys):
    for seed, ACC, BWT, seconds, memory in (2, 93.2, -3.5, 60, 69), (3, 93.5, -3.3, 70, 69.3), (4, 94.1, -3.1, 80, 69.6):
        write_run(tmp_path, f"pmnist/{seed}", ACC, BWT, seed, more={"seconds": seconds, "memory": [0] * 9 + [memory]})
    for order, seed, ACC in (0, 1, 56), (1, 1, 57), (2, 1, 58), (3, 1, 59), (3, 2, 61):
        write_run(tmp_path, f"cifar100_superclass/{order}_{seed}", ACC, seed=seed, t_order=order, official_data=True)
    write_run(tmp_path, "cifar100_superclass/correct", 65, t_order=0, official_data=False)
    pmnist, _, official, correct, *_ = rows(run_report(capsys, tmp_path))[1:]
    # Mean 93.6; deviations -0.4, -0.1, 0.5: variance (0.16 + 0.01 + 0.25) / 2 = 0.21, standard deviation 0.458.
    assert pmnist[1:] == [
        GPM[0], "93.60 ± 0.46 / -3.30 (3 seeds)", "-0.31", "yes", "complete", "70 s (CPU x86_64, 2 threads)", "69.3 %"]
    # Order 3 counts once, with (59 + 61) / 2 = 60: mean 57.75, deviations -1.75, -0.75, 0.25, 2.25, variance 8.75 / 3.
    assert official[2:5] == ["57.75 ± 1.71 / -3.00 (4 orders)", "+0.03", "fewer than 5 orders"]
    assert correct[1:5] == ["-", "65.00 / -3.00 (1 order)", "-", "n/a (other data)"]
    write_run(tmp_path, "cifar100_superclass/4_1", 57.75, t_order=4, official_data=True)
    assert rows(run_report(capsys, tmp_path))[3][2:5] == ["57.75 ± 1.48 / -3.00 (5 orders)", "+0.03", "yes"]


@pytest.mark.parametrize("benchmark, ACC, BWT, expected", [
    ("pmnist", 93.3, -2.01, "yes"), ("pmnist", 94.5, -4.49, "yes"), ("pmnist", 93.29, -3, "no"), ("pmnist", 94.51, -3, "no"),
    ("pmnist", 93.9, -4.5, "no"), ("pmnist", 93.9, -2, "no"), ("cifar100", 71.3, 0.5, "yes"), ("cifar100", 71.29, 0, "no"),
    ("cifar100", 72.5, -2, "no"), ("five_datasets", 90.2, -9, "yes"), ("five_datasets", 92.21, 0, "no")])
def test_band(tmp_path, capsys, benchmark, ACC, BWT, expected):
    for seed in range(3):
        write_run(tmp_path, f"{benchmark}/{seed}", ACC, BWT, seed, official_data=benchmark == "five_datasets")
    assert [row[4] for row in rows(run_report(capsys, tmp_path)) if "3 seeds" in row[2]] == [expected]


def test_what_is_not_averaged(tmp_path, capsys):
    modified = {"more": {"origins": [{"dirty": False, "device": CPU}, {"dirty": True, "device": CPU}]}}
    for seed, difference in enumerate((
            {}, {"devices": [CPU | {"threads": 1}]}, {"devices": [GPU]}, {"devices": [CPU, GPU]}, modified,
            {"more": {"widths": {"fc1": 9}}}, {"lacking": ["svhn"]}, {"lacking": ["svhn"]}, {"lacking": ["svhn", "emnist"]})):
        write_run(tmp_path, f"pmnist/{seed}", 90 + seed, seed=seed, **difference)
    write_run(tmp_path, "cifar100/1", 72, **modified)
    write_run(tmp_path, "five_datasets/1", 91, lacking=["svhn"], official_data=True)
    text = run_report(capsys, tmp_path)
    cpu, few, partial = "60 s (CPU x86_64, 2 threads)", [GPM[0], "fewer than 3 runs", "complete"], ["-", "n/a (partial data)"]
    assert {row[2][:5]: [row[1], *row[4:7]] for row in rows(text, "Permuted MNIST")} == {
        "90.50": [*few, "60 s (CPU x86_64, 1 thread or 2 threads)"], "92.00": [*few, "60 s (NVIDIA H200)"],
        "93.00": [*few, "60 s (CPU x86_64 and NVIDIA H200, 2 threads)"], "95.00": [*few, cpu],
        "94.00": [GPM[0], "n/a (modified code)", "complete", cpu],
        "96.50": [*partial, "partial: svhn", cpu], "98.00": [*partial, "partial: emnist, svhn", cpu]}
    assert [row[0][20:] + row[2] for row in rows(text, "10-sp")] == ["not measured yet", "modified code72.00 / -3.00 (1 seed)"]
    assert [row[1:3] for row in rows(text, "5-Datasets, `")] == [[GPM[4], "not measured yet"], ["-", "91.00 / -3.00 (1 seed)"]]


def test_what_does_not_count(tmp_path, capsys):
    (write_run(tmp_path, "pmnist/2", 93) / "checkpoint.pt").touch()
    for name in "quick/pmnist/5", "pmnist/quick_6", "fifth/2", "pmnist/2_again":
        write_run(tmp_path, name)
    write_run(tmp_path, "pmnist/3", tasks=4)
    write_run(tmp_path, "pmnist/4", tasks=0, more={"ACC": None, "BWT": None})
    for seed in 2, 3:
        write_run(tmp_path, f"pmnist/{seed}_lr", 90 + seed, seed=seed, more={"changed": {"lr": 0.1, "threshold": [0.9, 0.8]}})
    main, other, notes = run_report(capsys, tmp_path).split("\n\n### ")
    assert rows(main, "Permuted")[0][2] == "93.00 / -3.00 (1 seed)" and "\n2 of these runs have no checkpoint" in main
    assert rows(other, "Permuted MNIST")[0][1:3] == ["`--lr 0.1 --threshold 0.9 0.8`", "92.50 ± 0.71 / -3.00 (2 seeds)"]
    assert [line.removesuffix(", 10 of 10 tasks, ACC 90.00, BWT -3.00") for line in notes.splitlines()[2:]] == [
        "- `fifth/2`: not one of the paper's benchmarks", "- `pmnist/2_again`: a seed once more",
        "- `pmnist/3`: unfinished, 4 of 10 tasks, ACC 90.00, BWT -3.00", "- `pmnist/4`: unfinished, 0 of 10 tasks",
        "- `pmnist/quick_6`: a quick run", "- `quick/pmnist/5`: a quick run"]


@pytest.mark.parametrize("content", [
    "", '{"args": {', "[" * 100_000, "[1, 2]", "{}", {"ACC": 99.0}, {"BWT": 0.0}, {"ACC": None}, {"finished": False},
    {"accuracy_matrix": [[9.0], []]}, {"accuracy_matrix": [[9.0, 0.0]] * 10}, {"ranks": []}, {"memory": []}, {"seconds": None},
    {"origins": [{}]}, {"data": {"a": {}}}, {"args": {"seed": []}}, {"args": {"seed": 2, "n_tasks": 3}}], ids=str)
def test_a_file_that_is_no_result_is_named_and_skipped(tmp_path, capsys, content):
    write_run(tmp_path, "pmnist/2", 93.9)
    path = write_run(tmp_path, "pmnist/3", seed=3, drawn=False) / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps({**json.loads(path.read_text()), **content}))
    text = run_report(capsys, tmp_path)
    assert rows(text, "Permuted MNIST")[0][2] == "93.90 / -3.00 (1 seed)"
    assert text.splitlines()[-1].startswith("- `pmnist/3/results.json`: no result (")


def test_figures_are_made_once(tmp_path, capsys, monkeypatch):
    figures, names = [], ("pmnist/2", "pmnist/3", "quick/pmnist/2")
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, dpi: (figures.append(figure), file.write(b"new")))
    for seed, name in enumerate(names):
        write_run(tmp_path, name, 92 + 2 * seed, -4, seed, drawn=False)
    write_run(tmp_path, "pmnist/4", tasks=4, drawn=False)
    write_run(tmp_path, "five_datasets/1", official_data=True)
    run_report(capsys, tmp_path, "--figure", tmp_path / "table.png")
    new = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.p*") if path.read_text() == "new"]
    assert sorted(new) == [*(f"{name}/accuracy.png" for name in names), "table.png"]
    matrix, means, ranks, _ = figures[3].subfigs[0].axes
    assert matrix.images[0].get_array().filled(-1)[[9, 4], 3:6].tolist() == [[93, 93, 93], [93, 97, -1]]
    mean, paper = (line.get_ydata() for line in means.lines)  # after task 5 its own accuracy is 4 above that of the others
    assert mean[[0, 4, 9]] == pytest.approx([97, 93.8, 93]) and paper == [93.91] * 2
    assert means.collections[0].get_segments()[9][:, 1] == pytest.approx([93 - 2**0.5, 93 + 2**0.5])
    assert ranks.lines[0].get_ydata()[9] == pytest.approx(100 * 700 / 784) and len(figures[3].subfigs) == 2
    assert figures[0].subfigs[0].axes[1].lines[0].get_ydata()[9] == 92 and len(figures) == 4
    (tmp_path / "quick" / "pmnist" / "2" / "results.json").touch()  # trained anew
    for path in write_run(tmp_path, "pmnist/5", seed=5, drawn=False) / "accuracy.png.part", tmp_path / "refused.png":
        path.mkdir()
    with pytest.raises(SystemExit, match="2"):
        run_report(capsys, tmp_path, "--figure", tmp_path / "refused.png")
    out, err = capsys.readouterr()
    assert "(3 seeds)" in out and err.count("\n") == err.count(": cannot write ") == 2
    assert len(figures) == 6 and not (tmp_path / "refused.png.part").exists()


@pytest.mark.parametrize("flags", ["--models_dir no", "--figure a.pdf", "--figure no/a.png", "--figure", "--best", "a"])
def test_bad_flags_end_in_one_line(capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        report.parse_args(flags.split())
    out, err = capsys.readouterr()
    assert out == "" and ": error: " in err and err.count("\n") == 1


def test_as_a_program(tmp_path):
    folder = write_run(tmp_path, "pmnist/2", drawn=False)
    command = [sys.executable, "-E", SCRIPT, "--models_dir", tmp_path]  # -E: output is buffered, whatever the environment says
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # by a reader that stops early, before anything is written: numpy's import takes longer
        assert process.stderr.read() == b"" and process.wait() == 0
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
