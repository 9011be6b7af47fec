"""run_experiments.sh in real shells: a copy of it in a folder with an odd name.

Small stand-ins for the scripts note how they are called. The Python is a real one in a venv of its
own, "box", where packages are no more than their recorded versions; pip is a stand-in that records
what it is asked for.
"""

import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELLS = {"bash": ["bash", "--norc", "--noprofile"], "zsh": ["zsh", "-f"], "dash": ["dash"]}
ALLOCATOR = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
}
NOTED = ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", *ALLOCATOR]
INPUTS = ["SEEDS", "BENCHMARKS", "JOBS", "QUICK"]
PYTHONS = ["PYTHONPATH", "PYTHONHOME", "PYTHONUNBUFFERED", "VIRTUAL_ENV"]
BENCHMARKS = ["pmnist", "cifar100", "cifar100_superclass", "five_datasets"]
# What a shell can show of its options, folder, traps, functions and variables
STATE = {
    "bash": "set +o; shopt -p; pwd; trap; declare -F; export -p; compgen -v",
    "zsh": "set -o; pwd; trap; print -rl -- ${(ok)functions}; export;"
    'print -rl -- ${(ok)parameters} "$@"',
}

# A script or the report: it notes how it was called, then does what the file "behaviour" says.
SCRIPT = f"""
import json, os, sys, time
name = os.path.basename(sys.argv[0]).removesuffix(".py").removeprefix("main_")
noted = {{variable: os.environ.get(variable) for variable in {NOTED}}}
with open("calls", "a") as calls:
    calls.write(json.dumps([name, sys.argv[1:], noted]) + "\\n")
print("output of", name)
exec(open("behaviour").read())
"""
TORCH = """
class cuda:
    is_available = lambda: device_count > 0
    device_count = lambda: device_count
device_count = {}
"""
# A python as found by PATH. Its venv has a stand-in for pip, which saves seconds and the network.
PYTHON = """#!/usr/bin/env bash
[ "$*" = "-m venv .venv" ] || exec {box}/bin/python "$@"
{box}/bin/python -m venv --without-pip .venv
cp {box}/../pip.py .venv/lib/python*/site-packages
"""
# pip, called with -r FILE -c FILE. It does what the file "pip" says.
PIP = """
import pathlib, re, sys, sysconfig
wanted, constraints = (pathlib.Path(sys.argv[i]).read_text().split() for i in (3, 5))
with open("pip_calls", "a") as calls:
    calls.write(f"{' '.join(wanted)} | {' '.join(constraints)}\\n")
exec(open("pip").read())
for name, _, version in (re.match("([^=>]+)([=>]*)([^,]*)", line).groups() for line in wanted):
    folder = pathlib.Path(sysconfig.get_path("purelib"), f"{name}-{version or 1}.dist-info")
    folder.mkdir()
    metadata = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version or 1}\\n"
    (folder / "METADATA").write_text(metadata)
"""


@pytest.fixture(params=["bash", "zsh"])
def shell(request):
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


class Clone:
    """A folder like a clone's. Its Python, the box, has what both requirements.txt ask for."""

    def __init__(self, above):
        self.above = above
        self.folder = above / "a clone's"
        self.box = above / "box"
        venv.create(self.box, symlinks=True)
        self.write("../pip.py", PIP)
        self.write("../bin/python", PYTHON.format(box=shlex.quote(str(self.box))))
        for other in "python3", *(f"python3.{minor}" for minor in range(10, 15)):
            self.write(f"../bin/{other}", "exit 1")
        for benchmark in BENCHMARKS:
            self.write(f"main_{benchmark}.py", SCRIPT)
        self.write("models/report.py", SCRIPT)
        self.write("torch.py", TORCH.format(1))
        for file in "behaviour", "calls", "pip", "pip_calls":
            self.write(file, "")
        for file in "run_experiments.sh", "requirements.txt", "tests/requirements.txt":
            self.write(file, (ROOT / file).read_text())
        self.installed = {}
        for file in "requirements.txt", "tests/requirements.txt":
            for name, version in re.findall(r"(?m)^([\w-]+)[=>]=([\d.]+)", self.read(file)):
                self.install(name, version)

    def write(self, file, text):
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def read(self, file):
        return (self.folder / file).read_text()

    def install(self, name, version):
        """Record a version in the box; None removes the package."""
        packages = next(self.box.glob("lib/python*/site-packages"))
        if name in self.installed:
            shutil.rmtree(packages / f"{name}-{self.installed.pop(name)}.dist-info")
        if version:
            metadata = packages / f"{name}-{version}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            self.installed[name] = version

    def run(self, command, shell="bash", cwd=None):
        """Run a command in a shell, in the clone or in cwd."""
        shell = [*SHELLS[shell], "-c", command]
        cwd = cwd or self.folder
        return subprocess.run(shell, cwd=cwd, text=True, capture_output=True, timeout=60)

    def calls(self):
        """How the scripts were called: name, arguments and some variables of each."""
        return [json.loads(line) for line in self.read("calls").splitlines()]

    def commands(self):
        """Name and arguments of each call as one text."""
        return [" ".join([name, *arguments]) for name, arguments, _ in self.calls()]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    for variable in *NOTED, *INPUTS, *PYTHONS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    # What a shell starts in the background ignores SIGINT, and so would the runs of these tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return Clone(tmp_path)


