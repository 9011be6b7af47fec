"""tests/benchmark.py: both forms come to the same numbers, a difference ends it, the table is complete."""
import re

import pytest
import torch

import benchmark
from data_files import small_arrays, write_npz

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data_dir(tmp_path):
    for name in benchmark.SETS:
        write_npz(tmp_path, name, small_arrays(name, 400, 100))
    return tmp_path


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_both_forms_come_to_the_same_numbers(name, data_dir):
    benchmark.check(name, data_dir, CPU)


def without_projection(model, task, x, y, projections, optimizer, batch_size):
    train(model, task, x, y, {}, optimizer, batch_size)


train, update_basis = benchmark.plain_train, benchmark.plain_update_basis
DIFFERENCES = {
    "step on the last task of fc1.weight": (benchmark, "plain_train", without_projection),
    "representation matrix of fc1": (benchmark.Plain, "representation_matrix", staticmethod(lambda layer, x: 1.001 * x.T)),
    "space of the basis of fc1": (benchmark.Plain, "update_basis", staticmethod(lambda M, R, eps: update_basis(M, R, eps)[:, :-1])),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_difference_ends_it(what, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(*DIFFERENCES[what])
    with pytest.raises(SystemExit) as end:
        benchmark.check("pmnist", data_dir, CPU)
    assert end.value.code == 1
    assert f"the two forms differ: {what}, by " in capsys.readouterr().err


def test_other_images_end_it(data_dir, monkeypatch, capsys):
    (name, loader, plain), *_ = benchmark.BENCHMARKS["pmnist"].inputs
    other = benchmark.BENCHMARKS["pmnist"]._replace(inputs=[(name, loader, lambda images: plain(255 - images))])
    monkeypatch.setitem(benchmark.BENCHMARKS, "pmnist", other)
    with pytest.raises(SystemExit):
        benchmark.check("pmnist", data_dir, CPU)
    assert "the two forms differ: inputs of mnist" in capsys.readouterr().err


def test_table(data_dir, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "LEAST", 0.0)
    monkeypatch.setattr(benchmark, "own_process", lambda function, *args: function(*args))  # one that knows of the line above
    benchmark.main(benchmark.parse_args(["--benchmarks", "pmnist", "--data_dir", str(data_dir)]))
    out = capsys.readouterr().out
    rows = re.findall(r"^\| pmnist \| ([^|]+?)(?:, 360 images)? \| [\d,.]+ (?:s|ms|µs|MB) \| [\d,.]+ (?:s|ms|µs|MB) \| [\d.]+ \|$", out, re.MULTILINE)
    assert rows == ["loading all tasks", "step of task 1", "step of the last task", "epoch of the last task", "representation matrices",
                    "update of the bases", "peak memory"]
    assert re.search(r"^pmnist: here a step of the last task takes \d\.\d\d times one of task 1; bases of \d\d % of GPM_Max, ranks from ", out, re.MULTILINE)
    assert "random images" not in out


def test_random_images_where_there_are_none(data_dir, tmp_path):
    (data_dir / "notmnist.npz").unlink()
    folder = tmp_path / "gathered"
    folder.mkdir()
    assert benchmark.gather_data(["mnist"], data_dir, folder) == (data_dir, [])
    assert benchmark.gather_data(["mnist", "notmnist"], data_dir, folder) == (folder, ["notmnist"])
    assert len(benchmark.load_raw("mnist", folder).x_train) == 400
    assert benchmark.load_raw("notmnist", folder).complete


@pytest.mark.parametrize("argv", [["--benchmarks", "imagenet"], ["--device", "mps"], ["--n_epochs", "3"]])
def test_wrong_flags_end_in_one_line(argv, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.parse_args(argv)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("benchmark.py: error: ") and err.count("\n") == 1
