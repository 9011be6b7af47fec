"""run_experiments.sh in real shells: a copy of it beside small stand-ins for the scripts, in a folder with a space in its name."""
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELLS = {"bash": ["bash", "--norc", "--noprofile"], "zsh": ["zsh", "-f"]}
VARIABLES = ("SEEDS", "BENCHMARKS", "JOBS", "QUICK")

# Notes how it was called, then does what the file beside it says
STAND_IN = """
import json, os, sys
from pathlib import Path
name = Path(__file__).stem.removeprefix("main_")
call = [name, sys.argv[1:], os.getcwd(), os.environ.get("OMP_NUM_THREADS")]
with open("calls", "a") as file:
    file.write(json.dumps(call) + "\\n")
print("output of", name, *sys.argv[1:], flush=True)
exec(Path("behaviour").read_text())
"""


@pytest.fixture(params=SHELLS)
def shell(request):
    """Each shell in turn."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture
def clone(tmp_path):
    """A folder like a clone's, whose Python satisfies the requirements."""
    return make_clone(tmp_path, "a clone")


def make_clone(tmp_path, name):
    """The folder tmp_path/name with the shell script, stand-ins for three of the scripts, and a torch that sees a GPU."""
    folder = tmp_path / name
    folder.mkdir()
    for file in ("run_experiments.sh", "requirements.txt"):
        shutil.copy(ROOT / file, folder)
    for benchmark in ("pmnist", "cifar100", "cifar100_superclass"):
        (folder / f"main_{benchmark}.py").write_text(STAND_IN)
    (folder / "behaviour").write_text("")
    (folder / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    executable(tmp_path / "bin" / "python", f"exec {shlex.quote(sys.executable)} \"$@\"")
    return folder


def executable(path, text):
    """Make a bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text + "\n")
    path.chmod(0o755)


def environ(clone, **variables):
    """This process's environment with the clone's Python first, and nothing but these of the script's variables."""
    kept = {key: value for key, value in os.environ.items() if key not in (*VARIABLES, "OMP_NUM_THREADS", "PYTHONPATH")}
    return {**kept, "PATH": f"{clone.parent / 'bin'}:{os.environ['PATH']}", **variables}


def do(clone, command, shell="bash", cwd=None, **variables):
    """Run a command in a shell, in the clone or in cwd."""
    return subprocess.run([*SHELLS[shell], "-c", command], cwd=cwd or clone, env=environ(clone, **variables), text=True,
                          capture_output=True, timeout=60)


def calls(clone):
    """How the stand-ins were called: [name, arguments, folder, threads] of each."""
    path = clone / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ----------------------------------------------------------------------------------------------------------------------
# The caller's shell
# ----------------------------------------------------------------------------------------------------------------------
STATE = {
    "bash": "set +o; shopt -p; pwd; trap; declare -F; export -p | grep -v 'declare -x _='; compgen -v | grep -vxE '_|BASH_.*|PIPESTATUS|FUNCNAME'",
    "zsh": "set -o; pwd; trap; print -rl -- ${(ok)functions}; export | grep -v '^_='; print -rl -- ${(ok)parameters}",
}
OPTIONS = {"bash": "set -euo pipefail; shopt -s failglob", "zsh": "setopt err_exit nounset nomatch warn_create_global noclobber"}


@pytest.mark.parametrize("options", [False, True])
def test_sourcing_leaves_the_shell_as_it_was(clone, shell, options):
    """Options, folder, traps, functions and variables are the same afterwards; values set but not exported are used."""
    script = shlex.quote(str(clone / "run_experiments.sh"))
    result = do(clone, f"""
        {OPTIONS[shell] if options else ''}
        SEEDS='3  4' BENCHMARKS=pmnist
        state() {{ {STATE[shell]}; }}
        state >| ../before
        source {script} -- --lr 1
        state >| ../after
    """, shell, cwd=clone.parent / "bin")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert (clone.parent / "after").read_text() == (clone.parent / "before").read_text()
    assert [call[1:3] for call in calls(clone)] == [[["--seed", seed, "--lr", "1"], str(clone)] for seed in "34"]


@pytest.mark.parametrize("command", ["source run_experiments.sh", "{shell} run_experiments.sh", "./run_experiments.sh"])
def test_sourced_or_run_the_status_is_the_same(clone, shell, command):
    """0 when all succeed, 1 when one fails, and the shell lives on."""
    command = f"BENCHMARKS=pmnist; export BENCHMARKS; {command.format(shell=shell)}; echo status $?"
    assert do(clone, command, shell).stdout.endswith("status 0\n")
    (clone / "behaviour").write_text("sys.exit(2)")
    assert do(clone, command, shell).stdout.endswith("status 1\n")
    assert len(calls(clone)) == 2


@pytest.mark.parametrize("wrong, named", [("--sed", "--sed"), ("3", "3"), ("BENCHMARKS=mnist", "mnist"), ("JOBS=0", "JOBS"), ("JOBS=two", "JOBS"),
                                          ("SEEDS=1,2", "1,2")])
def test_wrong_input_is_one_line(clone, shell, wrong, named):
    """Status 2 before anything is run, and the caller's shell lives on."""
    command = f"{wrong} source run_experiments.sh" if "=" in wrong else f"source run_experiments.sh {wrong}"
    result = do(clone, f"{command}; echo status $?", shell)
    assert result.stdout == "status 2\n"
    assert result.stderr.count("\n") == 1 and named in result.stderr
    assert not calls(clone)


def test_ctrl_c_ends_the_runs_and_not_the_shell(clone, shell):
    """Typed at a terminal: no run is left, a line says how to go on, and the shell takes the next command."""
    (clone / "behaviour").write_text("import fcntl, time\nlock = open(f'lock_{name}', 'w')\nfcntl.flock(lock, fcntl.LOCK_EX)\ntime.sleep(60)")
    locks = [clone / "lock_pmnist", clone / "lock_cifar100"]
    process = subprocess.Popen([sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])", *SHELLS[shell], "-i"], cwd=clone, bufsize=0,
                               env=environ(clone, JOBS="2", BENCHMARKS="pmnist cifar100", TERM="dumb"), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        process.stdin.write(b"source run_experiments.sh\n")
        wait_for(lambda: all(map(locked, locks)))
        process.stdin.write(b"\x03")
        wait_for(lambda: not any(map(locked, locks)))
        process.stdin.write(b"echo status $?\nexit\n")
        output = process.communicate(timeout=20)[0].decode()
    finally:
        process.kill()
    assert "status 130" in output
    assert "The same command goes on" in output
    assert len(calls(clone)) == 2


def locked(path):
    """Whether a process holds a lock on the file, which ends with the process however that ends."""
    if path.exists():
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def wait_for(condition, seconds=20):
    """Return once the condition holds; it must within these seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------------------------------------
# The runs
# ----------------------------------------------------------------------------------------------------------------------
def test_a_failure_is_listed_and_the_rest_goes_on(clone):
    """The list names the run and its log, in which the error is; the report comes all the same; the same commands are run the next time."""
    (clone / "models").mkdir()
    (clone / "models" / "report.py").write_text("print('the report')")
    (clone / "behaviour").write_text("if name == 'pmnist': sys.exit('out of luck')")
    command = "BENCHMARKS='pmnist cifar100' source run_experiments.sh"
    result = do(clone, command)
    assert result.returncode == 1
    assert [call[0] for call in calls(clone)] == ["pmnist", "cifar100"]
    assert "\noutput of cifar100\n" in result.stdout
    assert result.stdout.endswith("the report\n")
    log = re.fullmatch(r"failed with status 1: pmnist/seed_default, see (.*)\n", result.stderr)[1]
    assert re.fullmatch("--- .*: python main_pmnist.py\noutput of pmnist\nout of luck\n", Path(log).read_text())

    (clone / "behaviour").write_text("")
    again = do(clone, command)
    assert (again.returncode, again.stderr) == (0, "")
    assert calls(clone)[2:] == calls(clone)[:2]
    assert Path(log).read_text().count("output of pmnist\n") == 2  # what was in the log is still there


def test_a_failing_report_fails(clone):
    """The report belongs to what must succeed."""
    (clone / "models").mkdir()
    (clone / "models" / "report.py").write_text("raise SystemExit(1)")
    result = do(clone, "BENCHMARKS=pmnist source run_experiments.sh")
    assert (result.returncode, result.stderr) == (1, "failed: models/report.py\n")


@pytest.mark.parametrize("flags, folder", [("", "models"), ("-- --lr 1 --models_dir 'my runs'", "my runs"), ("-- --models_dir=there", "there")])
def test_the_report_is_on_the_folder_of_the_runs(clone, flags, folder):
    """Wherever an argument puts them."""
    (clone / "models").mkdir()
    (clone / "models" / "report.py").write_text("import sys; print(sys.argv[1:])")
    result = do(clone, f"BENCHMARKS=pmnist source run_experiments.sh {flags}")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, str(["--models_dir", folder]))


@pytest.mark.parametrize("file", ["run_experiments.sh", "a clone/run_experiments.sh"])
def test_help_is_the_head_of_the_script(clone, file):
    result = do(clone, f"bash '{file}' --help", cwd=clone if "/" not in file else clone.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Run the benchmarks") and "QUICK=1" in result.stdout


def test_a_copy_without_its_repository_is_named(clone):
    """A batch system may run a copy of the script from a folder of its own."""
    (clone / "requirements.txt").unlink()
    result = do(clone, "bash run_experiments.sh")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert f"{clone} is not the repository" in result.stderr


def test_jobs(clone):
    """JOBS=2 runs two at a time, each with its share of the cores and its own log."""
    (clone / "behaviour").write_text("""
import time
other = Path("here_" + {"pmnist": "cifar100", "cifar100": "pmnist"}[name])
Path("here_" + name).touch()
end = time.monotonic() + 20
while not other.exists():
    assert time.monotonic() < end, "alone"
    time.sleep(0.01)
""")
    result = do(clone, "JOBS=2 BENCHMARKS='pmnist cifar100' source run_experiments.sh")
    assert (result.returncode, result.stderr) == (0, "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert sorted(call[0] for call in calls(clone)) == ["cifar100", "pmnist"]
    assert all(1 <= int(call[3]) <= max(1, cores // 2) for call in calls(clone))
    for name in ("cifar100", "pmnist"):
        assert (clone / "models" / "logs" / name / "seed_default.txt").read_text().endswith(f"\noutput of {name}\n")


def test_seeds_and_arguments_reach_every_script(clone):
    """In the given order of benchmarks, with whatever characters."""
    odd = "a b'\"$HOME*&&"
    result = do(clone, f"SEEDS='1 2' BENCHMARKS='cifar100 pmnist' source run_experiments.sh -- --data_dir {shlex.quote(odd)} --setup ''")
    assert result.returncode == 0
    assert [call[:2] for call in calls(clone)] == [[name, ["--seed", seed, "--data_dir", odd, "--setup", ""]]
                                                   for name in ("cifar100", "pmnist") for seed in "12"]
    assert {path.name for path in (clone / "models" / "logs").rglob("*.txt")} == {"seed_1.txt", "seed_2.txt"}


def test_without_gpu(clone):
    """The time that it will take is said at the start, and QUICK=1, in which nothing is said, runs under names of its own."""
    (clone / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    first = do(clone, "SEEDS='1 2' BENCHMARKS=cifar100 source run_experiments.sh").stdout.splitlines()[0]
    minutes = int(re.search(r"^CPU_MINUTES_cifar100=(\d+)$", (ROOT / "run_experiments.sh").read_text(), re.M)[1])
    assert f"roughly {2 * minutes // 60} h {2 * minutes % 60} min" in first and "QUICK=1" in first
    quick = do(clone, "QUICK=1 source run_experiments.sh")
    assert quick.returncode == 0 and "no GPU" not in quick.stdout
    names = [call[1][call[1].index("--run_name") + 1] for call in calls(clone)[2:]]
    assert len(names) == 4 and all(name.startswith("quick_") for name in names)
    assert all("--overwrite" in call[1] for call in calls(clone)[2:])  # else the second time would show nothing


# ----------------------------------------------------------------------------------------------------------------------
# The list of commands
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("quick", ["", "1"])
def test_list_of_this_repository(quick):
    """Its scripts and flags exist, PMNIST is first, nothing is there twice; it needs no Python."""
    if not (ROOT / "main_pmnist.py").exists():
        pytest.skip("this is not the whole repository")
    result = subprocess.run(["bash", ROOT / "run_experiments.sh", "--list"], text=True, capture_output=True,
                            env={"QUICK": quick, "SEEDS": "1 2", "PATH": "/usr/bin:/bin"})
    assert (result.returncode, result.stderr) == (0, "")
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(set(map(tuple, lines))) == len(lines)
    assert lines[0][4] == "main_pmnist.py"
    assert {line[4] for line in lines} == {path.name for path in ROOT.glob("main_*.py")}
    for line in lines:
        assert line[:4] == ["cd", str(ROOT), "&&", "python"]
        flags = [word for word in line if word.startswith("--")]
        assert "--seed" in flags and ("--run_name" in flags) == bool(quick)
        for flag in flags:
            assert f'"{flag}"' in (ROOT / line[4]).read_text(), line


def test_list_runs_nothing(clone, shell):
    """Only the commands are printed, by an interpreter that would fail at anything."""
    executable(clone.parent / "bin" / "python", "exit 1")
    result = do(clone, "source run_experiments.sh --list", shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 12
    assert not calls(clone) and not (clone / ".venv").exists()


@pytest.mark.parametrize("name, command", [
    ("clone", "xargs -P 2 -I{} sh -c '{}'"),
    ("a clone", "tr '\\n' '\\0' | xargs -0 -n 1 -P 2 sh -c"),
    ("a clone's", "(cat >list; for i in 1 2 3 4; do sed -n \"${i}p\" list | sh; done)"),
])
def test_list_in_other_hands(tmp_path, name, command):
    """xargs and an array of jobs do from another folder what the script does."""
    clone = make_clone(tmp_path, name)
    variables = {"SEEDS": "1 2", "BENCHMARKS": "pmnist cifar100"}
    assert do(clone, "source run_experiments.sh", **variables).returncode == 0
    result = do(clone, f"bash {shlex.quote(str(clone))}/run_experiments.sh --list | {command}", cwd=tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert sorted(map(str, calls(clone)[4:])) == sorted(map(str, calls(clone)[:4]))


# ----------------------------------------------------------------------------------------------------------------------
# The environment
# ----------------------------------------------------------------------------------------------------------------------
# An interpreter that lacks the packages. What it makes as .venv has them once "pip" was there, which does what its file says
LACKING = """
case "$*" in
    -) exit 1 ;;
    "-m venv .venv")
        mkdir -p .venv/bin
        cp ../bin/venv_python .venv/bin/python
        echo "export VIRTUAL_ENV='$PWD/.venv' PATH='$PWD/.venv/bin':\\$PATH" >.venv/bin/activate ;;