# Sourcing and running -----------------------------------------------------------------------------
@pytest.mark.parametrize("options", ["", "set -euo pipefail"])
def test_sourcing_leaves_the_shell_as_it_was(clone, shell, options):
    """Values that are set but not exported are used all the same."""
    passing = "^(declare -x )?_|^(BASH_|PIPESTATUS|FUNCNAME)"
    command = f"""
        {options}
        SEEDS='3  4' BENCHMARKS=pmnist
        state() {{ {STATE[shell]} | grep -vE '{passing}'; }}
        state >before
        source ../a*/run_experiments.sh
        state >after
    """
    result = clone.run(command, shell, cwd=clone.above / "bin")
    assert (result.returncode, result.stderr) == (0, "")
    assert clone.read("../bin/after") == clone.read("../bin/before")
    assert clone.commands() == ["pmnist --seed 3", "pmnist --seed 4", "report"]


def test_other_shells_are_refused_in_one_line(clone):
    if not shutil.which("dash"):
        pytest.skip("dash is not installed")
    for command in "dash run_experiments.sh", ". ./run_experiments.sh; exit $?":
        result = clone.run(command, "dash")
        assert (result.returncode, result.stdout, clone.calls()) == (2, "", [])
        assert re.fullmatch(".*use bash or zsh.*\n", result.stderr)


@pytest.mark.parametrize("caller", ["set -- a b", "set -- '' --setup", "set -- 1 --list"])
def test_arguments_of_the_caller_are_no_options(clone, shell, caller):
    command = f'{caller}; BENCHMARKS=pmnist source run_experiments.sh; echo "status $? $*"'
    result = clone.run(command, shell)
    assert result.stdout.endswith(f"status 0 {caller[7:].replace(chr(39), '')}\n")
    assert clone.commands() == ["pmnist", "report"]


def test_options_and_flags_are_read_when_sourced(clone, shell):
    result = clone.run("set -- a b; source run_experiments.sh --list -- --lr 0.02; echo $*", shell)
    *listed, arguments = result.stdout.splitlines()
    assert len(listed) == 14 and all(line.endswith("--lr 0.02") for line in listed)
    assert arguments == "a b"
    assert clone.run("BENCHMARKS=pmnist source run_experiments.sh -- --lr 0.02", shell).stderr == ""
    assert clone.commands() == ["pmnist --lr 0.02", "report"]


WRONG = ["{} --sed", "{} --list 3", "BENCHMARKS=mnist {}", "JOBS=0 {}", "JOBS=two {}"]
WRONG += ["SEEDS=1,2 {}", "SEEDS=-n {}", "QUICK=false {}", "QUICK=no {}", "QUICK=2 {}"]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line(clone, shell, wrong):
    """Status 2 before anything is run, and the caller's shell lives on."""
    cause = wrong.strip("{} ").split("=")[0].split()[-1]
    result = clone.run(wrong.format("source run_experiments.sh") + "; echo status $?", shell)
    assert (result.stdout, result.stderr.count("\n"), clone.calls()) == ("status 2\n", 1, [])
    assert cause in result.stderr


def test_words_are_refused_when_run(clone, shell):
    """There they cannot be a caller's."""
    result = clone.run(f"{shell} run_experiments.sh 3", shell)
    assert (result.returncode, clone.calls()) == (2, [])
    assert "unknown option 3" in result.stderr


