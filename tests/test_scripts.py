"""The scripts end to end: their real main on small files, killed, resumed, refused, given wrong input."""
import contextlib
import errno
import fcntl
import importlib
import itertools
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data_files import small_arrays, write_npz, write_own_files
from dataloader import raw

ROOT = Path(__file__).parents[1]
# name of the script: (data sets, images in the small files of each, flags that make a run short)
SHORT = {
    "main_pmnist": (["mnist"], (300, 60), "--n_tasks 2 --n_epochs 2 --n_samples 30"),
    "main_cifar100": (["cifar100"], (2000, 400), "--n_tasks 2 --n_epochs 2 --n_samples 6"),
    "main_cifar100_superclass": (["cifar100"], (2000, 400), "--n_tasks 3 --n_epochs 2 --n_samples 6"),
    "main_five_datasets": (["cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"], (80, 30), "--n_tasks 2 --n_epochs 2 --n_samples 6"),
}


class Bench:
    """One script with small data in a folder of its own."""

    def __init__(self, name, folder):
        self.script, self.folder = importlib.import_module(name), folder
        self.write_figure = self.script.write_figure
        sets, sizes, self.short = SHORT[name]
        self.arrays = {name: small_arrays(name, *sizes) for name in sets}
        (folder / "data").mkdir()
        for name, arrays in self.arrays.items():
            write_npz(folder / "data", name, arrays)

    def flags(self, *more, models="models"):
        return [*self.short.split(), "--run_name", "short", "--device", "cpu", "--data_dir", str(self.folder / "data"), "--models_dir", str(self.folder / models), *more]

    def run(self, *more, models="models", figure=False):
        """Run main; returns the run's folder. Unless asked for, the figure is an empty file: drawing it takes most of such a run."""
        args = self.script.parse_args(self.flags(*more, models=models))
        with pytest.MonkeyPatch.context() as patch:
            if not figure and self.script.write_figure is self.write_figure:  # else a test has put something in its place
                patch.setattr(self.script, "write_figure", lambda _, path: self.script.write_file(path, lambda file: file.write(b"")))
            self.script.main(args)
        return self.run_folder(args.run_name, models)

    def run_folder(self, run_name, models="models"):
        return self.folder / models / self.script.__name__.removeprefix("main_") / run_name

    def process(self, *more, models="models"):
        """Start the script in a process of its own."""
        command = [sys.executable, "-u", str(ROOT / f"{self.script.__name__}.py"), *self.flags(*more, models=models)]
        return subprocess.Popen(command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(params=SHORT)
def bench(request, tmp_path):
    return Bench(request.param, tmp_path)


@pytest.fixture
def pmnist(tmp_path):
    return Bench("main_pmnist", tmp_path)


@pytest.fixture
def cifar100(tmp_path):
    return Bench("main_cifar100", tmp_path)


def results_of(folder):
    """results.json but for what may differ between equal runs: times, and where things lie."""
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"], results["args"]["models_dir"], results["args"]["data_dir"]
    return results


def weights_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def assert_equal_runs(a, b):
    assert results_of(a) == results_of(b)
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_refused(capsys, status, pattern, function, *args):
    """The call ends the program with the status and one line on stderr that matches the pattern."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    captured = capsys.readouterr()
    assert stop.value.code == status
    assert re.fullmatch(rf"main_\w+\.py: error: .*{pattern}.*\n", captured.err), captured.err
    return captured.out


# A whole run ----------------------------------------------------------------------------------------------------------


def test_a_run_on_the_sets_own_files(bench, tmp_path, monkeypatch, capsys):
    for name, arrays in bench.arrays.items():
        (tmp_path / "data" / f"{name}.npz").unlink()
        write_own_files(tmp_path / "data", name, arrays, monkeypatch)
    more = ("--n_tasks", "5") * (len(bench.arrays) == 5)  # 5-Datasets reads no more sets than it has tasks
    folder = bench.run(*more, figure=True)
    printed = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())

    n_tasks = results["args"]["n_tasks"]
    acc = np.array(results["accuracy_matrix"])
    assert acc.shape == (n_tasks, n_tasks) and not np.triu(acc, 1).any()
    assert results["finished"] is True
    assert results["ACC"] == pytest.approx(acc[-1].mean())
    assert results["BWT"] == pytest.approx((acc[-1] - acc.diagonal())[:-1].mean())
    assert results["epochs"] == [2] * n_tasks
    assert len(results["ranks"]) == len(results["memory"]) == n_tasks
    for earlier, later in zip(results["ranks"], results["ranks"][1:]):
        assert all(earlier[name] <= later[name] <= results["widths"][name] for name in results["widths"])
    assert results["memory"][-1]["floats"] == sum(r * results["widths"][name] for name, r in results["ranks"][-1].items())
    assert {task["set"] for task in results["data"]} == set(bench.arrays) and not any(task["complete"] for task in results["data"])
    assert re.fullmatch("[0-9a-f]{40}", results["commit"] or "0" * 40) and results["versions"]["torch"] == torch.__version__
    assert all(seconds >= 0 for seconds in results["seconds"].values()) and results["seconds"]["training"] > 0

    assert len(re.findall(r"^task .* epoch .* train loss .* valid loss .* lr .* s$", printed, re.MULTILINE)) == 2 * n_tasks
    assert re.search(rf"^ACC {results['ACC']:.2f} .*paper", printed, re.MULTILINE)
    assert re.search(rf"^BWT {results['BWT']:.2f} .*paper", printed, re.MULTILINE)
    assert re.fullmatch(r"not comparable with the paper: --n_epochs 2 --n_samples \d+( --n_tasks \d)?", printed.splitlines()[-4])
    command = printed.splitlines()[0].removeprefix(f"{folder}: python {bench.script.__name__}.py ")
    assert vars(bench.script.parse_args(shlex.split(command))) == results["args"]
    assert (folder / "log.txt").read_text() == printed
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["accuracy.png", "checkpoint.pt", "log.txt", "results.json"]


def test_the_network_learns_and_seeds_differ(pmnist):
    first, second = (pmnist.run("--n_epochs", "8", "--seed", seed, "--run_name", seed) for seed in "12")
    assert results_of(first)["ACC"] > 60 and results_of(second)["ACC"] > 60  # chance: 10
    assert results_of(first)["ranks"] != results_of(second)["ranks"]


def test_the_same_command_again(pmnist, capsys):
    folder = pmnist.run()
    ended = capsys.readouterr().out.splitlines()[-2:]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for path in (pmnist.folder / "data").iterdir():
        path.unlink()  # not needed any more
    pmnist.run()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{folder} is finished" and printed[-2:] == ended
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("bench", ["main_pmnist", "main_cifar100"], indirect=True)  # one head, and many with BatchNorm
def test_evaluate(bench, capsys):
    folder = bench.run()
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    bench.run("--evaluate")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folder}: python {bench.script.__name__}.py --seed")  # which run it is
    found = [float(a) for a in re.findall(r"accuracy ([\d.]+)$", printed, re.MULTILINE)]
    assert found == [round(a, 2) for a in results_of(folder)["accuracy_matrix"][-1]]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_evaluate_uses_the_arguments_of_the_run(pmnist, capsys):
    folder = pmnist.run("--n_hidden", "17", "--run_name", "narrow")
    capsys.readouterr()
    pmnist.run("--run_name", "narrow", "--evaluate")
    assert f"{results_of(folder)['accuracy_matrix'][-1][0]:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, named", [("--batch_size_test 32", "--batch_size_test 64 there, 32 here"),
                                          ("--seed 5", "--seed 2 there, 5 here")])
def test_evaluate_refuses_flags_that_are_not_the_runs(pmnist, flags, named, capsys):
    pmnist.run()
    assert_refused(capsys, 2, named, pmnist.run, "--evaluate", *flags.split())


def test_evaluate_without_a_run(pmnist, capsys):
    assert_refused(capsys, 2, "there is no checkpoint in .*short: train first", pmnist.run, "--evaluate")


@pytest.mark.parametrize("replaced", [None, '{"args": {}, "ACC": 1}'])
def test_a_finished_run_brings_its_result_back(pmnist, replaced, capsys):
    path = pmnist.run() / "results.json"
    written = path.read_bytes()
    path.unlink()
    if replaced:
        path.write_text(replaced)
    pmnist.run()
    assert path.read_bytes() == written and "is finished" in capsys.readouterr().out


def test_default_run_names():
    names = {"main_pmnist": [("", "seed_2"), ("--seed 3 --n_tasks 4", "seed_3_n_tasks_4"), ("--n_tasks 10 --device cuda", "seed_2"),
                             ("--threshold 0.9 0.8 0.8 --lr 0.02", "seed_2_lr_0.02_threshold_0.9_0.8_0.8")],
             "main_cifar100": [("", "seed_1"), ("--n_tasks 1 --data_dir x", "seed_1_n_tasks_1")],
             "main_cifar100_superclass": [("", "seed_1_order_0"), ("--t_order 3 --official_data", "seed_1_order_3_official_data"),
                                          ("--n_tasks 5", "seed_1_order_0_n_tasks_5"), ("--run_name mine --lr 1", "mine")],
             "main_five_datasets": [("", "seed_37"), ("--official_data --n_tasks 2", "seed_37_official_data_n_tasks_2"),
                                    ("--n_samples 7", "seed_37_n_samples_7")]}
    for script, cases in names.items():
        for flags, name in cases:
            assert importlib.import_module(script).parse_args(flags.split()).run_name == name


def test_the_order_of_test_images_in_a_file_does_not_matter(cifar100):
    folder = cifar100.run()
    arrays = cifar100.arrays["cifar100"]
    by_class = np.argsort(arrays["y_test"], kind="stable")
    for key in ("x_test", "y_test"):
        arrays[key] = arrays[key][by_class]
    write_npz(cifar100.folder / "data", "cifar100", arrays)
    assert_equal_runs(folder, cifar100.run(models="sorted"))


def test_flags_reach_the_training(pmnist):
    base = pmnist.run()
    changed = {"lr": "0.02", "momentum": "0.5", "batch_size_train": "20", "pc_valid": "0.2", "n_hidden": "50", "threshold": "0.9"}
    for flag, value in changed.items():
        folder = pmnist.run(f"--{flag}", value, "--run_name", flag)
        a, b = results_of(base), results_of(folder)
        assert (a["accuracy_matrix"], a["ranks"]) != (b["accuracy_matrix"], b["ranks"]), flag
    per_layer = results_of(pmnist.run("--threshold", "0.5", "0.99", "0.99", "--run_name", "per_layer"))
    assert per_layer["ranks"][0]["fc1"] < results_of(base)["ranks"][0]["fc1"]
    grows = results_of(pmnist.run("--threshold", "0.5", "--threshold_increment", "0.4", "--run_name", "grows"))
    stays = results_of(pmnist.run("--threshold", "0.5", "--run_name", "stays"))
    assert grows["ranks"][0] == stays["ranks"][0] and grows["ranks"][1]["fc1"] > stays["ranks"][1]["fc1"]


# Killed and resumed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, flags", [("main_pmnist", ""), ("main_pmnist", "--momentum 0.9"), ("main_cifar100", "--lr_patience 1 --n_epochs 3"),
                                         ("main_cifar100_superclass", ""), ("main_five_datasets", "")])
def test_a_run_killed_at_any_file_it_writes_ends_like_an_uninterrupted_one(name, flags, tmp_path, monkeypatch):
    bench = Bench(name, tmp_path)
    write_file, written = bench.script.write_file, []
    with monkeypatch.context() as patch:
        patch.setattr(bench.script, "write_file", lambda path, write: written.append(path) or write_file(path, write))
        whole = bench.run(*flags.split(), models="whole")
    assert len(written) >= 9

    class Killed(BaseException):
        pass

    def killed_at(k, after):
        calls = iter(range(len(written)))

        def write(path, content):
            call = next(calls)
            if call == k and not after:
                raise Killed
            write_file(path, content)
            if call == k:
                raise Killed
        return write

    moments = [(0, False), *((k, True) for k in range(len(written)))]  # what is there before the next file is there after this one
    if name != "main_pmnist" or flags:  # within task 2
        moments = [(written.index(whole / "results.json") + 3, False)]
    for k, after in moments:
        models = f"killed_{k}_{after}"
        with monkeypatch.context() as patch:
            patch.setattr(bench.script, "write_file", killed_at(k, after))
            with pytest.raises(Killed):
                bench.run(*flags.split(), models=models)
        assert_equal_runs(whole, bench.run(*flags.split(), models=models))


def test_a_run_that_is_killed_loses_at_most_one_epoch(pmnist):
    more = ("--n_epochs", "30")
    whole = pmnist.run(*more, models="whole")
    logged = []
    for stop in (5, 3, 20):  # epochs after which the process is killed with SIGKILL, from wherever it was resumed
        process = pmnist.process(*more)
        epochs = (line for line in process.stdout if "train loss" in line)
        logged.append([next(epochs) for _ in range(stop)])
        process.kill()
        logged[-1] += list(epochs)  # what was printed before the kill arrived
        process.wait()
        process.stderr.close(), process.stdout.close()
    process = pmnist.process(*more)
    out, err = process.communicate()
    assert process.returncode == 0 and err == ""
    assert_equal_runs(whole, pmnist.run_folder("short"))
    numbers = [[int(line.split()[1]) * 100 + int(line.split()[3]) for line in lines] for lines in logged]
    for earlier, later in zip(numbers, numbers[1:]):
        assert later[0] == earlier[-1] + 1 or (earlier[-1] % 100 == 30 and later[0] == 201)  # an epoch that was printed is not repeated


def test_ctrl_c_ends_with_a_line_and_the_run_goes_on(pmnist):
    process = pmnist.process("--n_epochs", "200")
    while "train loss" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == "\ninterrupted: the same command, without --overwrite, goes on after the last full epoch\n"


def test_a_full_gpu_ends_the_run_with_a_line(monkeypatch, capsys):
    def full(seed):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore lines")

    monkeypatch.setattr(torch, "manual_seed", full)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "main_pmnist.py")])
    assert_refused(capsys, 1, "CUDA out of memory. Tried to allocate 20.00 MiB. The same command, .*goes on after the last full epoch",
                   partial(runpy.run_path, sys.argv[0], run_name="__main__"))


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="this kernel gives huge pages to all or to none")
@pytest.mark.parametrize("name", SHORT)
def test_large_tensors_lie_in_huge_pages(name):
    """PyTorch must be told before the process makes its first tensor, which main_five_datasets.py does while it reads the flags."""
    code = """if True:
        import re, runpy, sys
        sys.argv = [sys.argv[1], "--help"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit:
            import torch
            x = torch.ones(2**24)
            print("huge kB:", sum(map(int, re.findall(r"AnonHugePages: +(\\d+)", open("/proc/self/smaps").read()))))
    """
    env = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}  # which other tests leave set
    done = subprocess.run([sys.executable, "-c", code, ROOT / f"{name}.py"], env=env, capture_output=True, text=True, check=True)
    assert int(re.search(r"huge kB: (\d+)", done.stdout)[1]) > 2**15  # half of x


def test_an_unfinished_run_can_be_evaluated(pmnist, monkeypatch, capsys):
    print_task = pmnist.script.print_task
    monkeypatch.setattr(pmnist.script, "print_task", lambda *args: (print_task(*args), sys.exit(9)))
    with pytest.raises(SystemExit):
        pmnist.run()
    capsys.readouterr()
    pmnist.run("--evaluate")
    assert re.search(r"^task  1 \(.*\) accuracy \d", capsys.readouterr().out, re.MULTILINE)


def test_each_change_of_the_commit_is_kept_in_the_result(pmnist, monkeypatch):
    train_epoch = pmnist.script.train_epoch
    for commit, epochs in ("a", 1), ("b", 1), ("b", 1), ("a", 9):  # two tasks of two epochs; ended after so many
        calls = itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr(pmnist.script, "provenance", lambda device: {"commit": commit, "dirty": False, "versions": {}, "device": {}})
            patch.setattr(pmnist.script, "train_epoch", lambda *args: sys.exit(9) if next(calls) == epochs else train_epoch(*args))
            with contextlib.suppress(SystemExit):
                pmnist.run()
    results = results_of(pmnist.run_folder("short"))
    assert results["finished"] and results["commit"] == "a"
    assert [(entry["commit"], entry["task"], entry["epoch"]) for entry in results["resumed_with"]] == [("b", 1, 1), ("a", 2, 1)]


# Refused --------------------------------------------------------------------------------------------------------------


def test_other_arguments_are_refused_and_named(pmnist, capsys):
    folder = pmnist.run()
    kept = (folder / "results.json").read_bytes()
    assert_refused(capsys, 2, r"--lr 0\.0?1 there, 0.005 here.*--run_name.*--overwrite", pmnist.run, "--lr", "0.005")
    assert (folder / "results.json").read_bytes() == kept
    pmnist.run("--lr", "0.005", "--overwrite")
    assert json.loads((folder / "results.json").read_text())["args"]["lr"] == 0.005
    assert (folder / "log.txt").read_text().count("commit") == 2  # the log keeps what was there


def test_a_result_without_its_checkpoint_is_trained_anew(pmnist, capsys):
    folder = pmnist.run()
    before = results_of(folder)
    (folder / "checkpoint.pt").unlink()
    assert_refused(capsys, 2, "--lr 0.01 there, 0.005 here", pmnist.run, "--lr", "0.005")
    pmnist.run()
    out = capsys.readouterr().out
    assert out.count("train loss") == 4 and f"{folder} holds a result without its checkpoint: training anew" in out
    assert results_of(folder) == before
    (folder / "checkpoint.pt").unlink()
    for content in ('{"args": {', "[1]", '{"args": null}', '{"ACC": 1}'):  # nobody can tell what it was
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        (folder / "results.json").write_text(content)
        pmnist.run()
        assert results_of(folder) == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02.", b"other keys"])
def test_a_damaged_checkpoint_is_named(pmnist, content, capsys):
    folder = pmnist.run()
    (folder / "checkpoint.pt").write_bytes(content)
    if content == b"other keys":
        torch.save({"weights": torch.zeros(3)}, folder / "checkpoint.pt")
    assert_refused(capsys, 2, "checkpoint.pt cannot be read .*--overwrite", pmnist.run)
    pmnist.run("--overwrite")
    assert results_of(folder)["finished"]


def test_a_checkpoint_that_cannot_be_opened_is_not_called_damaged(pmnist, capsys):
    (pmnist.run_folder("short") / "checkpoint.pt").mkdir(parents=True)
    assert_refused(capsys, 2, "checkpoint.pt cannot be read: Is a directory", pmnist.run)


def test_other_data_are_refused(pmnist, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(pmnist.script, "write_figure", lambda *args: sys.exit(9))
        with pytest.raises(SystemExit):
            pmnist.run()
    write_npz(pmnist.folder / "data", "mnist", small_arrays("mnist", 310, 60))
    for more in ([], ["--evaluate"]):
        assert_refused(capsys, 2, "was trained on other data: .*train 270 there, 279 here", pmnist.run, *more)


@pytest.mark.parametrize("flags", ["--n_samples 100000", "--data_dir data/mnist.npz"])
def test_overwrite_replaces_nothing_before_all_is_checked(pmnist, flags, monkeypatch, capsys):
    folder = pmnist.run()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"}
    monkeypatch.chdir(pmnist.folder)
    with pytest.raises(SystemExit) as stop:
        pmnist.run("--overwrite", *flags.split())
    assert stop.value.code == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"} == before


def test_a_checkpoint_of_another_script(pmnist, capsys):
    folder = pmnist.run()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    del checkpoint["results"]["args"]["n_hidden"]
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert_refused(capsys, 2, "holds a run of another script, or of another version", pmnist.run, "--evaluate")
    assert_refused(capsys, 2, "--n_hidden None there, 100 here", pmnist.run)


def test_weights_of_another_network(pmnist, monkeypatch, capsys):
    pmnist.run("--n_tasks", "1")
    checkpoint = torch.load(pmnist.run_folder("short") / "checkpoint.pt", weights_only=True)
    checkpoint["results"]["finished"] = False
    torch.save(checkpoint, pmnist.run_folder("short") / "checkpoint.pt")
    monkeypatch.setattr(pmnist.script, "build_model", lambda args: pmnist.script.MLP(n_hidden=7, n_classes=10))
    for more in ([], ["--evaluate"]):
        assert_refused(capsys, 2, "holds the weights of another network .*size mismatch.*--run_name", pmnist.run, "--n_tasks", "1", *more)


def test_two_processes_on_one_run(pmnist, capsys):
    folder = pmnist.run()
    (folder / "checkpoint.pt").unlink()
    with open(folder / "log.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert_refused(capsys, 2, "another process is at work on .*short", pmnist.run)
    pmnist.run()


def test_a_file_system_without_locks(pmnist, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert results_of(pmnist.run())["finished"]
    assert "cannot be locked (Function not implemented): do not start the same run twice" in capsys.readouterr().err


@pytest.mark.parametrize("layer", [torch.nn.Linear(784, 10), torch.nn.Conv2d(4, 4, 3, bias=False, groups=2), torch.nn.Conv2d(4, 4, 3, bias=False, dilation=2),
                                   torch.nn.Conv2d(4, 4, 3, bias=False, padding="same"), torch.nn.Conv2d(4, 4, 3, bias=True),
                                   torch.nn.Conv2d(4, 4, 3, padding=1, bias=False, padding_mode="reflect")])
def test_a_network_that_cannot_be_projected(pmnist, layer, monkeypatch, capsys):
    monkeypatch.setattr(pmnist.script, "build_model", lambda args: torch.nn.Sequential(layer))
    assert_refused(capsys, 2, "layer 0 cannot be projected", pmnist.run)


@pytest.mark.parametrize("flags, pattern", [
    ("--threshold 0", r"--threshold must lie in \(0, 1\], not 0.0"),
    ("--threshold 1.01", r"--threshold must lie in \(0, 1\], not 1.01"),
    ("--threshold nan", r"--threshold must lie in \(0, 1\], not nan"),
    ("--threshold 0.9 0.9", "--threshold takes one value or one for each of the [0-9]+ layers .*, not 2"),
    ("--threshold 0.9 --threshold_increment 0.2", "exceed 1 within"),
    ("--threshold_increment -0.1", "--threshold_increment must be 0 or more"),
    ("--n_samples 0", "--n_samples must be at least 1"),
    ("--n_samples 5 5", "--n_samples takes one value or one for each"),
    ("--n_samples 100000", "--n_samples 100000 is more than the [0-9]+ training images"),
    ("--n_epochs 0", "--n_epochs must be at least 1"),
    ("--batch_size_train -3", "--batch_size_train must be at least 1"),
    ("--batch_size_test 0", "--batch_size_test must be at least 1"),
    ("--pc_valid 0", "--pc_valid must lie between 0 and 1"),
    ("--pc_valid 1", "--pc_valid must lie between 0 and 1"),
    ("--lr 0", "--lr must be a positive number"),
    ("--lr nan", "--lr must be a positive number"),
    ("--lr 1e-9 --lr_patience 1", "--lr_min .* is above --lr 1e-09"),
    ("--lr_factor 1", "--lr_factor must be above 1"),
    ("--lr_patience -1", "--lr_patience must be 0"),
    ("--momentum 1", r"--momentum must lie in \[0, 1\)"),
    ("--seed -1", "--seed must lie between"),
    ("--n_tasks 0", "--n_tasks must lie between 1 and (10|20|5)"),
    ("--n_tasks 21", "--n_tasks must lie between 1 and (10|20|5)"),
    ("--run_name a/b", "--run_name must be a folder's name"),
    ("--run_name ..", "--run_name must be a folder's name"),
    ("--run_name=", "--run_name must be a folder's name"),
    ("--threshold_increment inf --n_tasks 1", "--threshold_increment must be 0 or more"),
    ("--device cuda:77", "--device cuda:77 cannot be used"),
    ("--device tpu", "--device tpu cannot be used"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--epochs 3", "unrecognized arguments: --epochs 3"),
    ("--overwrite --evaluate", "not allowed with argument"),
])
def test_wrong_input_ends_in_one_line(pmnist, flags, pattern, capsys):
    assert_refused(capsys, 2, pattern, lambda: pmnist.run(*flags.split()))
    assert not list(pmnist.folder.rglob("*.pt"))


def test_wrong_input_of_one_script(tmp_path, capsys):
    superclass, pmnist = (importlib.import_module(name) for name in ("main_cifar100_superclass", "main_pmnist"))
    assert_refused(capsys, 2, "--t_order: invalid choice: 5", superclass.parse_args, ["--t_order", "5"])
    assert_refused(capsys, 2, "--n_hidden must be at least 1", pmnist.parse_args, ["--n_hidden", "0"])


def test_a_batch_of_one_cannot_be_normalised(cifar100, capsys):
    # 200 images a task: 10 for validation, 190 for training, 40 for the test
    assert_refused(capsys, 2, "--batch_size_train 63 leaves a batch of one of 190 images", cifar100.run, "--batch_size_train", "63")
    assert_refused(capsys, 2, "--batch_size_test 9 leaves a batch of one of 10 images", cifar100.run, "--batch_size_test", "9")
    assert_refused(capsys, 2, "--batch_size_test 1 leaves a batch of one", cifar100.run, "--batch_size_test", "1")
    assert_refused(capsys, 2, "--n_samples 1 is a batch of one image", cifar100.run, "--n_samples", "1")


def test_a_folder_that_cannot_be_made(pmnist, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert_refused(capsys, 2, "cannot write to .*; choose another --models_dir", pmnist.run, "--models_dir", str(tmp_path / "file"))


def test_missing_data(bench, tmp_path, monkeypatch, capsys):
    def unavailable(*args):
        raise raw.Unavailable("no network in this test")

    monkeypatch.setattr(raw, "download", unavailable)
    monkeypatch.setattr(raw, "read_package", unavailable)
    with pytest.raises(SystemExit) as stop:
        bench.run("--data_dir", str(tmp_path / "elsewhere"), "--n_tasks", "5")
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"{bench.script.__name__}.py: error: " in message and "no network in this test" in message
    assert all(f"no images of {name}" in message and f"{name}.npz" in message for name in bench.arrays)


def test_a_loss_that_is_no_number_ends_the_run(pmnist, capsys):
    assert_refused(capsys, 1, "the loss became (nan|inf) in epoch 1 of task 1: try a smaller --lr", pmnist.run, "--lr", "1e30")


def test_a_loss_that_overflows_in_the_last_step(pmnist, capsys):
    flags = ("--batch_size_train", "300", "--lr", "1e30", "--n_epochs", "1")  # one step: the training loss is that before it
    assert_refused(capsys, 1, "the loss became (nan|inf) in epoch 1 of task 1", pmnist.run, *flags)


def test_a_full_disk_ends_the_run_and_loses_nothing(pmnist, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(pmnist.script, "write_figure", lambda *args: sys.exit(9))
        with pytest.raises(SystemExit):
            pmnist.run()
    folder = pmnist.run_folder("short")
    before = (folder / "checkpoint.pt").read_bytes()
    os.symlink("/dev/full", folder / "checkpoint.pt.part")
    assert_refused(capsys, 1, "cannot write .*checkpoint.pt: .*No space left", pmnist.run)
    assert (folder / "checkpoint.pt").read_bytes() == before and not (folder / "checkpoint.pt.part").is_symlink()
    pmnist.run()
    assert results_of(folder)["finished"]


def test_scripts_run_from_any_folder(pmnist, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{pmnist.script.__name__}.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    for flag in ("--threshold_increment", "--evaluate"):
        assert flag in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("flags", ["", "--momentum 0.9"])
def test_a_run_on_cuda_resumes(bench, flags, monkeypatch, capsys):
    """Ended within task 2, where bases, velocity and the GPU's random numbers matter; a GPU's sums are equal up to their order."""
    flags = ["--device", "cuda", *flags.split()]
    whole = bench.run(*flags, models="whole")
    train_epoch, epochs = bench.script.train_epoch, itertools.count(1)
    with monkeypatch.context() as patch:  # two epochs per task: the fourth does not take place
        patch.setattr(bench.script, "train_epoch", lambda *args: sys.exit(9) if next(epochs) == 4 else train_epoch(*args))
        with pytest.raises(SystemExit):
            bench.run(*flags)
    capsys.readouterr()
    resumed = bench.run(*flags)
    assert "going on with task 2 after epoch 1" in capsys.readouterr().out
    assert results_of(resumed)["device"]["type"] == "cuda" and results_of(resumed)["finished"]
    a, b = (torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True) for folder in (whole, resumed))
    assert a["random"].keys() == b["random"].keys() == {"cpu", "cuda"}
    assert all(torch.equal(a["random"][kind], b["random"][kind]) for kind in a["random"])
    for name, W in a["model"].items():
        torch.testing.assert_close(b["model"][name], W, rtol=0, atol=1e-3 * W.abs().max().item())
