"""What the README and the run cards claim: flags that exist, commands that run, numbers that are in the committed results."""
import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import main_cifar100
from test_method import Small

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NAMES = {"main_pmnist": "Permuted MNIST", "main_cifar100": "10-split", "main_cifar100_superclass": "CIFAR-100 Superclass",
         "main_five_datasets": "5-Datasets"}  # of a script's rows in the table
COMMANDS = re.findall(r"(?m)^python main_.*?(?= *#|$)", "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)))


@pytest.fixture
def printed(tmp_path):
    """What models/report.py prints for the results in git's index: what a user has trained since is not the README's matter."""
    listed = subprocess.run(["git", "ls-files", "models/**/results.json"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so nobody can tell which results are the repository's")
    (tmp_path / "models").mkdir()
    for file in listed.stdout.split():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(subprocess.check_output(["git", "show", f":{file}"], cwd=ROOT))
        (tmp_path / file).with_name("accuracy.png").touch()  # drawn already
    command = [sys.executable, ROOT / "models" / "report.py", "--models_dir", tmp_path / "models"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_tables_and_bands_are_what_the_report_prints(printed):
    tables = [block.strip() for block in printed.split("\n\n") if block.startswith("|")]
    assert tables[0].count("\n") >= 7 and all(table in README for table in tables)
    legend, = (line for line in printed.splitlines() if line.startswith("The band"))
    bands = re.findall(r"[\d.]+ ± \d+(?:\.\d+)?", legend)
    assert len(bands) == 4 and all(band in README for band in bands)


def test_the_figures_of_the_benchmark_are_those_of_a_run():
    run = (ROOT / "tests" / "benchmark.md").read_text().split("\n## ")[1]
    commit = re.search(r"(?m), commit (\w+)$", run)[1]  # of committed code: no "with changes"
    table = [line for line in run.splitlines() if line.startswith("|")]
    assert len(table) >= 6 and "\n".join(table) in README and f"at commit {commit}" in README


@pytest.mark.parametrize("script", NAMES)
def test_run_cards_carry_measured_numbers(script, printed):
    """The card's lines under "measured" are cells of the table: ACC / BWT (n), time (device)."""
    card = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    rows = [re.split(r" *\| *", row) for row in printed.split("\n\n")[0].splitlines() if row.startswith(f"| {NAMES[script]}")]
    for line in re.search(r"^measured +(.*(?:\n  +.*)*)", card, re.MULTILINE)[1].splitlines():
        if line.strip() == "not measured yet":
            assert all("not measured yet" in row for row in rows)
        else:
            result, time = re.fullmatch(r"(?:.*: )?([\d.]+.*\)), (\d.*\))", line.strip()).groups()
            assert any(result in row and time in row for row in rows), line


def test_flags_and_files_exist():
    sources = "".join((ROOT / f"{script}.py").read_text() for script in NAMES)
    flags = {f"--{flag}" for flag in re.findall(r'add_argument\("--(\w+)"', sources)}
    named = set(re.findall(r"--[a-z]\w+", README))
    assert flags <= named
    assert named <= flags | {"--list", "--setup", "--all", "--figure", "--jobs", "--gpus", "--array", "--wrap"}
    for name in {*re.findall(r"`([\w/]+\.(?:py|sh|txt|md))`", README), *re.findall(r"\]\(((?!http)[^)]+)\)", README)}:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_scripts_are_accepted(command):
    _, script, *flags = shlex.split(command)
    assert importlib.import_module(script.removesuffix(".py")).parse_args(flags).n_epochs > 0


def test_the_lines_for_other_peoples_code_run():
    code, = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "project_gradients" in block)
    tasks = [(torch.randn(12, 2, 6, 6), torch.randint(0, 3, (12,))) for _ in range(2)]
    names = {**vars(main_cifar100), "torch": torch, "F": F, "model": Small(), "tasks": tasks}
    exec(code, names)
    assert len(code.splitlines()) == 8 and all(0 < M.shape[1] <= len(M) for M in names["bases"].values())
