"""Runs that were killed and go on, and those that must not go on."""

import errno
import fcntl
import math
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from bench import Bench, assert_equal_runs, assert_refused, results_of
from data_files import small_arrays, write_npz

OTHER_CODE = "note: this run began with different code"


@pytest.fixture
def pmnist(tmp_path):
    return Bench("main_pmnist", tmp_path)


def contents(folder):
    """{name: content} of the files in the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Killed -------------------------------------------------------------------------------------------
def failing_replace(n_files, written):
    """Path.replace, for n_files files; it ends the program in place of the next one."""
    replace = Path.replace

    def call(source, target):
        if len(written) == n_files:
            sys.exit()
        written.append(target)
        return replace(source, target)

    return call


def run_killed_at(bench, monkeypatch, n_files, flags, models):
    """Run main until n_files files are written, or to the end. Returns their paths."""
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing_replace(n_files, written))
        try:
            bench.run(*flags.split(), models=models)
        except SystemExit:
            assert len(written) == n_files
    return written


ALL = range(100)
IN_TASK_2 = [7, 8]  # 7: the checkpoint is still one of task 1. 8: it is one of task 2


@pytest.mark.parametrize(
    "name, flags, save_seconds, moments",
    [
        ("main_pmnist", "", 30, ALL),
        ("main_pmnist", "--momentum 0.9", 0, ALL),
        ("main_cifar100", "--lr_patience 1", 0, [8]),
        ("main_cifar100_superclass", "", 0, IN_TASK_2),
        ("main_five_datasets", "", 0, [8]),
    ],
)
def test_killed_at_any_file(name, flags, save_seconds, moments, tmp_path, monkeypatch):
    """moments: numbers of files that are written before the run is killed."""
    bench = Bench(name, tmp_path)
    monkeypatch.setattr(bench.script, "SAVE_SECONDS", save_seconds)
    written = run_killed_at(bench, monkeypatch, math.inf, flags, "whole")
    # Both files after each task, and with SAVE_SECONDS 0 after each of its two epochs as well.
    per_task = 2 if save_seconds else 6
    assert len(written) == bench.args().n_tasks * per_task
    for n_files in moments[: len(written)]:
        models = f"killed_{n_files}"
        run_killed_at(bench, monkeypatch, n_files, flags, models)
        resumed = bench.run(*flags.split(), models=models)
        assert_equal_runs(bench.run_folder(models="whole"), resumed)


def read_epochs(process, n):
    """Read what the process prints until it has finished n epochs."""
    while n > 0:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        n -= "train loss" in line


def test_kill_9(pmnist, capsys):
    """Each time the run goes on from the end of a task, since SAVE_SECONDS is 30."""
    flags = ["--n_epochs", "30", "--n_tasks", "3"]
    whole = pmnist.run(*flags, models="whole")
    for n_epochs in 35, 15:  # to task 2; from the start of task 2
        process = pmnist.process(*flags)
        read_epochs(process, n_epochs)
        process.kill()
        process.communicate()
    resumed = pmnist.run(*flags)
    assert ", from task 2, epoch 1\n" in capsys.readouterr().out
    assert_equal_runs(whole, resumed)


def take_sigint():
    """Stop ignoring SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c(pmnist):
    """It ends with a line, and by the signal, so that a shell's loop over seeds ends as well."""
    # These tests may run in the background of a shell, where processes ignore SIGINT.
    process = pmnist.process("--n_epochs", "200", preexec_fn=take_sigint)
    read_epochs(process, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert err == "interrupted: the same command continues from the last checkpoint\n"
    assert process.returncode == -signal.SIGINT


# Other code ---------------------------------------------------------------------------------------
def test_other_code_is_noted(pmnist, monkeypatch, capsys):
    pmnist.stop(monkeypatch)
    pmnist.stop(monkeypatch, after_epochs=0)  # resumed by the same code
    assert OTHER_CODE not in capsys.readouterr().out
    pmnist.edit("MLP 784-100-100-10", "A multilayer perceptron")  # in the docstring
    pmnist.stop(monkeypatch, after_epochs=0)
    assert OTHER_CODE not in capsys.readouterr().out

    pmnist.edit("SAVE_SECONDS = 30", "SAVE_SECONDS = 31")
    folder = pmnist.run()
    assert capsys.readouterr().out.count(OTHER_CODE) == 1
    codes = [origin["code"] for origin in results_of(folder)["origins"]]
    assert codes[-1] == pmnist.script.digest_of_code()
    assert len(set(codes)) == 2


def test_other_code_is_noted_by_a_finished_run(pmnist, capsys):
    before = contents(pmnist.run())
    pmnist.run()
    assert OTHER_CODE not in capsys.readouterr().out
    pmnist.edit("return G - G @ M @ M.T", "return G")
    folder = pmnist.run()
    assert capsys.readouterr().out.count(OTHER_CODE) == 1
    assert contents(folder) == before


def test_each_commit_that_worked_on_a_run_is_in_the_result(pmnist, monkeypatch):
    a = {"code": "a", "commit": "", "dirty": False, "device": {"name": "cpu"}}
    b = a | {"code": "b"}
    monkeypatch.setattr(pmnist.script, "provenance", Mock(side_effect=[a, b, b, a]))
    pmnist.stop(monkeypatch)
    pmnist.stop(monkeypatch, after_epochs=0)
    folder = pmnist.run()
    assert results_of(folder)["origins"] == [a, b]
    folder = pmnist.run()  # finished: nothing is written
    assert results_of(folder)["origins"] == [a, b]


FC3 = "self.fc3 = ProjectedLinear(n_hidden, n_classes)"


@pytest.mark.parametrize(
    "new, pattern",
    [
        (
            f"{FC3}; self.scale = nn.Parameter(torch.ones(3))",
            "different network .*Missing.*scale",
        ),
        (f"{FC3}; self.extra = nn.Linear(3, 3)", "different network .*Missing.*extra.weight"),
        (f"{FC3}; self.fc2 = nn.Linear(100, 100)", "different args .*threshold.* there"),
        (f"{FC3}; self.fc4 = ProjectedLinear(5, 5)", "different args .*threshold.* there"),
        ("self.fc3 = ProjectedLinear(n_hidden, 20)", "different network .*size mismatch"),
        (
            "self.out = ProjectedLinear(n_hidden, 10)",
            r"different widths \(fc3 100 there, None",
        ),
    ],
)
def test_another_network_is_refused(pmnist, new, pattern, monkeypatch, capsys):
    before = contents(pmnist.stop(monkeypatch, "--threshold", "0.9"))
    pmnist.edit(FC3, new)
    pattern = f"short holds a run with (a )?{pattern}.*: choose another"
    assert_refused(capsys, 2, pattern, pmnist.run, "--threshold", "0.9")
    assert contents(pmnist.run_folder()) == before


def test_progress_of_another_form_is_refused(pmnist, monkeypatch, capsys):
    pmnist.stop(monkeypatch)
    pmnist.edit("waited: int = 0", "patience: int = 0")
    assert_refused(capsys, 2, "a different network .*'waited'.*: choose another", pmnist.run)


# Other arguments and data -------------------------------------------------------------------------
def test_other_arguments_are_refused_and_named(pmnist, capsys):
    before = contents(pmnist.run())
    pattern = r"different args \(lr 0\.01 there, 0\.005 here; n_hidden 100 there, 7 here\): choose"
    assert_refused(capsys, 2, pattern, pmnist.run, "--lr", "0.005", "--n_hidden", "7")
    assert contents(pmnist.run_folder()) == before


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_other_data_are_refused(pmnist, key, state, monkeypatch, capsys):
    """The numbers of images are the same."""
    folder = pmnist.run() if state == "finished" else pmnist.stop(monkeypatch)
    before = contents(folder)
    other = {name: array.copy() for name, array in pmnist.arrays["mnist"].items()}
    other[key].flat[0] = (other[key].flat[0] + 1) % 10
    write_npz(pmnist.folder / "data", "mnist", other)
    pattern = r"different data \(permutation 1 \w+ there, \w+ here; permutation 2 .*choose another"
    assert_refused(capsys, 2, pattern, pmnist.run)
    assert contents(folder) == before


def test_fewer_data_are_refused(pmnist, capsys):
    pmnist.run()
    write_npz(pmnist.folder / "data", "mnist", small_arrays("mnist", 290, 60))
    assert_refused(capsys, 2, "different data", pmnist.run)


def test_test_images_in_another_order_are_the_same_data(pmnist, monkeypatch):
    whole = pmnist.run(models="whole")
    pmnist.stop(monkeypatch)
    arrays = pmnist.arrays["mnist"]
    by_class = np.argsort(arrays["y_test"])
    for key in "x_test", "y_test":
        arrays[key] = arrays[key][by_class]
    write_npz(pmnist.folder / "data", "mnist", arrays)
    assert_equal_runs(whole, pmnist.run())


def test_the_same_data_from_another_place(pmnist, monkeypatch):
    whole = pmnist.run(models="whole")
    pmnist.stop(monkeypatch)
    write_npz(pmnist.folder / "data", "mnist", pmnist.arrays["mnist"], note="from elsewhere")
    resumed = results_of(pmnist.run())
    assert resumed["accuracy_matrix"] == results_of(whole)["accuracy_matrix"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02."])
def test_a_damaged_checkpoint_is_named(pmnist, content, capsys):
    folder = pmnist.run()
    (folder / "checkpoint.pt").write_bytes(content)
    pattern = "checkpoint.pt cannot be read .*: remove the folder to start over"
    assert_refused(capsys, 2, pattern, pmnist.run)


# Two processes ------------------------------------------------------------------------------------
def test_a_second_process_is_refused(pmnist, capsys):
    flags = ["--n_epochs", "20"]
    process = pmnist.process(*flags)
    read_epochs(process, 1)
    process.send_signal(signal.SIGSTOP)  # it would soon be finished
    try:
        pattern = "another process is at work in .*short: wait, or choose another --run_name"
        assert_refused(capsys, 2, pattern, pmnist.run, *flags)
    finally:
        process.kill()
        process.communicate()
    assert results_of(pmnist.run(*flags))["finished"]  # its lock ended with the process


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(pmnist, number, monkeypatch):
    no_locks = OSError(number, "no locks on this file system")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=no_locks))
    assert results_of(pmnist.run())["finished"]
