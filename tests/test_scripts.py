"""The scripts end to end: their real main on small files, killed, resumed, refused, given wrong input."""
import fcntl
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from data_files import small_arrays, write_npz, write_own_files

ROOT = Path(__file__).parents[1]
# name of the script: (data sets, images in the small files of each, flags that make a run short)
SHORT = {
    "main_pmnist": (["mnist"], (300, 60), "--n_tasks 2 --n_epochs 2 --n_samples 30"),
    "main_cifar100": (["cifar100"], (2000, 400), "--n_tasks 2 --n_epochs 2 --n_samples 6"),
    "main_cifar100_superclass": (["cifar100"], (2000, 400), "--n_tasks 3 --n_epochs 2 --n_samples 6"),
    "main_five_datasets": (["cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"], (80, 30),
                           "--n_tasks 2 --n_epochs 2 --n_samples 6"),
}


class Bench:
    """One script with small data in a folder of its own."""

    def __init__(self, name, folder):
        self.script, self.folder = importlib.import_module(name), folder
        sets, sizes, self.short = SHORT[name]
        self.arrays = {name: small_arrays(name, *sizes) for name in sets}
        (folder / "data").mkdir()
        for name, arrays in self.arrays.items():
            write_npz(folder / "data", name, arrays)

    def flags(self, *more, models="models"):
        return [*self.short.split(), "--run_name", "short", "--device", "cpu", "--data_dir", str(self.folder / "data"),
                "--models_dir", str(self.folder / models), *more]

    def run(self, *more, models="models"):
        """Run main; returns the run's folder."""
        args = self.script.parse_args(self.flags(*more, models=models))
        self.script.main(args)
        return self.run_folder(args.run_name, models)

    def run_folder(self, run_name="short", models="models"):
        return self.folder / models / self.script.__name__.removeprefix("main_") / run_name

    def process(self, *more, models="models"):
        """Start the script in a process of its own."""
        command = [sys.executable, str(ROOT / f"{self.script.__name__}.py"), *self.flags(*more, models=models)]
        return subprocess.Popen(command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def program(self, *more, monkeypatch):
        """Run the script as python does, with what it does about exceptions, but in this process."""
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{self.script.__name__}.py"), *self.flags(*more)])
        runpy.run_path(sys.argv[0], run_name="__main__")

    def stopped(self, monkeypatch, *more, models="models"):
        """Run main, with a checkpoint after each epoch, to the first of the two epochs of task 2. Returns the run's folder."""
        train_epoch, left = self.script.train_epoch, iter([True] * 3)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(self.script, "SAVE_SECONDS", 0)
            patch.setattr(self.script, "train_epoch", lambda *args: train_epoch(*args) if next(left, False) else sys.exit())
            self.run(*more, models=models)
        return self.run_folder(models=models)


@pytest.fixture(params=SHORT)
def bench(request, tmp_path):
    return Bench(request.param, tmp_path)


@pytest.fixture
def pmnist(tmp_path):
    return Bench("main_pmnist", tmp_path)


def results_of(folder):
    """results.json but for the time, which may differ between equal runs."""
    results = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in results.items() if key != "seconds"}