@pytest.mark.parametrize("command", ["source run_experiments.sh", "JOBS=2 {} run_experiments.sh"])
def test_failures_are_listed_and_the_rest_goes_on(clone, shell, command):
    """Status 1, and the log has the error. The same command again adds to the log."""
    command = f"export BENCHMARKS='pmnist cifar100'; {command.format(shell)}; echo status $?"
    clone.write("behaviour", "if name != 'cifar100': sys.exit('out of luck')")
    result = clone.run(command, shell)
    assert result.stdout.endswith("status 1\n")
    problems = "out of luck\nfailed: python main_pmnist.py, see (.*)\nfailed: models/report.py\n"
    log = Path(re.fullmatch(problems, result.stderr)[1])
    entry = "--- .*: python main_pmnist.py\noutput of pmnist\n"
    assert re.fullmatch(f"{entry}out of luck\n", log.read_text())

    clone.write("behaviour", "")
    assert clone.run(command, shell).stdout.endswith("status 0\n")
    assert sorted(clone.commands()) == sorted(["cifar100", "pmnist", "report"] * 2)
    assert re.fullmatch(f"{entry}out of luck\n{entry}", log.read_text())


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_is_interrupted_by_itself_is_a_failure(clone, jobs):
    """The scripts end with SIGINT when they are interrupted. The other runs go on."""
    clone.write("behaviour", "if name == 'pmnist': os.kill(os.getpid(), 2); time.sleep(9)")
    command = f"JOBS={jobs} BENCHMARKS='pmnist cifar100' bash run_experiments.sh"
    result = clone.run(command)
    assert result.returncode == 1
    assert re.search("(?m)^failed: python main_pmnist.py, see ", result.stderr)
    assert sorted(clone.commands()) == ["cifar100", "pmnist", "report"]


# Ctrl-C -------------------------------------------------------------------------------------------
def make_stuck(clone):
    """Let scripts ignore SIGINT for a minute. Returns a file to which each adds a "+" first."""
    clone.write(
        "behaviour",
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "alive = open('alive', 'wb', 0); alive.write(b'+'); time.sleep(60)",
    )
    os.mkfifo(clone.folder / "alive")
    return open(os.open(clone.folder / "alive", os.O_RDONLY | os.O_NONBLOCK), "rb", 0)


def wait_for_runs(alive, number):
    for _ in range(number):
        assert select.select([alive], [], [], 20)[0] and alive.read(1) == b"+"


