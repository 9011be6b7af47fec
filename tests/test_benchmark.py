"""The benchmark's check before anything is timed: both forms come to the same numbers, and a wrong one is named."""
import pytest
import torch

import benchmark


def check(name):
    benchmark.check(name, benchmark.tasks_of(name)[0], torch.device("cpu"))


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_both_forms_agree(name):
    """At the first difference check ends the program, which the next test shows."""
    assert check(name) is None


@pytest.mark.parametrize("function, wrong, named", [
    ("main_pmnist.sgd_step", lambda optimizer: None, "task 1: weight after a step, fc1.weight"),
    ("main_pmnist.project", lambda G, M: G, "task 10: weight after a step, fc1.weight"),
    ("main_pmnist.representation_matrix", lambda layer, x: 2 * x.T, "task 1: representation matrix, fc1"),
    ("benchmark.plain_update", lambda M, R, eps: torch.eye(len(R)).to(R), "task 1: space of the basis, fc1"),
])
def test_a_difference_is_named(function, wrong, named, monkeypatch):
    monkeypatch.setattr(function, wrong)
    with pytest.raises(SystemExit, match=f"the two forms of pmnist differ on {named}"):
        check("pmnist")