esac
"""
VENV_PYTHON = """
here=$(dirname "$0")/..
case "$*" in
    -) [ -e "$here/packages" ] ;;
    "-m pip install -r requirements.txt") echo pip >>pip_calls; . ./pip; touch .venv/packages ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def bare(clone):
    """A clone on a machine without the packages."""
    executable(clone.parent / "bin" / "python", LACKING)
    executable(clone.parent / "bin" / "venv_python", VENV_PYTHON.format(python=shlex.quote(sys.executable)))
    (clone / "pip").write_text("")
    return clone


def pip_calls(clone):
    """How often packages were installed."""
    return (clone / "pip_calls").read_text().count("pip")


def test_environment_is_made_once_and_activated(bare, shell):
    """--setup leaves it activated; the second time nothing is installed; a run uses it."""
    for _ in range(2):
        result = do(bare, "set -eu; source run_experiments.sh --setup; echo \"$VIRTUAL_ENV\"; command -v python", shell)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{bare}/.venv\n{bare}/.venv/bin/python\n"
        assert pip_calls(bare) == 1
    assert not calls(bare)
    assert do(bare, f"BENCHMARKS=pmnist {shell} run_experiments.sh", shell).returncode == 0
    assert len(calls(bare)) == pip_calls(bare) == 1


