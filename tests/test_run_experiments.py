"""run_experiments.sh in real shells: a copy of it beside small stand-ins for the scripts, in a folder with an odd name."""
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELLS = {"bash": ["bash", "--norc", "--noprofile"], "zsh": ["zsh", "-f"]}
ALLOCATOR = {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_MMAP_THRESHOLD_": "33554432"}
VARIABLES = ("OMP_NUM_THREADS", *ALLOCATOR, "SEEDS", "BENCHMARKS", "JOBS", "QUICK", "PYTHONPATH", "PYTHONUNBUFFERED",
             "VIRTUAL_ENV")
STATE = {"bash": "set +o; shopt -p; pwd; trap; declare -F; export -p; compgen -v",
         "zsh": "set -o; pwd; trap; print -rl -- ${(ok)functions}; export; print -rl -- ${(ok)parameters}"}
# A script that notes how it was called, then does what the file "behaviour" says
SCRIPT = f"""
import json, os, sys, time
name = os.path.basename(sys.argv[0]).removesuffix(".py").removeprefix("main_")
open("calls", "a").write(json.dumps([name, sys.argv[1:], *map(os.environ.get, {VARIABLES[:4]})]) + "\\n")
print("output of", name)
exec(open("behaviour").read())
"""
# A python that has packages once the file "packages" is beside it; pip does what the file "pip" says
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *specifier*) [ -e "${{0%/*}}/packages" ] && exec {sys.executable} "$@" ;;
    "-m venv .venv") {sys.executable} -m venv --without-pip .venv; rm .venv/bin/python; cp "$0" .venv/bin/python ;;
    "-m pip install -r requirements.txt") echo pip >>pip_calls; . ./pip; touch .venv/bin/packages ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture(params=[shell for shell in SHELLS if shutil.which(shell)])
def shell(request):
    return request.param


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder like a clone's, whose Python satisfies the requirements and whose torch sees a GPU."""
    folder = tmp_path / "a clone's"
    (folder / "models").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    files = {"torch.py": "class cuda: is_available = lambda: True", "behaviour": "", "calls": "", "pip": "",
             "../bin/packages": "", "../bin/python": PYTHON, "models/report.py": SCRIPT,
             "requirements.txt": (ROOT / "requirements.txt").read_text() + "\n\n",
             "run_experiments.sh": (ROOT / "run_experiments.sh").read_text()}
    files |= {f"main_{name}.py": SCRIPT for name in ("pmnist", "cifar100", "cifar100_superclass", "five_datasets")}
    for file, text in files.items():
        (folder / file).write_text(text)
        (folder / file).chmod(0o755)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return folder


def do(clone, command, shell="bash", cwd=None):
    """Run a command in a shell, in the clone or in cwd."""
    return subprocess.run([*SHELLS[shell], "-c", command], cwd=cwd or clone, text=True, capture_output=True, timeout=60)


def calls(clone):
    """How the scripts were called: [name, arguments, threads, the allocator's three settings] of each."""
    return [json.loads(line) for line in (clone / "calls").read_text().splitlines()]


@pytest.mark.parametrize("options", ["", "set -euo pipefail"])
def test_sourcing_leaves_the_shell_as_it_was(clone, shell, options):
    """Options, folder, traps, functions and variables are the same afterwards; values set but not exported are used."""
    result = do(clone, f"""
        {options}
        SEEDS='3  4' BENCHMARKS=pmnist
        state() {{ {STATE[shell]} | grep -vE '^(declare -x )?_|^(BASH_|PIPESTATUS|FUNCNAME)'; }}
        state >before
        source ../a*/run_experiments.sh
        state >after
    """, shell, cwd=clone.parent / "bin")
    assert (result.returncode, result.stderr) == (0, "")
    assert (clone.parent / "bin" / "after").read_text() == (clone.parent / "bin" / "before").read_text()
    assert [call[1] for call in calls(clone)] == [["--seed", "3"], ["--seed", "4"], []]


