"""The benchmark's check: both forms come to the same numbers, and a wrong one is named."""

import sys

import benchmark
import pytest
import torch


def check(name):
    first, last, _ = benchmark.assignments(name)
    benchmark.check(name, [first, last], torch.device("cpu"))


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_both_forms_agree(name):
    """At the first difference check ends the program, which the next test shows."""
    check(name)


def wrong_representation(layer, x):
    return 2 * x.T


def wrong_update(M, R, eps):
    return torch.eye(len(R)).to(R)


@pytest.mark.parametrize(
    "function, wrong, named",
    [
        (
            "main_pmnist.sgd_step",
            lambda optimizer: None,
            "task 1: weight after a step, fc1.weight",
        ),
        (
            "main_pmnist.project",
            lambda G, M: G,
            "task 10: weight after a step, fc1.weight",
        ),
        (
            "main_pmnist.ProjectedLinear.representation",
            wrong_representation,
            "task 1: representation matrix, fc1",
        ),
        ("benchmark.plain_update", wrong_update, "task 1: space of the basis, fc1"),
    ],
)
def test_a_difference_is_named(function, wrong, named, monkeypatch):
    monkeypatch.setattr(function, wrong)
    with pytest.raises(SystemExit, match=f"the two forms of pmnist differ on {named}"):
        check("pmnist")


def test_plain_layers_project_nothing():
    """The plain form must not profit from the scripts' layers."""
    form = benchmark.Form("cifar100", True, torch.device("cpu"))
    assert form.script.projected_layers(form.net) == {}
    kinds = {type(layer) for layer in form.layers.values()}
    assert kinds == {torch.nn.Linear, torch.nn.Conv2d}


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_ranks_come_from_a_reference_run(name):
    note = benchmark.assignments(name)[2]
    assert (benchmark.ROOT / "models" / "reference" / name / note.split("ranks of ")[1]).is_dir()


def test_the_table(capsys, monkeypatch):
    """On two batches of images."""
    shape = benchmark.BENCHMARKS["pmnist"][0]
    monkeypatch.setitem(benchmark.BENCHMARKS, "pmnist", (shape, 20, 2))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--benchmarks", "pmnist"])
    monkeypatch.setattr(benchmark, "race", lambda work, forms, device: [2.0, 0.5])
    benchmark.main()
    table = capsys.readouterr().out.splitlines()[2:8]
    assert table[0] == "| plain / here = ratio | pmnist |"
    assert table[3] == "| step of the last task | 1e+03 / 250 ms = 4.0 |"
    assert table[5] == "| update of the bases | 2 / 0.5 s = 4.0 |"


def test_wrong_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--benchmarks", "pmnist", "imagenet"])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2
    assert "error: argument --benchmarks: invalid choice: 'imagenet'" in capsys.readouterr().err