def test_killed_installation_is_made_anew(bare):
    """What it left is not taken for an environment, although its packages are recorded."""
    (bare / "pip").write_text("touch .venv/packages .venv/left; kill -9 $PPID")
    assert do(bare, "source run_experiments.sh --setup; echo status $?").stdout == "status 137\n"
    assert (bare / ".venv" / "left").exists()
    (bare / "pip").write_text("")
    assert do(bare, "source run_experiments.sh --setup").returncode == 0
    assert pip_calls(bare) == 2 and not (bare / ".venv" / "left").exists()


def test_failed_installation_goes_no_further(bare, shell):
    """One line after what pip says, no run, and the shell lives on; so also where no virtual environment can be made."""
    (bare / "pip").write_text("exit 1")
    result = do(bare, "source run_experiments.sh; echo status $?", shell)
    assert result.stdout == "status 1\n"
    assert "error: pip could not install requirements.txt" in result.stderr.splitlines()[-1]
    shutil.rmtree(bare / ".venv")
    executable(bare.parent / "bin" / "python", "case \"$*\" in -c*) ;; *) exit 1 ;; esac")
    result = do(bare, "source run_experiments.sh; echo status $?", shell)
    assert result.stdout == "status 1\n"
    assert "error: python could not make" in result.stderr.splitlines()[-1]
    assert not calls(bare)


