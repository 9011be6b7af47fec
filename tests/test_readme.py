"""What the README and the run cards claim: flags that exist, commands that run, numbers that are in the committed results."""
import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NAMES = {"main_pmnist": "Permuted MNIST", "main_cifar100": "10-split", "main_cifar100_superclass": "CIFAR-100 Superclass",
         "main_five_datasets": "5-Datasets"}  # of a script's rows in the table
SCRIPTS = tuple(NAMES)
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def printed(tmp_path):
    """What models/report.py prints for the results in git's index: what a user has trained since is not the README's matter."""
    listed = subprocess.run(["git", "ls-files", "models/**/results.json"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so nobody can tell which results are the repository's")
    for file in listed.stdout.split():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(subprocess.run(["git", "show", f":{file}"], cwd=ROOT, capture_output=True, check=True).stdout)
    (tmp_path / "models").mkdir(exist_ok=True)
    command = [sys.executable, ROOT / "models" / "report.py", "--models_dir", tmp_path / "models"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_tables_are_what_the_report_prints(printed):
    tables = [block for block in printed.split("\n\n") if block.startswith("|")]
    assert tables[0].count("\n") >= 6
    assert all(table.strip() in README for table in tables)


def test_the_figures_of_the_benchmark_are_those_of_a_run():
    run = (ROOT / "tests" / "benchmark.md").read_text().split("\n## ")[1]
    commit = re.search(r", commit (\w+);", run)[1]  # of committed code: no "with changes"
    table = [line for line in run.splitlines() if line.startswith("|")]
    assert len(table) == 9 and "\n".join(table) in README and f"at commit {commit}, plain / here" in README


def test_the_bands_are_those_of_the_report(printed):
    legend, = (line for line in printed.splitlines() if line.startswith("The band"))
    bands = re.findall(r"[\d.]+ ± \d+(?:\.\d+)?", legend)
    assert len(bands) == 4 and all(band in README for band in bands)


def test_times_of_the_scripts_are_those_of_the_table(printed):
    """A script's cell holds the times of its rows on a CPU, or on a GPU, as the table gives them."""
    for script, name in NAMES.items():
        row, = (cells(line) for line in README.splitlines() if line.startswith(f"| `{script}.py`"))
        times = [cells(line)[6] for line in printed.split("\n\n")[0].splitlines() if line.startswith(f"| {name}")]
        for cell, device in (row[3], "(CPU"), (row[4], "(NVIDIA"):
            found = [time for time in times if device in time]
            assert cell in found or (cell == "not measured yet" and not found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_cards_carry_measured_numbers(script, printed):
    """The card's lines under "measured" are cells of the table: ACC / BWT (n), data, time (device)."""
    card = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    measured = re.search(r"^measured +(.*(?:\n  +.*)*)", card, re.MULTILINE)[1]
    for line in measured.splitlines():
        line = line.strip()
        if line == "not measured yet":
            assert not any(row.startswith(f"| {NAMES[script]}") and "not measured yet" not in row for row in printed.split("\n\n")[0].splitlines())
        else:
            result, time = re.fullmatch(r"(?:.*: )?([\d.]+.*\)), (\d.*\))", line).groups()
            assert any(result in row and time in row for row in printed.splitlines()), line


def test_flags_exist():
    known = {"--help", "--list", "--setup", "--all", "--figure"} | {"--jobs", "--gpus", "--array", "--wrap"}  # of parallel and sbatch
    sources = "".join((ROOT / f"{script}.py").read_text() for script in SCRIPTS)
    known |= {f"--{flag}" for flag in re.findall(r'add_argument\("--(\w+)"', sources)}
    named = set(re.findall(r"--[a-z]\w+", README))
    assert named <= known
    assert {f"--{flag}" for flag in re.findall(r'add_argument\("--(\w+)"', sources)} <= named


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python main_")])
def test_commands_of_the_scripts_are_accepted(command, capsys):
    _, script, *flags = shlex.split(command)
    script = importlib.import_module(script.removesuffix(".py"))
    if "--help" in flags:
        with pytest.raises(SystemExit) as stop:
            script.parse_args(flags)
        assert stop.value.code == 0 and "--threshold" in capsys.readouterr().out
    else:
        assert script.parse_args(flags).overwrite is False


def test_lists_of_commands_name_real_scripts():
    listing, = {command.split(">")[0].strip() for command in COMMANDS if "--list" in command}
    lines = subprocess.run(["bash", "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    named = [re.search(r"python (main_\w+)\.py", line)[1] for line in lines]
    assert all((ROOT / f"{name}.py").exists() for name in named)
    assert [named.count(script) for script in SCRIPTS] == [3, 3, 30, 6]  # three seeds; five orders and both kinds of data, both kinds


def test_files_exist():
    for name in set(re.findall(r"`([\w/]+\.(?:py|sh|txt|md))`", README)) | set(re.findall(r"\]\(((?!http)[^)]+)\)", README)):
        assert (ROOT / name).exists() or (ROOT / "dataloader" / name).exists() or name in ("log.txt",), name


def test_data_sets_are_named():
    from dataloader import raw
    assert all(f"`{name}`" in README for name in raw.SETS)
