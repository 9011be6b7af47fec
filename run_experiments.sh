#!/usr/bin/env bash
# Run the benchmarks, then print the table of results. From bash or zsh, from any folder:
#
#   source run_experiments.sh                 every benchmark, then the report
#   source run_experiments.sh -- --lr 0.02    what follows -- goes to every script
#   source run_experiments.sh --setup         only the environment, with what the tests need
#   source run_experiments.sh --list          only print the commands, one per line
#   SEEDS="1 2 3" source ...                  seeds to run; default: each script's own
#   BENCHMARKS="pmnist cifar100" source ...   default: pmnist cifar100 cifar100_superclass
#                                             five_datasets; pmnist_mine is main_pmnist_mine.py
#   JOBS=4 source ...                         so many runs at a time; they share the cores and
#                                             are spread over the GPUs; default: 1
#   QUICK=1 source ...                        one epoch of two tasks, in models/quick, always anew
#
# The same command again skips what is finished and continues the rest. Output is added to
# models/logs. Relative paths start from the folder of this file. A script that has options of its
# own calls "bash run_experiments.sh": what is sourced without arguments sees those of the caller.
#
# The environment is the current Python if it has what requirements.txt asks for, newer versions
# included. Else it is .venv, made here once: it adds what is missing to a Python that has PyTorch,
# or gets tested versions of everything. Afterwards it is active in a shell that sourced this file.
#
# Exit status: 0 if all succeeded, 1 if something failed, 2 for wrong input.

# This part is read by every shell. zsh and dash read a file command by command, so what follows
# it may be bash's alone.
if [ -z "${BASH_VERSION-}${ZSH_VERSION-}" ]; then
    echo "run_experiments.sh: error: use bash or zsh, as in: bash run_experiments.sh" >&2
    return 2 2>/dev/null || exit 2
fi
if [ -n "${ZSH_VERSION-}" ] && [ "${ZSH_EVAL_CONTEXT##*:}" != file ]; then
    exec bash "$0" "$@" # run by zsh, not sourced
fi
if (return 0) 2>/dev/null; then
    # Sourced: this shell is only activated, and a bash of its own does the rest.
    eval "$(
        export SEEDS="${SEEDS-}" BENCHMARKS="${BENCHMARKS-}" JOBS="${JOBS-}" QUICK="${QUICK-}"
        bash "${BASH_SOURCE:-${(%):-%x}}" --activate "$@" || echo "return $?"
    )"
    SEEDS="${SEEDS-}" BENCHMARKS="${BENCHMARKS-}" JOBS="${JOBS-}" QUICK="${QUICK-}" \
        bash "${BASH_SOURCE:-${(%):-%x}}" --sourced "$@"
    return
fi

set -u
CDPATH= cd -- "$(dirname -- "$0")" || exit

fail() { # STATUS MESSAGE
    echo "run_experiments.sh: error: $2" >&2
    exit "$1"
}

quoted() { # WORD: print it as every sh reads it; printf %q may print what only bash reads
    local quote="'\\''"
    case $1 in
        '' | *[!a-zA-Z0-9_./=:,+-]*) echo "'${1//\'/$quote}'" ;;
        *) echo "$1" ;;
    esac
}

# Environment --------------------------------------------------------------------------------------
inventory() { # PYTHON FILE...: compare a Python with requirements; status 1 if it is unusable
    # Prints "has NAME==VERSION" or "lacks REQUIREMENT" for each, and a note if a version is newer
    # than in a new environment. It goes by recorded versions, because a CUDA build of torchvision
    # beside a CPU build of torch serves the scripts but cannot be imported.
    "$1" - "${@:2}" 2>/dev/null <<'PYTHON'
import importlib.metadata
import re
import sys


def numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


if sys.version_info < (3, 10):
    sys.exit(1)
for file in sys.argv[1:]:
    for line in open(file):
        requirement = line.partition("#")[0].strip()
        if not requirement:
            continue
        name, exact, lowest, above = re.fullmatch(
            r"([\w-]+)(?:==([\d.]+))?(?:>=([\d.]+))?(?:,<([\d.]+))?", requirement
        ).groups()
        try:
            version = importlib.metadata.version(name) or "0"
        except importlib.metadata.PackageNotFoundError:
            version = "0"
        unequal = exact and version != exact
        if version == "0" or unequal or numbers(version) < numbers(lowest or ""):
            print("lacks", requirement)
            continue
        print(f"has {name}=={version}")
        if above and numbers(version) >= numbers(above):
            print(f"note: {name} {version} is newer than what a new environment gets, below {above}")
PYTHON
}

satisfied() { # PYTHON FILE...
    local found
    found=$(inventory "$@") && ! grep -q "^lacks" <<<"$found"
}