def test_two_installations_do_not_meet(bare):
    """While one is at work another is refused, and does no harm."""
    (bare / ".venv").mkdir()
    (bare / ".venv" / "unfinished").write_text(f"{os.getpid()}\n")
    result = do(bare, "source run_experiments.sh --setup")
    assert result.returncode == 1 and "another process" in result.stderr
    assert (bare / ".venv" / "unfinished").exists()


def test_moved_environment_is_named(bare):
    """An environment knows its folder: one that was moved activates nothing."""
    assert do(bare, "source run_experiments.sh --setup").returncode == 0
    moved = bare.rename(bare.parent / "moved")
    result = do(moved, "source run_experiments.sh")
    assert result.returncode == 1 and "remove it and try again" in result.stderr
    assert not calls(moved)


@pytest.mark.parametrize("requirement, satisfied", [
    ("numpy>=1.26,<3", True), ("numpy>=99,<100", False), ("numpy>=0.1,<1", False), ("no_such_package>=1,<2", False),
])
def test_the_current_python_is_used_if_it_will_do(clone, requirement, satisfied):
    """By its packages' versions; otherwise a virtual environment is asked for, which cannot be made here."""
    executable(clone.parent / "bin" / "python", f"[ \"$1 $2\" != '-m venv' ] || exit 1; exec {shlex.quote(sys.executable)} \"$@\"")
    with open(clone / "requirements.txt", "a") as file:
        file.write(requirement + "\n")
    result = do(clone, "source run_experiments.sh --setup")
    assert (result.returncode == 0) == satisfied
    assert (f"python lacks {requirement}: installing" in result.stderr) != satisfied


def test_requirements_are_such_as_the_script_reads():
    """One name>=low,<high per line; in a form that is not understood no environment would ever do."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"\w+>=[\d.]+,<[\d.]+", line)] == []
    assert {"torch>=2.6,<2.14", "torchvision>=0.21,<0.29"} < set(lines)
