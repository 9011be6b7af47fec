"""Whole runs of the scripts on small files: results, output, names of runs."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from bench import ROOT, SHORT, Bench, load_script, results_of
from data_files import write_own_files

from dataloader import raw

KEYS = [
    "format",
    "benchmark",
    "script",
    "args",
    "changed",
    "data",
    "origins",
    "widths",
    "accuracy_matrix",
    "ACC",
    "BWT",
    "ranks",
    "memory",
    "history_columns",
    "history",
    "seconds",
    "finished",
]
COLUMNS = ["task", "epoch", "lr", "train_loss", "valid_loss", "valid_accuracy"]
PLACES = ("device", "data_dir", "models_dir", "run_name", "changed")
EPOCH = r"^task .* epoch .* train loss .* valid loss .* lr .* s$"


@pytest.fixture(params=SHORT)
def bench(request, tmp_path):
    return Bench(request.param, tmp_path)


@pytest.fixture
def pmnist(tmp_path):
    return Bench("main_pmnist", tmp_path)


# A whole run --------------------------------------------------------------------------------------
def test_a_run_on_the_released_files(bench, monkeypatch, capsys):
    for name, arrays in bench.arrays.items():
        (bench.folder / "data" / f"{name}.npz").unlink()
        write_own_files(bench.folder / "data", name, arrays, monkeypatch)
    # 5-Datasets reads only as many sets as it has tasks.
    more = ["--n_tasks", "5"] if len(bench.arrays) == 5 else []
    args = bench.args(*more)
    folder = bench.run(*more)
    printed = capsys.readouterr().out
    content = (folder / "results.json").read_bytes()
    results = json.loads(content)

    check_head(results, bench, args)
    check_accuracies(results, args.n_tasks)
    check_bases(results, args.n_tasks)
    check_history(results, args.n_tasks)
    assert len(re.findall(EPOCH, printed, re.MULTILINE)) == 2 * args.n_tasks
    numbers = [f"ACC {results['ACC']:.2f}", f"BWT {results['BWT']:.2f}"]
    assert printed.splitlines()[-2:] == numbers  # without the paper's
    assert printed.splitlines()[-3].startswith("not comparable with the paper: --n_epochs, --n_s")
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["checkpoint.pt", "lock", "results.json"]

    bench.run(*more)  # the same command prints the result again, and writes nothing
    again = capsys.readouterr().out
    assert ", finished\n" in again
    assert again.splitlines()[-3:] == printed.splitlines()[-3:]
    assert (folder / "results.json").read_bytes() == content


def check_head(results, bench, args):
    """What results.json says of the script, its flags, its data and what it ran on."""
    name = Path(bench.script.__file__).stem
    assert list(results) == KEYS
    assert results["format"] == 2
    assert results["script"] == name
    assert results["benchmark"] == name.removeprefix("main_")
    flags = {flag: value for flag, value in vars(args).items() if flag not in PLACES}
    layers = len(results["widths"])
    assert results["args"] == flags | {
        "threshold": (args.threshold * layers)[:layers],
        "n_samples": (args.n_samples * layers)[:layers],
    }
    short = {flag: getattr(args, flag) for flag in ("n_epochs", "n_samples", "n_tasks")}
    if args.n_tasks == bench.script.N_TASKS:
        del short["n_tasks"]
    assert results["changed"] == short

    for task in results["data"].values():
        assert list(task) == ["set", "source", "complete", "digest", "train", "valid", "test"]
        assert task["source"] == "released files in the data folder"
        assert task["complete"] is False
        assert re.fullmatch("[0-9a-f]{16}", task["digest"])
    assert {task["set"] for task in results["data"].values()} == set(bench.arrays)
    assert len(results["data"]) == args.n_tasks

    (origin,) = results["origins"]
    assert list(origin) == ["code", "commit", "dirty", "versions", "device"]
    assert origin["code"] == bench.script.digest_of_code()
    assert re.fullmatch("([0-9a-f]{40})?", origin["commit"])
    assert isinstance(origin["dirty"], bool)
    assert origin["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    assert origin["device"]["type"] == "cpu"
    assert origin["device"]["name"]
    assert origin["device"]["threads"] == 1


def check_accuracies(results, n_tasks):
    """The matrix is null above the diagonal; ACC and BWT are worked out from it."""
    matrix = results["accuracy_matrix"]
    assert [len(row) for row in matrix] == [n_tasks] * n_tasks
    for t, row in enumerate(matrix):
        assert row[t + 1 :] == [None] * (n_tasks - t - 1)
        assert all(0 <= accuracy <= 100 for accuracy in row[: t + 1])
    last = matrix[-1]
    learned = [matrix[t][t] for t in range(n_tasks)]
    change = np.subtract(last, learned)[:-1]
    assert results["ACC"] == pytest.approx(np.mean(last))
    assert results["BWT"] == pytest.approx(np.mean(change))
    assert results["finished"] is True
    assert results["seconds"] > 0


def check_bases(results, n_tasks):
    """Ranks grow up to the widths; memory is their share of GPM_Max."""
    widths, ranks = results["widths"], results["ranks"]
    assert len(ranks) == len(results["memory"]) == n_tasks
    for earlier, later in zip(ranks, ranks[1:], strict=False):
        for name, width in widths.items():
            assert 0 < earlier[name] <= later[name] <= width
    for of_task, memory in zip(ranks, results["memory"], strict=True):
        used = sum(rank * widths[name] for name, rank in of_task.items())
        most = sum(width**2 for width in widths.values())
        assert memory == pytest.approx(100 * used / most)


def check_history(results, n_tasks):
    """A row per epoch, losses and accuracy to four digits."""
    assert results["history_columns"] == COLUMNS
    epochs = [row[:2] for row in results["history"]]
    assert epochs == [[t + 1, epoch] for t in range(n_tasks) for epoch in (1, 2)]
    for row in results["history"]:
        assert len(row) == len(COLUMNS)
        assert row[2] == results["args"]["lr"]
        assert row[3:] == [round(value, 4) for value in row[3:]]


def test_flags_reach_the_training(pmnist):
    """Those that no run of test_reference.py changes."""
    base = results_of(pmnist.run())
    changes = {"seed": "5", "momentum": "0.5", "n_hidden": "50", "pc_valid": "0.2"}
    for flag, value in changes.items():
        other = results_of(pmnist.run(f"--{flag}", value, "--run_name", flag))
        assert other["history"] != base["history"], flag
        assert other["ranks"] != base["ranks"], flag


def test_threshold_0_projects_nothing(pmnist):
    flags = ["--threshold", "0", "--threshold_increment", "0.4"]
    results = results_of(pmnist.run(*flags))
    assert results["ranks"] == [{"fc1": 0, "fc2": 0, "fc3": 0}] * 2


# Code ---------------------------------------------------------------------------------------------
def test_a_copy_is_a_script_of_its_own(pmnist):
    pmnist.edit("return G - G @ M @ M.T", "return G", name="main_pmnist_mine")
    folder = pmnist.run()
    results = results_of(folder)
    assert folder == pmnist.folder / "models" / "pmnist_mine" / "short"
    assert (results["script"], results["benchmark"]) == ("main_pmnist_mine", "pmnist")
    assert results["origins"][0]["commit"] == ""  # outside of a checkout
    assert results["origins"][0]["dirty"] is False


def test_an_edited_default_is_other_code_with_other_args(pmnist):
    before = results_of(pmnist.run())
    pmnist.edit('default=0.01, help="learning rate', 'default=0.02, help="learning rate')
    after = results_of(pmnist.run(models="edited"))
    assert (before["args"]["lr"], after["args"]["lr"]) == (0.01, 0.02)
    assert "lr" not in after["changed"]
    assert after["origins"][0]["code"] != before["origins"][0]["code"]


def test_the_docstring_is_no_code(pmnist):
    before = pmnist.script.digest_of_code()
    pmnist.edit("measured    ", "measured    by us: ")
    assert pmnist.script.digest_of_code() == before


# Beside the paper ---------------------------------------------------------------------------------
SHORT_PROTOCOL = {
    "main_pmnist": [
        ("N_TASKS = 10", "N_TASKS = 2"),
        ('default=5, help="maximum', 'default=2, help="maximum'),
        ("default=[300]", "default=[30]"),
    ],
    "main_cifar100_superclass": [
        ("N_TASKS = 20", "N_TASKS = 3"),
        ('default=50, help="maximum', 'default=2, help="maximum'),
        ("default=[24, 100, 125, 125]", "default=[6]"),
    ],
}


def make_comparable(bench):
    """Take a copy of the script with defaults that make a short run, as if it were published."""
    for old, new in SHORT_PROTOCOL[Path(bench.script.__file__).stem]:
        bench.edit(old, new)
    publish(bench, bench.script.digest_of_code())


def publish(bench, digest):
    """Write the digest into the docstring of the bench's copy of the script."""
    (line,) = re.findall(r"^code .*", bench.script.__doc__, re.MULTILINE)
    bench.edit(line, f"code        {digest}")