def test_ctrl_c_ends_the_runs_and_not_the_shell(clone, shell):
    """Two runs share the cores. Once the shell takes the next command, neither is left."""
    alive = make_stuck(clone)
    spawn = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
    pipe = subprocess.PIPE
    terminal = subprocess.Popen(
        [*spawn, *SHELLS[shell], "-i"], cwd=clone.folder, bufsize=0, stdin=pipe, stdout=pipe
    )
    terminal.stdin.write(b"JOBS=2 BENCHMARKS='pmnist cifar100' source run_experiments.sh\n")
    wait_for_runs(alive, 2)
    terminal.stdin.write(b"\x03")
    time.sleep(0.5)  # a shell discards what was typed before it handles the Ctrl-C
    terminal.stdin.write(b"echo status $?\nexit\n")
    output = terminal.communicate(timeout=20)[0].decode()
    assert alive.read(1) == b""  # it would be None if a run still had the file open
    assert "The same command goes on" in output and "status 130" in output
    threads = [int(noted["OMP_NUM_THREADS"]) for _, _, noted in clone.calls()]
    assert all(1 <= n <= max(1, os.cpu_count() // 2) for n in threads)
    assert "output of pmnist\n" in clone.read("models/logs/main_pmnist.py.txt")


def test_ctrl_c_ends_a_loop_over_the_runner(clone, shell, monkeypatch):
    """It ends by the signal, after the runs, and leaves no temporary file."""
    alive = make_stuck(clone)
    (clone.above / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(clone.above / "tmp"))
    loop = "for seed in 1 2; do SEEDS=$seed BENCHMARKS=pmnist bash run_experiments.sh; done"
    group = subprocess.Popen(
        [*SHELLS[shell], "-c", loop],
        cwd=clone.folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_runs(alive, 1)
    os.killpg(group.pid, signal.SIGINT)
    group.wait(timeout=20)
    assert alive.read(1) == b""
    assert clone.commands() == ["pmnist --seed 1"]
    assert [*(clone.above / "tmp").iterdir()] == []


# What is run --------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", ["--models_dir x --models_dir 'my runs'", "--models='my runs'"])
def test_runs_and_listed_commands_do_the_same(clone, folder):
    """Seeds, odd arguments and the allocator's settings reach every script from any folder."""
    odd = "ä b'\"$HOME*&&\\%s"
    flags = ["--data_dir", odd, "--setup", "", *shlex.split(folder)]
    command = "SEEDS='1 2' BENCHMARKS='cifar100 pmnist' ./run_experiments.sh"
    after = f"-- {shlex.join(flags)}"
    assert "\noutput of pmnist\n" in clone.run(f"{command} {after}").stdout
    *done, report = clone.calls()
    noted = dict.fromkeys(NOTED) | ALLOCATOR
    expected = [
        [name, ["--seed", seed, *flags], noted] for name in ("cifar100", "pmnist") for seed in "12"
    ]
    assert done == expected
    assert report[:2] == ["report", ["--models_dir", "my runs"]]

    (clone.above / "list").write_text(clone.run(f"{command} --list {after}").stdout)
    parallel = "tr '\\n' '\\0' <list | xargs -0 -n 1 sh -c"
    array = 'for i in 1 2 3 4; do (eval "$(sed -n ${i}p list)"); done'
    for evaluated in parallel, array:
        clone.write("calls", "")
        assert clone.run(evaluated, cwd=clone.above).stderr == ""
        assert clone.calls() == expected


def test_listed_commands_run_in_a_folder_with_an_umlaut(clone, monkeypatch):
    """Evaluated by sh, as sbatch does, in the locale C, where printf %q writes $'\\303'."""
    clone.folder = clone.folder.rename(clone.above / "für 'später'")
    for locale in "C", "C.UTF-8":
        monkeypatch.setenv("LC_ALL", locale)
        clone.write("calls", "")
        listed = clone.run("BENCHMARKS=pmnist bash run_experiments.sh --list -- --run_name é")
        (clone.above / "list").write_text(listed.stdout)
        result = clone.run("sh -c 'eval \"$(sed -n 1p list)\"'", cwd=clone.above)
        assert (result.stdout, result.stderr) == ("output of pmnist\n", "")
        assert clone.commands() == ["pmnist --run_name é"]


def test_list(clone, shell):
    """Scripts and flags of this repository. Nothing is run, and no Python is needed."""
    clone.write("../bin/python", "exit 1")
    for quick in "1", "0":
        result = clone.run(f"QUICK={quick} source run_experiments.sh --list", shell)
        runs = [line.split(" python main_")[1] for line in result.stdout.splitlines()]
        for name, *words in map(str.split, runs):
            script = (ROOT / f"main_{name}").read_text()
            flags = [word for word in words if word.startswith("--")]
            assert [flag for flag in flags if f'"{flag}"' not in script] == []
    orders = [f"cifar100_superclass.py --t_order {order}" for order in range(5)]
    assert runs == [
        "pmnist.py",
        "cifar100.py",
        *(order + data for order in orders for data in ("", " --official_data")),
        "five_datasets.py",
        "five_datasets.py --official_data",
    ]
    assert clone.run("source run_experiments.sh --help", shell).stdout.startswith("Run the bench")
    assert clone.calls() == []
    assert not (clone.folder / ".venv").exists() and not (clone.folder / "models/logs").exists()


def test_variants_of_a_script_are_run_like_it(clone):
    """main_cifar100_superclass_mine.py has the runs of main_cifar100_superclass.py, and so on."""
    for benchmark in BENCHMARKS:
        clone.write(f"main_{benchmark}_mine.py", SCRIPT)
        for quick in "0", "1":
            listed = []
            for name in benchmark, f"{benchmark}_mine":
                environment = f"SEEDS='1 2' QUICK={quick} BENCHMARKS={name}"
                listed.append(clone.run(f"{environment} ./run_experiments.sh --list").stdout)
            assert listed[0].replace(f"{benchmark}.py", f"{benchmark}_mine.py") == listed[1] != ""
    clone.run("BENCHMARKS=pmnist_mine source run_experiments.sh")
    assert clone.commands() == ["pmnist_mine", "report"]


def test_values_may_stand_on_lines_of_their_own(clone):
    clone.run("SEEDS=$(printf '1\\n2\\n') BENCHMARKS=' pmnist ' source run_experiments.sh")
    assert clone.commands() == ["pmnist --seed 1", "pmnist --seed 2", "report"]


def test_quick(clone):
    """Two short tasks of each, always anew, in a folder of their own."""
    (clone.folder / "models/quick/old").mkdir(parents=True)
    assert clone.run("QUICK=1 source run_experiments.sh --list").stderr == ""
    assert (clone.folder / "models/quick/old").exists()
    result = clone.run("QUICK=1 source run_experiments.sh")
    assert (result.returncode, result.stderr) == (0, "")
    assert not (clone.folder / "models/quick/old").exists()
    runs = [
        "pmnist",
        "cifar100",
        "cifar100_superclass --t_order 0",
        "cifar100_superclass --t_order 0 --official_data",
        "five_datasets --pc_valid 0.9",
    ]
    quick = "--n_epochs 1 --n_tasks 2 --models_dir models/quick"
    report = "report --models_dir models/quick"
    assert clone.commands() == [*(f"{run} {quick}" for run in runs), report]


# GPUs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("quick, warned", [("", True), ("0", True), ("1", False)])
def test_full_runs_without_a_gpu_give_a_warning(clone, quick, warned):
    clone.write("torch.py", TORCH.format(0))
    result = clone.run(f"QUICK={quick} BENCHMARKS=pmnist source run_experiments.sh")
    assert ("no GPU" in result.stderr) == warned
    assert clone.calls()[0][2]["CUDA_VISIBLE_DEVICES"] is None


def gpus_of_runs(clone, command):
    """The GPU that each of eight runs saw, sorted. They wait until all of them have begun."""
    clone.write("calls", "")
    clone.write(
        "behaviour",
        "while name != 'report' and len(open('calls').readlines()) < 8: time.sleep(0.02)",
    )
    result = clone.run(f"SEEDS='1 2 3 4 5 6 7 8' BENCHMARKS=pmnist {command}")
    assert (result.returncode, result.stderr) == (0, "")
    *calls, report = clone.calls()
    assert report[2]["CUDA_VISIBLE_DEVICES"] == os.environ.get("CUDA_VISIBLE_DEVICES")
    return sorted(noted["CUDA_VISIBLE_DEVICES"] or "" for _, _, noted in calls)


def test_runs_are_spread_over_the_gpus(clone):
    clone.write("torch.py", TORCH.format(4))
    assert gpus_of_runs(clone, "JOBS=8 ./run_experiments.sh") == [*"00112233"]
    assert "CUDA_VISIBLE_DEVICES=" in clone.read("models/logs/main_pmnist.py_--seed_1.txt")
    clone.write("torch.py", TORCH.format(1))
    assert gpus_of_runs(clone, "JOBS=8 ./run_experiments.sh") == [""] * 8


def test_a_choice_of_gpus_is_left_alone(clone, monkeypatch):
    clone.write("torch.py", TORCH.format(4))
    assert gpus_of_runs(clone, "JOBS=8 ./run_experiments.sh -- --device cuda:1") == [""] * 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert gpus_of_runs(clone, "JOBS=8 ./run_experiments.sh") == ["2,3"] * 8


# Environment --------------------------------------------------------------------------------------
SETUP = 'source run_experiments.sh --setup; echo "$VIRTUAL_ENV"; command -v python'


def test_a_fresh_environment_gets_the_tested_versions_once(clone, shell):
    """--setup activates it and a run uses it. Moved, and with its Python gone, it is mended."""
    clone.install("torch", None)
    for _ in range(2):
        result = clone.run(f"set -eu; {SETUP}", shell)
        assert result.stdout == f"{clone.folder}/.venv\n{clone.folder}/.venv/bin/python\n"
    wanted = clone.read("requirements.txt") + clone.read("tests/requirements.txt")
    wanted = [line.split()[0] for line in wanted.splitlines() if line[0] != "#"]
    assert clone.read("pip_calls") == f"{' '.join(wanted)} | \n"
    assert clone.run(f"BENCHMARKS=pmnist {shell} run_experiments.sh", shell).returncode == 0
    assert clone.commands() == ["pmnist", "report"]

    clone.folder = clone.folder.rename(clone.above / "moved")
    for link in (clone.folder / ".venv/bin").glob("python*"):
        link.unlink()
        link.symlink_to("/a/python/that/is/gone")
    result = clone.run(f"set -eu; {SETUP}", shell)
    assert result.stdout == f"{clone.folder}/.venv\n{clone.folder}/.venv/bin/python\n"
    assert clone.read("pip_calls").count("\n") == 1


def test_what_a_run_needs_decides(clone):
    """A Python without pytest and ruff is used for runs; --setup adds these and keeps the rest."""
    clone.install("torch", "2.9.1+cu128")
    clone.install("pytest", None)
    clone.install("ruff", "0.1.0")
    assert clone.run("BENCHMARKS=pmnist source run_experiments.sh").stderr == ""
    assert not (clone.folder / ".venv").exists()
    result = clone.run(SETUP)
    assert result.stdout == f"{clone.folder}/.venv\n{clone.folder}/.venv/bin/python\n"
    missing, present = clone.read("pip_calls").strip().split(" | ")
    assert [re.match("[a-z]+", word)[0] for word in missing.split()] == ["pytest", "ruff"]
    assert "torch==2.9.1+cu128" in present.split()
    assert len(present.split()) == len(clone.installed) - 1  # all but the other ruff


def test_only_what_is_missing_is_added(clone, shell):
    """Where another python is without PyTorch, the one that has it is completed."""
    clone.write("../bin/python3.12", clone.read("../bin/python"))
    clone.write("../bin/python", f'#!/bin/sh\nexec {Path(sys.executable).resolve()} -IS "$@"')
    clone.install("scipy", "1.1")
    clone.install("tqdm", None)
    result = clone.run("BENCHMARKS=pmnist source run_experiments.sh; command -v python", shell)
    assert result.stdout.endswith(f"\n{clone.folder}/.venv/bin/python\n")
    missing, present = clone.read("pip_calls").strip().split(" | ")
    assert [re.match("[a-z]+", word)[0] for word in missing.split()] == ["scipy", "tqdm"]
    assert f"torch=={clone.installed['torch']}" in present.split()
    assert clone.commands() == ["pmnist", "report"]


def test_the_environment_is_completed_while_it_is_active(clone):
    """A run makes it, then --setup adds what the tests need, to the same packages."""
    for name in "tqdm", "pytest", "ruff":
        clone.install(name, None)
    result = clone.run(f"BENCHMARKS=pmnist; source run_experiments.sh; {SETUP}")
    assert result.stdout.endswith(f"\n{clone.folder}/.venv/bin/python\n")
    first, second = clone.read("pip_calls").splitlines()
    assert [first[:4], second[:6]] == ["tqdm", "pytest"]
    assert "torch==" in first and "torch==" in second and "tqdm==" in second


def test_newer_versions_than_in_a_new_environment_are_used(clone, shell):
    clone.install("torch", "2.99.1")
    result = clone.run("BENCHMARKS=pmnist source run_experiments.sh", shell)
    assert result.returncode == 0
    assert re.fullmatch("note: torch 2.99.1 is newer than .* gets, below 2.14\n", result.stderr)
    assert not (clone.folder / ".venv").exists()


KILLED = "import os, signal; os.kill(os.getppid(), signal.SIGKILL); sys.exit()"


@pytest.mark.parametrize(
    "shell, pip, status", [("bash", "sys.exit(1)", 1), ("zsh", KILLED, 137)], indirect=["shell"]
)
def test_a_stopped_installation_is_continued(clone, shell, pip, status):
    """It runs nothing, leaves the shell as it was and is no environment the next time."""
    clone.write("requirements.txt", "torch>=2.6\nno_such_package")
    clone.write("pip", pip)
    command = "source run_experiments.sh; echo status $?; echo ${VIRTUAL_ENV-none}"
    result = clone.run(command, shell)
    assert (result.stdout, clone.calls()) == (f"status {status}\nnone\n", [])
    assert ("error: " in result.stderr) == (status == 1)
    assert clone.run("bash run_experiments.sh; echo status $?").stdout == f"status {status}\n"
    clone.write("pip", "")
    assert clone.run("BENCHMARKS=pmnist source run_experiments.sh", shell).returncode == 0
    calls = clone.read("pip_calls").splitlines()
    assert len(calls) == 3 and all(call.startswith("no_such_package | torch==") for call in calls)
