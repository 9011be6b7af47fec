"""Short runs of the scripts on small data, for tests."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from data_files import small_arrays, write_npz

ROOT = Path(__file__).parents[1]


class Short(NamedTuple):
    """What makes a run of a script short."""

    sets: list  # names of its data sets
    n_train: int  # images in the small version of each
    n_test: int
    flags: str


FIVE_SETS = ["cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"]
SHORT = {
    "main_pmnist": Short(["mnist"], 300, 60, "--n_tasks 2 --n_epochs 2 --n_samples 30"),
    "main_cifar100": Short(["cifar100"], 2000, 400, "--n_tasks 2 --n_epochs 2 --n_samples 6"),
    "main_cifar100_superclass": Short(
        ["cifar100"], 2000, 400, "--n_tasks 3 --n_epochs 2 --n_samples 6"
    ),
    "main_five_datasets": Short(FIVE_SETS, 80, 30, "--n_tasks 2 --n_epochs 2 --n_samples 6"),
}


class Bench:
    """A script with small data in a folder of its own."""

    def __init__(self, name, folder):
        self.script = load_script(ROOT / f"{name}.py")
        self.folder = folder
        self.short = SHORT[name]
        self.arrays = {}
        (folder / "data").mkdir()
        for data_set in self.short.sets:
            self.arrays[data_set] = small_arrays(data_set, self.short.n_train, self.short.n_test)
            write_npz(folder / "data", data_set, self.arrays[data_set])

    def edit(self, old, new, name=None):
        """Replace the script by an edited copy, in a folder that is not a checkout."""
        path = Path(self.script.__file__)
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1
        copy = self.folder / f"{name or path.stem}.py"
        copy.write_text(text.replace(old, new), encoding="utf-8")
        self.script = load_script(copy)

    def flags(self, *more, models="models"):
        """The flags of a short run; more of them may follow."""
        places = {
            "run_name": "short",
            "device": "cpu",
            "data_dir": self.folder / "data",
            "models_dir": self.folder / models,
        }
        flags = self.short.flags.split()
        for flag, value in places.items():
            flags += [f"--{flag}", str(value)]
        return [*flags, *more]

    def args(self, *more, models="models"):
        """The parsed flags of a short run."""
        return self.script.parse_args(self.flags(*more, models=models))

    def run(self, *more, models="models"):
        """Run main; returns the run's folder."""
        args = self.args(*more, models=models)
        self.script.main(args)
        return self.run_folder(args.run_name, models)

    def run_folder(self, run_name="short", models="models"):
        """The folder of a run."""
        name = Path(self.script.__file__).stem.removeprefix("main_")
        return self.folder / models / name / run_name

    def process(self, *more, models="models", **options):
        """Start the script in a process of its own. options: those of subprocess.Popen."""
        command = [sys.executable, self.script.__file__, *self.flags(*more, models=models)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, text=True, stdout=pipe, stderr=pipe, **options
        )

    def program(self, monkeypatch, *more):
        """Run the script as python does, with its handling of exceptions, but in this process."""
        monkeypatch.setattr(sys, "argv", [self.script.__file__, *self.flags(*more)])
        runpy.run_path(self.script.__file__, run_name="__main__")

    def stop(self, monkeypatch, *more, models="models", after_epochs=3):
        """Run main, with a checkpoint after each epoch, and stop it. Returns the run's folder.

        after_epochs: 3 is in the middle of task 2.
        """
        train_epoch = stopping(self.script.train_epoch, after_epochs)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(self.script, "SAVE_SECONDS", 0)
            patch.setattr(self.script, "train_epoch", train_epoch)
            self.run(*more, models=models)
        return self.run_folder(models=models)


def load_script(path):
    """Import a script from its path. Each call makes a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def stopping(function, n_calls):
    """The function, which ends the program when it is called once more than n_calls times."""
    calls = []

    def call(*args):
        calls.append(args)
        if len(calls) > n_calls:
            sys.exit()
        return function(*args)

    return call


def results_of(folder):
    """results.json but for the time, which may differ between equal runs."""
    results = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in results.items() if key != "seconds"}


def checkpoint_of(folder):
    """The content of checkpoint.pt, on the CPU."""
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)


def assert_equal_runs(a, b):
    """The two folders hold the same results, weights, bases and random numbers, bit for bit.

    origins are left out: they name the loaders that a process has imported, and here tests of
    other benchmarks import more of them.
    """
    assert results_of(a) | {"origins": []} == results_of(b) | {"origins": []}
    a, b = checkpoint_of(a), checkpoint_of(b)
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    assert len(a["random"]) == len(b["random"])
    assert all(map(torch.equal, a["random"], b["random"]))


def assert_refused(capsys, status, pattern, function, *args):
    """The call ends the program with this status and a line on stderr that has the pattern."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    captured = capsys.readouterr()
    assert stop.value.code == status
    assert re.fullmatch(rf"main_\w+\.py: error: .*{pattern}.*\n", captured.err), captured.err
    return captured.out