def make_complete(bench, monkeypatch):
    """Make the bench's small data sets as large as the official ones."""
    for name in bench.arrays:
        official = raw.SETS[name]._replace(n_train=bench.short.n_train, n_test=bench.short.n_test)
        monkeypatch.setitem(raw.SETS, name, official)


@pytest.fixture
def comparable(pmnist, monkeypatch):
    """pmnist, with a script whose short run is comparable with the paper."""
    make_comparable(pmnist)
    make_complete(pmnist, monkeypatch)
    return pmnist


def last_lines(capsys):
    """What a run printed last, without the numbers of the run itself."""
    lines = capsys.readouterr().out.splitlines()[-3:]
    return [re.sub(r"^(ACC|BWT) -?[\d.]+", r"\1", line) for line in lines]


def test_a_run_of_the_protocol_is_set_beside_the_paper(comparable, capsys):
    folder = comparable.run()
    assert results_of(folder)["changed"] == {}
    rank, *numbers = last_lines(capsys)
    assert rank.startswith("  rank ")
    assert numbers == ["ACC   (paper: 93.91 ± 0.16)", "BWT   (paper: -3 ± 0)"]


def test_changed_flags_do_not_compare(comparable, capsys):
    comparable.run("--lr", "0.02", "--pc_valid", "0.2")
    reasons = "not comparable with the paper: --pc_valid, --lr"
    assert last_lines(capsys) == [reasons, "ACC", "BWT"]


