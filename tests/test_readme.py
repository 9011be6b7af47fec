"""What the README and the docstrings of the scripts claim: flags, commands, code, numbers."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from bench import Bench

import main_cifar100

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {  # name of the script: how its rows of the table begin
    "main_pmnist": "| Permuted MNIST",
    "main_cifar100": "| 10-split CIFAR-100",
    "main_cifar100_superclass": "| CIFAR-100 Superclass",
    "main_five_datasets": "| 5-Datasets",
}
OTHER_FLAGS = {
    "--list",
    "--setup",
    "--all",
    "--csv",
    "--latex",
    "--figure",
}  # of the runner and the report
FOREIGN_FLAGS = {"--jobs", "--gpus", "--array", "--wrap"}  # of GNU parallel and Slurm


def blocks(language):
    """The README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block_with(text):
    """The Python block that contains the text."""
    (block,) = (block for block in blocks("python") if text in block)
    return block


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What models/report.py prints of the results that come with the repository."""
    empty = tmp_path_factory.mktemp("models")
    reference = ROOT / "models" / "reference"
    command = [sys.executable, ROOT / "models" / "report.py"]
    command += ["--models_dir", empty, "--reference", reference]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_tables_are_what_the_report_prints(printed):
    tables = [block for block in printed.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 3
    for table in tables:
        assert table.strip() in README


def test_tolerances_are_those_of_the_report(printed):
    (legend,) = (line for line in printed.splitlines() if "Within tolerance:" in line)
    tolerances = re.findall(r"\d\d\.\d ± [\d.]+\d", legend)
    assert len(tolerances) == 3
    for tolerance in [*tolerances, "91.2 ± 1"]:
        assert tolerance in legend
        assert tolerance in README


def test_what_the_method_costs_and_saves_is_in_the_tables(printed):
    """Learned with and without projection, by benchmark; then each ACC with, each without"""
    (text,) = re.findall(r"What the method costs and saves: (.*?)\n\n", README, re.DOTALL)
    cells = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    names = ("Permuted MNIST", "10-split CIFAR-100", "CIFAR-100 Superclass, `--official_data`")
    learned, final = [], ([], [])
    for name in names:
        rows = [row for row in cells if row[1:2] == [name]]
        (with_projection, *_) = (row for row in rows if row[2][0].isdigit())  # the paper's ACC
        (without,) = (row for row in rows if row[2] == "`--threshold 0`")
        learned += [with_projection[4], without[5]]
        final[0].append(with_projection[3].split()[0])
        final[1].append(without[4].split()[0])
    assert re.findall(r"\d+\.\d+", text) == [*learned, *final[0], *final[1]]


def test_figures_of_the_benchmark_are_those_of_a_run():
    log = (ROOT / "tests" / "benchmark.md").read_text(encoding="utf-8")
    quoted = log.split("\n## ")[1]
    commits = re.findall(r", commit (.*)$", quoted, re.MULTILINE)
    table = [line for line in quoted.splitlines() if line.startswith("|")]
    assert len(table) >= 6
    assert "\n".join(table) in README
    assert commits and all(f"at commit {commit}" in README for commit in commits)


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_of_the_scripts_carry_measured_numbers(script, printed):
    """Lines under "measured" are cells of the first table: ACC / BWT (n), time (device)."""
    docstring = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")))
    rows = [line for line in printed.splitlines() if line.startswith(SCRIPTS[script])]
    rows = rows[: 1 if script in ("main_pmnist", "main_cifar100") else 2]
    measured = re.search(r"^measured +(.*(?:\n  +.*)*)", docstring, re.MULTILINE)[1]
    for line in measured.splitlines():
        if line.strip() == "not measured yet":
            assert all("not measured yet" in row for row in rows)
            continue
        result, time = re.fullmatch(r"(?:.*: )?(\d.*\)), (\d.*\))", line.strip()).groups()
        assert any(f" {result} " in row and f" {time} " in row for row in rows), line


def test_flags_exist():
    sources = [(ROOT / f"{script}.py").read_text(encoding="utf-8") for script in SCRIPTS]
    flags = {f"--{flag}" for flag in re.findall(r'add\("--(\w+)"', "".join(sources))}
    assert len(flags) == 21
    named = set(re.findall(r"--[a-z]\w+", README))
    assert flags <= named
    assert named <= flags | OTHER_FLAGS | FOREIGN_FLAGS


def test_files_exist():
    """Those in backticks and in links."""
    names = re.findall(r"`((?:\w+/)*\w+\.(?:py|sh|txt|md))`", README)
    links = re.findall(r"\]\(((?!http)[\w./]+)\)", README)
    of_the_user = {"main_pmnist_mine.py"}
    for name in {*names, *links} - of_the_user:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("command", re.findall(r"^python main_.*?(?= *#|$)", README, re.MULTILINE))
def test_commands_of_the_scripts_are_accepted(command):
    _, script, *flags = shlex.split(command)
    args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
    assert args.n_epochs > 0


def test_a_network_of_projected_layers():
    torch.manual_seed(0)
    tasks = [(torch.randn(20, 3, 32, 32), torch.randint(0, 10, (20,))) for _ in range(2)]
    names = {"torch": torch, "nn": nn, "F": F, "tasks": tasks}
    exec(block_with("class Net"), names)
    model = names["model"]
    (x, y), _ = tasks
    ranks = [layer.M.shape[1] for layer in main_cifar100.projected_layers(model).values()]
    assert all(rank > 0 for rank in ranks)
    # The first task was learned, and is still known after the second.
    assert (model(x, 0).argmax(1) == y).float().mean() > 0.9


class Block(nn.Module):
    """A transformer block on tokens (B, tokens, 16), after a convolution that cuts the patches."""

    def __init__(self, bias=False):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4, bias=False)
        self.qkv = nn.Linear(16, 48, bias=bias)
        self.out = nn.Linear(16, 16, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(16, 32, bias=False), nn.GELU(), nn.Linear(32, 16, bias=False)
        )
        self.heads = nn.ModuleList(nn.Linear(16, 4) for _ in range(2))

    def forward(self, x, task):
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        x = x + self.mlp(x)
        return self.heads[task](x.mean(dim=1))


def test_layers_of_an_existing_model_are_replaced():
    """Bases that hold all inputs of the first task keep its outputs while the second is learned."""
    torch.manual_seed(0)
    names = {**vars(main_cifar100), "nn": nn}
    exec(block_with("def protect"), names)
    model = Block()
    x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))
    before = model(x, 0).detach()
    names["protect"](model, free=["heads"])
    assert main_cifar100.unprotected_layers(model) == ["heads.0", "heads.1"]
    layers = main_cifar100.projected_layers(model)
    assert list(layers) == ["patches", "qkv", "out", "mlp.0", "mlp.2"]
    assert torch.equal(model(x, 0), before)

    main_cifar100.update_bases(model, 0, x, [1 - 1e-9] * 5, [6] * 5)
    start = layers["patches"].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 3, 8, 8), 1), y).backward()
        optimizer.step()
    assert torch.allclose(model(x, 0), before, atol=1e-5)
    assert not torch.allclose(layers["patches"].weight, start, atol=1e-4)

    with pytest.raises(ValueError, match="qkv has a bias"):
        names["protect"](Block(bias=True))
    with pytest.raises(ValueError, match="0 has groups"):
        names["protect"](nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, bias=False)))


def test_a_finished_run_is_loaded_evaluated_and_learns_one_task_more(tmp_path):
    bench = Bench("main_cifar100", tmp_path)
    folder = bench.run()
    code = block_with("import main_cifar100 as gpm")
    x, y = torch.randn(150, 3, 32, 32), torch.randint(0, 10, (150,))
    names = {"torch": torch, "nn": nn, "flags": bench.flags(), "x": x, "y": y}
    exec(code, names)
    results = main_cifar100.json.loads((folder / "results.json").read_text())
    assert names["accuracy"] == results["accuracy_matrix"][-1][0]
    layers = main_cifar100.projected_layers(names["model"])
    grown = [layers[name].M.shape[1] > rank for name, rank in results["ranks"][-1].items()]
    assert all(grown)
    assert len(names["model"].heads) == 11


def test_the_csv_draws_forgetting_curves(tmp_path, monkeypatch):
    pytest.importorskip("pandas", reason="pandas is not installed")
    command = [sys.executable, ROOT / "models" / "report.py", "--csv", "--models_dir", tmp_path]
    csv = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "accuracies.csv").write_text(csv)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block_with("import pandas"), names)
    curves = names["curves"].unstack(["script", "setting"])
    assert list(curves.index) == list(range(1, 11))
    published = curves["main_pmnist", "as published"]
    assert published.iloc[0] > 90 and published.iloc[-1] > 90