@pytest.mark.parametrize("command", ["source run_experiments.sh", "JOBS=2 {shell} run_experiments.sh"])
def test_failures_are_listed_and_the_rest_goes_on(clone, shell, command):
    """Then the status is 1 and the log has the error; the same command again, which succeeds, adds to the log."""
    command = f"export BENCHMARKS='pmnist cifar100'; {command.format(shell=shell)}; echo status $?"
    (clone / "behaviour").write_text("if name != 'cifar100': sys.exit('out of luck')")
    result = do(clone, command, shell)
    assert result.stdout.endswith("status 1\n")
    log = re.fullmatch("out of luck\nfailed: python main_pmnist.py, see (.*)\nfailed: models/report.py\n", result.stderr)[1]
    assert re.fullmatch("--- .*: python main_pmnist.py\noutput of pmnist\nout of luck\n", Path(log).read_text())
    (clone / "behaviour").write_text("")
    assert do(clone, command, shell).stdout.endswith("status 0\n")
    assert sorted(call[0] for call in calls(clone)) == ["cifar100", "cifar100", "pmnist", "pmnist", "report", "report"]
    assert Path(log).read_text().count("output of pmnist\n") == 2


@pytest.mark.parametrize("wrong", ["{} --sed", "{} 3", "BENCHMARKS=mnist {}", "JOBS=0 {}", "JOBS=two {}", "SEEDS=1,2 {}"])
def test_wrong_input_is_one_line(clone, shell, wrong):
    """Status 2 before anything is run, and the caller's shell lives on."""
    result = do(clone, wrong.format("source run_experiments.sh") + "; echo status $?", shell)
    assert (result.stdout, result.stderr.count("\n"), calls(clone)) == ("status 2\n", 1, [])
    assert wrong.strip("{} ").split("=")[0] in result.stderr