def test_incomplete_data_do_not_compare(comparable, monkeypatch, capsys):
    monkeypatch.setitem(raw.SETS, "mnist", raw.SETS["mnist"]._replace(n_train=301))
    comparable.run()
    reasons = "not comparable with the paper: incomplete mnist"
    assert last_lines(capsys) == [reasons, "ACC", "BWT"]


def test_missing_test_images_alone_do_compare(comparable, monkeypatch, capsys):
    monkeypatch.setitem(raw.SETS, "mnist", raw.SETS["mnist"]._replace(n_test=100))
    comparable.run()
    assert "(paper: 93.91 ± 0.16)" in capsys.readouterr().out


def test_correct_images_do_not_compare(tmp_path, monkeypatch, capsys):
    superclass = Bench("main_cifar100_superclass", tmp_path)
    make_comparable(superclass)
    make_complete(superclass, monkeypatch)
    superclass.run()
    reasons = "not comparable with the paper: no --official_data"
    assert last_lines(capsys) == [reasons, "ACC", "BWT"]
    superclass.run("--official_data", "--run_name", "official")
    assert "(paper: 57.72, mean over 5 orders)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["main_pmnist", "main_pmnist_mine"])
def test_edited_code_does_not_compare(comparable, name, capsys):
    """Whether or not the edit was committed."""
    comparable.edit("return G - G @ M @ M.T", "return G", name=name)
    comparable.run()
    assert last_lines(capsys) == ["not comparable with the paper: edited code", "ACC", "BWT"]


def test_edited_defaults_do_not_compare(comparable, capsys):
    comparable.edit("default=0.01", "default=0.02")
    folder = comparable.run()
    assert results_of(folder)["changed"] == {}
    assert last_lines(capsys) == ["not comparable with the paper: edited code", "ACC", "BWT"]


def test_code_that_changed_during_a_run_does_not_compare(comparable, monkeypatch, capsys):
    published = comparable.script.__file__
    original = Path(published).read_text()
    comparable.edit("SAVE_SECONDS = 30", "SAVE_SECONDS = 31")
    comparable.stop(monkeypatch)
    Path(published).write_text(original)
    comparable.script = load_script(Path(published))
    comparable.run()
    assert last_lines(capsys) == ["not comparable with the paper: edited code", "ACC", "BWT"]


def git(folder, *command):
    """Run git in the folder; returns its output."""
    result = subprocess.run(["git", *command], cwd=folder, text=True, stdout=subprocess.PIPE)
    result.check_returncode()
    return result.stdout.strip()


def commit_all(folder):
    """Commit the code in the folder to a new repository."""
    git(folder, "init", "--quiet")
    git(folder, "add", "*.py")
    settings = ["user.name=nobody", "user.email=nobody@localhost", "commit.gpgsign=false"]
    options = [word for setting in settings for word in ("-c", setting)]
    git(folder, *options, "commit", "--quiet", "--message", "code")


def copy_loaders(bench):
    """Copy the loaders beside the copy of the script; a process of its own uses these."""
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dataloader", bench.folder / "dataloader", ignore=caches)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_and_whether_the_code_differs_from_it(comparable):
    copy_loaders(comparable)
    commit_all(comparable.folder)
    (comparable.folder / "README.md").touch()  # another file does not matter, a loader does
    clean = comparable.run()
    with open(comparable.folder / "dataloader" / "pmnist.py", "a") as loader:
        loader.write("# edited\n")
    edited = comparable.run("--run_name", "edited")
    commit = git(comparable.folder, "rev-parse", "HEAD")
    for folder, dirty in (clean, False), (edited, True):
        (origin,) = results_of(folder)["origins"]
        assert (origin["commit"], origin["dirty"]) == (commit, dirty)


