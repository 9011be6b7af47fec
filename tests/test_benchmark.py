"""The benchmark's check, which must pass before anything is timed: both forms come to the same numbers, and a wrong one is named."""
import re

import pytest
import torch

import benchmark
from data_files import small_arrays, write_npz

CPU = torch.device("cpu")


@pytest.fixture
def data_dir(tmp_path):
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "notmnist"):
        write_npz(tmp_path, name, small_arrays(name, 100, 20))
    return tmp_path


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_both_forms_agree(name, data_dir, monkeypatch):
    """In all that is timed: same() ends the program at the first difference."""
    same, compared = benchmark.same, []
    monkeypatch.setattr(benchmark, "same", lambda what, *forms: compared.append(what) or same(what, *forms))
    benchmark.check(name, data_dir, CPU)
    assert set(compared) == {"inputs", "step on task 1", "step on the last task", "representation matrix", "space of the basis"}


@pytest.mark.parametrize("form, function, wrong, named", [
    ("Plain", "update_basis", lambda M, R, eps: torch.eye(len(R))[:, :3], "space of the basis"),
    ("Here", "representation_matrix", lambda layer, x: 2 * x.flatten(1).T, "representation matrix"),
    ("Here", "train", lambda self, n: None, "step on task 1"),
])
def test_a_difference_is_named(form, function, wrong, named, data_dir, monkeypatch, capsys):
    static = function != "train"
    monkeypatch.setattr(getattr(benchmark, form), function, staticmethod(wrong) if static else wrong)
    with pytest.raises(SystemExit) as stop:
        benchmark.check("pmnist", data_dir, CPU)
    assert stop.value.code == 1
    assert re.search(f"the two forms differ: {named} of fc", capsys.readouterr().err)