def test_ctrl_c_ends_the_runs_and_not_the_shell(clone, shell):
    """Two runs at a time share the cores. Once the shell takes the next command neither is left; their output is."""
    (clone / "behaviour").write_text("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)  # as one that is stuck\n"
                                     "alive = open('alive', 'wb', 0); alive.write(b'+'); time.sleep(60)")
    os.mkfifo(clone / "alive")
    alive = open(os.open(clone / "alive", os.O_RDONLY | os.O_NONBLOCK), "rb", 0)
    command = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])", *SHELLS[shell], "-i"]
    terminal = subprocess.Popen(command, cwd=clone, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    terminal.stdin.write(b"JOBS=2 BENCHMARKS='pmnist cifar100' source run_experiments.sh\n")
    started = [select.select([alive], [], [], 20) and alive.read(1) for _ in range(2)]
    terminal.stdin.write(b"\x03echo status $?\nexit\n")
    output = terminal.communicate(timeout=20)[0].decode()
    assert (started, alive.read(1)) == ([b"+", b"+"], b"")  # it would be None if a run still had the file open
    assert "The same command goes on" in output and "status 130" in output
    assert all(1 <= int(call[2]) <= max(1, os.cpu_count() // 2) for call in calls(clone))
    assert "output of pmnist\n" in (clone / "models/logs/main_pmnist.py.txt").read_text()


@pytest.mark.parametrize("folder", ["--models_dir x --models_dir 'my runs'", "--models_dir=there"])
def test_runs_and_listed_commands_do_the_same(clone, folder):
    """Seeds, arguments with whatever characters and the allocator's settings reach every script, from another folder too."""
    odd = "a b'\"$HOME*&&\\%s"
    flags = f"-- --data_dir {shlex.quote(odd)} --setup '' {folder}"
    command = "SEEDS='1 2' BENCHMARKS='cifar100 pmnist' ./run_experiments.sh"
    assert "\noutput of pmnist\n" in do(clone, f"{command} {flags}").stdout
    expected = [[name, ["--seed", seed, *shlex.split(flags)[1:]], None, *ALLOCATOR.values()]
                for name in ("cifar100", "pmnist") for seed in "12"]
    *done, report = calls(clone)
    assert (done, report[:2]) == (expected, ["report", shlex.split(folder)])
    (clone.parent / "list").write_text(do(clone, f"{command} --list {flags}").stdout)
    for listed in ("tr '\\n' '\\0' <list | xargs -0 -n 1 sh -c", 'for i in 1 2 3 4; do (eval "$(sed -n ${i}p list)"); done'):
        (clone / "calls").unlink()
        assert do(clone, listed, cwd=clone.parent).stderr == ""
        assert calls(clone) == expected


def test_quick(clone):
    """Two short tasks of each, always anew, in a folder of its own; without a GPU only the full runs give a warning."""
    (clone / "torch.py").write_text("class cuda: is_available = lambda: False")
    assert "no GPU" in do(clone, "BENCHMARKS=pmnist source run_experiments.sh").stderr
    (clone / "models/quick/old").mkdir(parents=True)
    assert do(clone, "QUICK=1 source run_experiments.sh --list").stderr == "" and (clone / "models/quick/old").exists()
    result = do(clone, "QUICK=1 source run_experiments.sh")
    assert (result.returncode, result.stderr, (clone / "models/quick/old").exists()) == (0, "", False)
    runs = ["pmnist", "cifar100", "cifar100_superclass --t_order 0", "cifar100_superclass --t_order 0 --official_data",
            "five_datasets --pc_valid 0.9"]
    assert [" ".join([name, *words]) for name, words, *_ in calls(clone)[2:]] == [
        *(f"{run} --n_epochs 1 --n_tasks 2 --models_dir models/quick" for run in runs), "report --models_dir models/quick"]


def test_list(clone, shell):
    """Scripts and flags that are in this repository; nothing is run, nor by --help, and no Python is needed."""
    (clone.parent / "bin" / "python").write_text("exit 1")
    for quick in ("1", ""):
        result = do(clone, f"QUICK={quick} source run_experiments.sh --list", shell)
        runs = [line.split(" python main_")[1] for line in result.stdout.splitlines()]
        for name, *words in map(str.split, runs):
            text = (ROOT / f"main_{name}").read_text()
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in text] == []
    orders = [f"cifar100_superclass.py --t_order {n}{data}" for n in range(5) for data in ("", " --official_data")]
    assert runs == ["pmnist.py", "cifar100.py", *orders, "five_datasets.py", "five_datasets.py --official_data"]
    assert do(clone, "source run_experiments.sh --help", shell).stdout.startswith("Run the benchmarks")
    assert calls(clone) == [] and not (clone / ".venv").exists() and not (clone / "models/logs").exists()


def test_environment_is_made_once_and_activated(clone, shell):
    """--setup leaves it activated; the second time nothing is installed; a run uses it; in a moved folder it is mended."""
    (clone.parent / "bin" / "packages").unlink()
    command = 'set -eu; source run_experiments.sh --setup; echo "$VIRTUAL_ENV"; command -v python'
    for _ in range(2):
        assert do(clone, command, shell).stdout == f"{clone}/.venv\n{clone}/.venv/bin/python\n"
    assert do(clone, f"BENCHMARKS=pmnist {shell} run_experiments.sh", shell).returncode == 0
    assert (len(calls(clone)), (clone / "pip_calls").read_text()) == (2, "pip\n")
    moved = clone.rename(clone.parent / "moved")
    assert do(moved, command, shell).stdout == f"{moved}/.venv\n{moved}/.venv/bin/python\n"


@pytest.mark.parametrize("lacking, pip, status", [("numpy>=99", "exit 1", 1), ("no_such_package", "kill -9 $PPID; exit", 137)])
def test_failed_or_killed_installation_is_gone_on_with(clone, shell, lacking, pip, status):
    """It runs nothing, leaves the shell as it was and is no environment the next time."""
    (clone / "requirements.txt").write_text(lacking)
    (clone / "pip").write_text(pip)
    result = do(clone, "source run_experiments.sh; echo status $?; echo ${VIRTUAL_ENV-none}", shell)
    assert (result.stdout, calls(clone), "error: " in result.stderr) == (f"status {status}\nnone\n", [], status == 1)
    assert do(clone, "bash run_experiments.sh; echo status $?").stdout == f"status {status}\n"
    (clone / "pip").write_text("")
    assert do(clone, "source run_experiments.sh --setup", shell).returncode == 0
    assert (clone / "pip_calls").read_text() == "pip\npip\npip\n"