def test_a_terminal_without_plus_minus(pmnist):
    make_comparable(pmnist)
    copy_loaders(pmnist)
    loader = pmnist.folder / "dataloader" / "raw.py"
    code = loader.read_text()
    assert '"mnist": Spec(60_000, 10_000,' in code
    loader.write_text(code.replace('"mnist": Spec(60_000, 10_000,', '"mnist": Spec(300, 60,'))
    digest = "import main_pmnist as script; print(script.digest_of_code())"
    command = [sys.executable, "-c", digest]
    publish(pmnist, subprocess.check_output(command, cwd=pmnist.folder, text=True).strip())
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONDONTWRITEBYTECODE": "1"}
    process = pmnist.process(env=environment)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "(paper: 93.91 ? 0.16)" in out


# Output -------------------------------------------------------------------------------------------
HEAD = r"""{folder}: {changed}, from task 1, epoch 1
\d{{4}}-\d\d-\d\d \d\d:\d\d on {host}, .+
without a basis: {layers}
"""


def head(bench, changed, layers):
    """The pattern of what a new run prints first."""
    return HEAD.format(
        folder=re.escape(str(bench.run_folder())),
        changed=re.escape(changed),
        host=re.escape(platform.node()),
        layers=re.escape(layers),
    )


def test_a_run_begins_with_what_it_is_going_to_do(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.script, "train_task", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        bench.run()
    changed = {"n_epochs": 2, "n_samples": bench.args().n_samples, "n_tasks": bench.args().n_tasks}
    heads = "no layer" if "pmnist" in bench.script.__file__ else "heads.*"
    assert re.search(head(bench, str(changed), heads), capsys.readouterr().out)


def test_a_plain_layer_within_the_network_is_named(pmnist, monkeypatch, capsys):
    pmnist.edit("self.fc2 = ProjectedLinear(n_hidden, n_hidden)", "self.fc2 = nn.Linear(100, 100)")
    monkeypatch.setattr(pmnist.script, "train_task", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        pmnist.run("--threshold", "0.95")
    assert "\nwithout a basis: fc2\n" in capsys.readouterr().out


def test_each_epoch_and_task_is_printed_at_once(pmnist, monkeypatch):
    flush = Mock()
    monkeypatch.setattr("sys.stdout.flush", flush)
    pmnist.run("--n_epochs", "7")
    assert flush.call_count == 1 + 2 * (7 + 1)  # the head, and for each task its epochs and itself


def test_help_shows_the_defaults(bench, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        bench.script.parse_args(["--help"])
    assert f"(default: {bench.script.N_TASKS})" in capsys.readouterr().out


# Names of runs ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, flags, name",
    [
        ("main_pmnist", "--n_tasks 10 --device cpu", "seed_2"),
        ("main_pmnist", "--n_samples 300 300 300", "seed_2"),
        ("main_pmnist", "--seed 3 --threshold 0.9 0.8 0.8", "seed_3_threshold_0.9_0.8_0.8"),
        ("main_pmnist", "--threshold 0 --lr 0.02", "seed_2_lr_0.02_threshold_0.0"),
        ("main_cifar100", "--run_name mine --lr 1", "mine"),
        ("main_cifar100_superclass", "", "seed_1_order_0"),
        (
            "main_cifar100_superclass",
            "--t_order 3 --official_data --lr 0.1",
            "seed_1_order_3_official_data_lr_0.1",
        ),
        ("main_five_datasets", "--official_data", "seed_37_official_data"),
    ],
)
def test_default_run_names(script, flags, name):
    parse_args = load_script(ROOT / f"{script}.py").parse_args
    assert parse_args(flags.split()).run_name == name


def test_a_long_run_name_is_cut_and_stays_unique(tmp_path):
    parse_args = load_script(ROOT / "main_five_datasets.py").parse_args
    thresholds = [f"0.9{i:02d}125" for i in range(20)]
    samples = [str(100 + i) for i in range(20)]
    names = set()
    for last in "125", "126":
        samples[-1] = last
        args = parse_args(["--threshold", *thresholds, "--n_samples", *samples])
        (tmp_path / args.run_name).mkdir()
        names.add(args.run_name)
    assert len(names) == 2
    assert all(name.startswith("seed_37_threshold_0.900125_0.901125_") for name in names)