outer_python() { # print the Python to start from: one with PyTorch if there is any
    local candidate found usable=
    PATH=${PATH//"$PWD/.venv/bin:"/}
    for candidate in python python3 python3.1{4,3,2,1,0}; do
        found=$(inventory "$candidate" requirements.txt) || continue
        usable=${usable:-$candidate}
        if grep -q "^has torch==" <<<"$found"; then
            usable=$candidate
            break
        fi
    done
    [ -n "$usable" ] && command -v "$usable"
}

make_environment() { # FILE...: make .venv, or mend one that is incomplete or was moved
    local outer packages
    outer=$(outer_python) || fail 1 "there is no Python from 3.10 on: install one, then try again"
    # Links to a Python that is gone would be kept.
    rm -f .venv/bin/python*
    "$outer" -m venv .venv || return
    packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    if inventory "$outer" requirements.txt | grep -q "^has torch=="; then
        # Like venv --system-site-packages, which skips the packages of a venv that is active.
        "$outer" - >"$packages/outer.pth" <<'PYTHON'
import site

folders = site.getsitepackages()
if site.ENABLE_USER_SITE:
    folders.append(site.getusersitepackages())
print("import site;", "; ".join(f"site.addsitedir({folder!a})" for folder in folders))
PYTHON
    else
        rm -f "$packages/outer.pth"
    fi
    inventory .venv/bin/python "$@" >.venv/inventory.txt || return
    sed -n "s/^has //p" .venv/inventory.txt >.venv/present.txt
    sed -n "s/^lacks //p" .venv/inventory.txt >.venv/missing.txt
    [ -s .venv/missing.txt ] || return 0
    # The constraints keep what is there: torchvision comes in the version that fits the torch.
    .venv/bin/python -m pip install -r .venv/missing.txt -c .venv/present.txt
}

environment() { # FILE...: print the command that activates a Python with all that the files ask for
    satisfied python "$@" && return
    if ! (. .venv/bin/activate && satisfied python "$@") 2>/dev/null; then
        echo "The current Python lacks packages of $*: adding them in $PWD/.venv, once." >&2
        make_environment "$@" >&2 ||
            fail 1 "$PWD/.venv is incomplete, see above: try again, at last without that folder"
    fi
    echo ". $(quoted "$PWD/.venv/bin/activate")"
}

# Runs ---------------------------------------------------------------------------------------------
variants() { # BENCHMARK: print the flags of its runs with one seed, one run per line
    case $1-$quick in
        cifar100_superclass*-0) printf '%s\n' "--t_order "{0..4}{,' --official_data'} ;;
        cifar100_superclass*-1) printf '%s\n' "--t_order 0"{,' --official_data'} ;;
        five_datasets*-0) printf '%s\n' "" --official_data ;;
        # A short epoch. The first two tasks are the same with --official_data.
        five_datasets*-1) echo "--pc_valid 0.9" ;;
        *) echo ;;
    esac
}

runs() { # print script and flags of each run, one run per line
    local benchmark seed flags
    for benchmark in "${benchmarks[@]}"; do
        for seed in "${seeds[@]}"; do
            variants "$benchmark" | while read -r flags; do
                echo "main_$benchmark.py${seed:+ --seed $seed}${flags:+ $flags}"
            done
        done
    done
}

run() { # LINE of runs(): its output is added to a log, and a failure to the file $failures
    local command="python $1$arguments" log="models/logs/${1// /_}.txt"
    if [ "$gpus" -gt 1 ]; then
        command="CUDA_VISIBLE_DEVICES=$((slot % gpus)) $command"
    fi
    echo "--- $(date): $command" | tee -a "$log"
    if [ "$jobs" = 1 ]; then
        eval "$command" 2>&1 | tee -a "$log"
    else
        eval "$command" >>"$log" 2>&1
    fi
    [ "${PIPESTATUS[0]}" = 0 ] || echo "failed: $command, see $PWD/$log" >>"$failures"
}

interrupted() { # SIGNAL: end the runs, then this script by the same signal, so that a loop ends too
    kill -TERM -- "-$!" 2>/dev/null
    for _ in {1..50}; do
        kill -0 -- "-$!" 2>/dev/null && sleep 0.1
    done
    [ "$quick" = 1 ] || echo "Interrupted. The same command goes on where this one stopped." >&2
    trap - "$1"
    kill -s "$1" $$
}