def assert_equal_runs(a, b):
    assert results_of(a) == results_of(b)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_refused(capsys, status, pattern, function, *args, **more):
    """The call ends the program with the status and one line on stderr that matches the pattern."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args, **more)
    captured = capsys.readouterr()
    assert stop.value.code == status
    assert re.fullmatch(rf"main_\w+\.py: error: .*{pattern}.*\n", captured.err), captured.err


# A whole run ----------------------------------------------------------------------------------------------------------
def test_a_run_on_the_sets_own_files(bench, tmp_path, monkeypatch, capsys):
    for name, arrays in bench.arrays.items():
        (tmp_path / "data" / f"{name}.npz").unlink()
        write_own_files(tmp_path / "data", name, arrays, monkeypatch)
    more = ("--n_tasks", "5") * (len(bench.arrays) == 5)  # 5-Datasets reads no more sets than it has tasks
    args = vars(bench.script.parse_args(bench.flags(*more)))
    folder = bench.run(*more)
    printed, results = capsys.readouterr().out, json.loads((folder / "results.json").read_text())

    n_tasks, acc = args["n_tasks"], np.array(results["accuracy_matrix"])
    places = ("device", "data_dir", "models_dir", "run_name", "changed")
    assert results["args"] == {flag: value for flag, value in args.items() if flag not in places}
    assert results["changed"] == {flag: args[flag] for flag in ("n_epochs", "n_samples", "n_tasks") if args[flag] != 5}
    assert acc.shape == (n_tasks, n_tasks) and not np.triu(acc, 1).any()
    assert results["finished"] is True and results["seconds"] > 0
    assert results["ACC"] == pytest.approx(acc[-1].mean())
    assert results["BWT"] == pytest.approx((acc[-1] - acc.diagonal())[:-1].mean())
    assert [row[:2] for row in results["history"]] == [[t + 1, epoch] for t in range(n_tasks) for epoch in (1, 2)]
    assert all(value == round(value, 4) for row in results["history"] for value in row[3:])
    assert len(results["ranks"]) == len(results["memory"]) == n_tasks
    for earlier, later in zip(results["ranks"], results["ranks"][1:]):
        assert all(earlier[name] <= later[name] <= results["widths"][name] for name in results["widths"])
    floats = sum(r * results["widths"][name] for name, r in results["ranks"][-1].items())
    assert results["memory"][-1] == pytest.approx(100 * floats / sum(d**2 for d in results["widths"].values()))
    assert {task["set"] for task in results["data"].values()} == set(bench.arrays)
    assert not any(task["complete"] for task in results["data"].values())
    origin, = results["origins"]
    assert re.fullmatch("([0-9a-f]{40})?", origin["commit"]) and origin["versions"]["torch"] == torch.__version__

    assert len(re.findall(r"^task .* epoch .* train loss .* valid loss .* lr .* s$", printed, re.MULTILINE)) == 2 * n_tasks
    assert re.match(rf"not comparable with the paper: .*--n_samples.*, {min(bench.arrays)} in part", printed.splitlines()[-3])
    for metric, line in zip(("ACC", "BWT"), printed.splitlines()[-2:]):
        assert line == f"{metric} {results[metric]:.2f}   (paper: {bench.script.PAPER[metric]})"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "lock", "results.json"]

    bench.run(*more)  # the same command again prints the result, and writes nothing
    assert capsys.readouterr().out.splitlines()[-3:] == printed.splitlines()[-3:]
    assert json.loads((folder / "results.json").read_text()) == results


@pytest.mark.parametrize("script, flags, name", [
    ("main_pmnist", "--n_tasks 10 --device cpu", "seed_2"), ("main_cifar100", "--run_name mine --lr 1", "mine"),
    ("main_pmnist", "--threshold 0 --threshold_increment 0.2", "seed_2_threshold_0.0_threshold_increment_0.2"),
    ("main_pmnist", "--seed 3 --threshold 0.9 0.8 0.8 --lr 0.02", "seed_3_lr_0.02_threshold_0.9_0.8_0.8"),
    ("main_cifar100_superclass", "--t_order 3 --official_data --lr 0.1", "seed_1_order_3_official_data_lr_0.1"),
    ("main_cifar100_superclass", "", "seed_1_order_0"), ("main_five_datasets", "--official_data", "seed_37_official_data")])
def test_default_run_names(script, flags, name):
    assert importlib.import_module(script).parse_args(flags.split()).run_name == name


def test_flags_reach_the_training(pmnist):
    """Those that no run of test_reference.py changes."""
    base = results_of(pmnist.run())
    for flag, value in {"seed": "5", "momentum": "0.5", "n_hidden": "50", "pc_valid": "0.2"}.items():
        other = results_of(pmnist.run(f"--{flag}", value, "--run_name", flag))
        assert (base["accuracy_matrix"], base["ranks"]) != (other["accuracy_matrix"], other["ranks"]), flag
    plain = results_of(pmnist.run("--threshold", "0", "--threshold_increment", "0.4", "--run_name", "plain"))
    assert plain["ranks"] == [{"fc1": 0, "fc2": 0, "fc3": 0}] * 2


# Killed and resumed ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, flags, save_seconds", [
    ("main_pmnist", "", 30), ("main_pmnist", "--momentum 0.9", 0), ("main_cifar100", "--lr_patience 1", 0),
    ("main_cifar100_superclass", "", 0), ("main_five_datasets", "", 0)])
def test_a_run_killed_at_any_file_it_writes_ends_like_an_uninterrupted_one(name, flags, save_seconds, tmp_path, monkeypatch):
    bench, replace, written = Bench(name, tmp_path), Path.replace, []
    monkeypatch.setattr(bench.script, "SAVE_SECONDS", save_seconds)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *paths: written.append(paths) or replace(*paths))
        whole = bench.run(*flags.split(), models="whole")
    n_tasks = bench.script.parse_args(bench.flags()).n_tasks
    assert len(written) == n_tasks * (2 if save_seconds else 6)  # both files: after each task, or two epochs of each as well

    for k in range(len(written)) if name == "main_pmnist" else [8]:  # 8: within task 2, when the checkpoint is one of task 1
        left = iter([True] * k)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Path, "replace", lambda *paths: replace(*paths) if next(left, False) else sys.exit())
            bench.run(*flags.split(), models=f"killed_{k}")
        assert_equal_runs(whole, bench.run(*flags.split(), models=f"killed_{k}"))


def test_a_run_that_is_killed_ends_like_an_uninterrupted_one(pmnist):
    """With SIGKILL, three times, from wherever it was resumed: from the end of a task, as SAVE_SECONDS is 30."""
    more = ("--n_epochs", "30", "--n_tasks", "4")
    whole = pmnist.run(*more, models="whole")
    for stop in (35, 5, 50):
        process = pmnist.process(*more)
        for _ in zip(range(stop), (line for line in process.stdout if "train loss" in line)):
            pass
        process.kill()
        process.communicate()
    out, err = pmnist.process(*more).communicate()
    assert err == "" and ", after task 0, epoch 0" not in out and ", epoch 0\n" in out
    assert_equal_runs(whole, pmnist.run_folder())


def test_each_epoch_and_task_is_printed_at_once(pmnist, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "flush", flush := Mock())
    pmnist.run("--n_epochs", "7")
    assert flush.call_count == 2 * (7 + 1)


def test_ctrl_c_ends_with_a_line(pmnist):
    process = pmnist.process("--n_epochs", "200")
    while "train loss" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err == "main_pmnist.py: error: interrupted: the same command goes on from the last checkpoint\n"


def test_each_commit_that_worked_on_a_run_is_in_the_result(pmnist, monkeypatch):
    for commit in "abb":
        monkeypatch.setattr(pmnist.script, "provenance", lambda device: {"commit": commit})
        folder = pmnist.stopped(monkeypatch) if commit == "a" else pmnist.run()
    assert results_of(folder)["origins"] == [{"commit": "a"}, {"commit": "b"}]


# Refused --------------------------------------------------------------------------------------------------------------
def test_other_arguments_and_data_are_refused_and_named(pmnist, capsys):
    folder = pmnist.run()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_refused(capsys, 2, r"other args \(lr 0\.01 there, 0\.005 here; n_hidden 100 there, 7 here\): choose another",
                   pmnist.run, "--lr", "0.005", "--n_hidden", "7")
    write_npz(pmnist.folder / "data", "mnist", small_arrays("mnist", 310, 60))
    assert_refused(capsys, 2, r"other data \(permutation 1 .*'train': 270.* there, .*'train': 279", pmnist.run)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02."])
def test_a_damaged_checkpoint_is_named(pmnist, content, capsys):
    folder = pmnist.run()
    (folder / "checkpoint.pt").write_bytes(content)
    assert_refused(capsys, 2, "checkpoint.pt cannot be read .*: remove the folder to start anew", pmnist.run)


def test_two_processes_on_one_run(pmnist, monkeypatch, capsys):
    folder = pmnist.run()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(capsys, 2, "another process is at work in .*short", pmnist.run)
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(38, "a file system without locks")))
    assert results_of(pmnist.run())["finished"]


OUT_OF_RANGE = """threshold 1.01, threshold nan, threshold_increment -0.1, n_samples 0, n_epochs 0, batch_size_train -3,
    batch_size_test 0, pc_valid 0, pc_valid 1, lr 0, lr nan, lr inf, lr_factor 0.5, lr_patience -1, momentum 1, seed -1,
    n_tasks 0, n_tasks 11, n_hidden 0"""


@pytest.mark.parametrize("flags, pattern", [
    *((f"--{flag}", f"argument --{flag.replace(' ', ': ')} is not in") for flag in re.split(r",\s+", OUT_OF_RANGE)),
    ("--threshold 0.9 0.9", "--threshold takes one value, or one for each of the [0-9]+ layers fc1 fc2 fc3"),
    ("--threshold 0.9 --threshold_increment 0.2", "--threshold and --threshold_increment reach 1 within 2 tasks"),
    ("--n_samples 5 5", "--n_samples takes one value, or one for each"), ("--n_samples 1", "--n_samples: the largest must lie"),
    ("--n_samples 100000", "--n_samples: the largest must lie between 2 and 270"),
    ("--pc_valid 0.001", "validation share of 0.001 is less than one of"), ("--lr 1e-7", "--lr_min 1e-05 is above --lr 1e-07"),
    ("--device cuda:77", "--device: cuda:77 cannot be used"), ("--device meta", "--device: meta cannot be used"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"), ("--epochs 3", "unrecognized arguments: --epochs 3"),
    ("--lr 1e30", "the loss became (nan|inf)"), ("--models_dir file", "(File exists|Not a directory)")])
def test_wrong_input_ends_in_one_line(pmnist, flags, pattern, monkeypatch, capsys):
    (pmnist.folder / "file").touch()
    monkeypatch.chdir(pmnist.folder)
    status = 1 if flags in ("--lr 1e30", "--models_dir file") else 2
    assert_refused(capsys, status, pattern, pmnist.program, *flags.split(), monkeypatch=monkeypatch)
    assert not list(pmnist.folder.rglob("*.pt"))


def test_wrong_input_of_one_script(tmp_path, capsys):
    superclass = importlib.import_module("main_cifar100_superclass")
    assert_refused(capsys, 2, "--t_order: invalid choice: '?5", superclass.parse_args, ["--t_order", "5"])
    cifar100 = Bench("main_cifar100", tmp_path)
    # 200 images a task: 10 for validation, 190 for training, 40 for the test
    assert_refused(capsys, 2, "_train leaves a batch of one of 190 images", cifar100.run, "--batch_size_train", "63")
    assert_refused(capsys, 2, "--batch_size_test leaves a batch of one of 10 images", cifar100.run, "--batch_size_test", "9")


def test_a_full_disk_or_gpu_ends_the_run_with_a_line_and_loses_nothing(pmnist, monkeypatch, capsys):
    folder = pmnist.stopped(monkeypatch)
    before = (folder / "checkpoint.pt").read_bytes()
    for name in "checkpoint.pt.part", "results.json.part":
        os.symlink("/dev/full", folder / name)
        assert_refused(capsys, 1, "No space left on device", pmnist.program, monkeypatch=monkeypatch)
        assert (folder / "checkpoint.pt").read_bytes() == before
        (folder / name).unlink()

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore lines")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", Mock(side_effect=full))
        assert_refused(capsys, 1, "CUDA out of memory. Tried to allocate 20.00 MiB.", pmnist.program, monkeypatch=monkeypatch)
    assert results_of(pmnist.run())["finished"]


def test_help_shows_the_defaults(bench, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        bench.script.parse_args(["--help"])
    assert f"(default: {bench.script.N_TASKS})" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_run_on_cuda_resumes(bench, monkeypatch):
    """Ended within task 2, where bases, momentum and the GPU's random numbers matter."""
    flags = ("--device", "cuda", "--momentum", "0.9")
    whole = bench.run(*flags, models="whole")
    bench.stopped(monkeypatch, *flags)
    resumed = bench.run(*flags)
    assert results_of(resumed)["origins"][0]["device"]["type"] == "cuda" and results_of(resumed)["finished"]
    a, b = (torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True) for folder in (whole, resumed))
    assert len(a["random"]) >= 2 and all(map(torch.equal, a["random"], b["random"]))
    for name, W in a["model"].items():  # a GPU's sums are equal up to their order
        torch.testing.assert_close(b["model"][name], W, rtol=0, atol=1e-3 * W.abs().max().item())