# Options ------------------------------------------------------------------------------------------
called=directly
case ${1-} in
    --activate | --sourced)
        called=${1#--}
        shift
        if [ $# -gt 0 ] && [[ $1 != -* ]]; then
            set -- # no options, so they are the arguments of the script that sourced this one
        fi
        ;;
esac
option=
case ${1-} in
    --setup | --list | --help)
        option=$1
        shift
        ;;
esac
if [ $# -gt 0 ]; then
    [ "$1" = -- ] || fail 2 "unknown option $1; flags for the scripts go after --$(
        [ "$called" = directly ] || echo ", and a script with options calls bash run_experiments.sh"
    )"
    shift
fi
case $* in *$'\n'*) fail 2 "flags must not contain line breaks" ;; esac

seeds=(${SEEDS-})
[ ${#seeds[@]} -gt 0 ] || seeds=("")
for seed in "${seeds[@]}"; do
    case $seed in *[!0-9]*) fail 2 "SEEDS must be numbers with spaces between, not '$SEEDS'" ;; esac
done
benchmarks=(${BENCHMARKS-})
[ ${#benchmarks[@]} -gt 0 ] || benchmarks=(pmnist cifar100 cifar100_superclass five_datasets)
for benchmark in "${benchmarks[@]}"; do
    [ -e "main_$benchmark.py" ] || fail 2 "BENCHMARKS: there is no main_$benchmark.py in $PWD"
done
jobs=${JOBS:-1}
case $jobs in
    *[!0-9]* | 0* | ????*) fail 2 "JOBS must be a number of runs from 1 to 999, not '$jobs'" ;;
esac
quick=${QUICK:-0}
case $quick in [01]) ;; *) fail 2 "QUICK must be 1 or 0, not '$quick'" ;; esac

arguments= models_dir= device=
if [ "$quick" = 1 ]; then
    models_dir=models/quick
    arguments=" --n_epochs 1 --n_tasks 2 --models_dir $models_dir"
fi
for word in "$@"; do
    arguments+=" $(quoted "$word")"
done
while [ $# -gt 0 ]; do
    case $1 in # Python's argparse also takes the beginning of a flag
        --mod*=*) models_dir=${1#*=} ;;
        --mod*) models_dir=${2-} ;;
        --dev*) device=given ;;
    esac
    shift
done
# Fewer system calls for memory: a step on a CPU takes 20 % less.
allocator=(
    THP_MEM_ALLOC_ENABLE=1 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=33554432
)

# Main ---------------------------------------------------------------------------------------------
case $option in
    --help)
        [ "$called" = activate ] || sed -n '2,/^$/s/^# \{0,1\}//p' "${0##*/}"
        exit
        ;;
    --list)
        [ "$called" = activate ] && exit
        runs | while read -r line; do
            echo "cd $(quoted "$PWD") && env ${allocator[*]} python $line$arguments"
        done
        exit
        ;;
esac

requirements=(requirements.txt)
[ "$option" != --setup ] || requirements+=(tests/requirements.txt)
activation=$(environment "${requirements[@]}") || exit
eval "$activation"
# Once: the call with --activate came before that with --sourced.
[ "$called" = sourced ] || inventory python requirements.txt | grep "^note" >&2
if [ "$called" = activate ] || [ "$option" = --setup ]; then
    [ -z "$activation" ] || echo "$activation"
    exit
fi

gpus=$(python -c 'import torch; print(torch.cuda.is_available() * torch.cuda.device_count())') ||
    fail 1 "torch cannot be used, see above"
if [ "$gpus" = 0 ] && [ "$quick" = 0 ]; then
    echo "warning: torch sees no GPU, so the runs go to the CPU: PMNIST takes minutes, the others" \
        "take hours" >&2
fi
if [ "$jobs" = 1 ] || [ -n "${CUDA_VISIBLE_DEVICES-}$device" ]; then
    gpus=1 # nothing to spread, or the user has chosen
fi
if [ "$jobs" != 1 ]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    threads=$((cores > jobs ? cores / jobs : 1))
    export OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads
fi
[ "$quick" = 0 ] || rm -rf models/quick
mkdir -p models/logs && failures=$(mktemp) || exit
trap 'rm "$failures"' EXIT

export PYTHONUNBUFFERED=1 "${allocator[@]}" arguments jobs gpus failures
export -f run
slots=() # which job slot a run is in, where it decides the GPU; not every xargs can tell
[ "$gpus" -lt 2 ] || slots=(--process-slot-var=slot)
set -m # the runs become a process group of their own, which can be ended as a whole
(
    runs | tr '\n' '\0' |
        xargs -0 -n 1 -P "$jobs" ${slots[@]+"${slots[@]}"} bash -c 'run "$1"' run
) &
for signal in INT TERM HUP; do
    trap "interrupted $signal" "$signal"
done
set +m
wait "$!" || echo "failed: xargs, so not everything was run" >>"$failures"
python models/report.py ${models_dir:+--models_dir "$models_dir"} ||
    echo "failed: models/report.py" >>"$failures"
! grep . "$failures" >&2
