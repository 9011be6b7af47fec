#!/usr/bin/env bash
# Run the benchmarks, then print the table of results. From bash or zsh, from any folder:
#
#   source run_experiments.sh            every benchmark, then the report
#   source run_experiments.sh --setup    only the environment, which stays activated
#   source run_experiments.sh --list     only print the commands, one per line
#   source run_experiments.sh -- --lr 0.02    what follows -- goes to every script
#
#   SEEDS="1 2 3 4 5"              seeds to run; default: each script's own
#   BENCHMARKS="pmnist cifar100"   default: pmnist cifar100 cifar100_superclass five_datasets
#   JOBS=4                         so many runs at a time, each with its share of the cores; default: 1
#   QUICK=1                        one epoch of few tasks, minutes on a CPU: shows that the scripts work, gives no result;
#                                  always from the start
#
# These are set before the command, as in: QUICK=1 source run_experiments.sh. The environment is the current Python if it
# satisfies requirements.txt, else .venv, which is made here once. The same command again skips the runs that are
# finished and resumes the others. Each run's output is added to its file in models/logs/. Paths after -- are relative to
# this folder. Exit status: 0 if all runs succeeded.

# ----------------------------------------------------------------------------------------------------------------------
# In the caller's shell, bash or zsh with whatever options: as little as possible
# ----------------------------------------------------------------------------------------------------------------------
if (return 0) 2>/dev/null; then  # sourced, or run by zsh
    __run_experiments() {
        unset -f __run_experiments
        local file activate
        if [ -n "${ZSH_VERSION-}" ]; then eval 'file=${(%):-%x}'; else file=${BASH_SOURCE:-$0}; fi
        set -- env "SEEDS=${SEEDS-}" "BENCHMARKS=${BENCHMARKS-}" "JOBS=${JOBS-}" "QUICK=${QUICK-}" bash "$file" "$@"
        activate=$(GPM_ONLY_ENVIRONMENT=1 "$@") || return
        if [ -n "$activate" ]; then . "$activate"; fi
        "$@"
    }
    __run_experiments "$@"
    return
fi

# ----------------------------------------------------------------------------------------------------------------------
# From here on in a bash of our own, whose options, functions and folder are nobody else's
# ----------------------------------------------------------------------------------------------------------------------
set -uf
unset CDPATH
cd "$(dirname "$0")" || exit 1

# One run on two CPU cores, in minutes; that of 5-Datasets is an estimate
CPU_MINUTES_pmnist=2
CPU_MINUTES_cifar100=120
CPU_MINUTES_cifar100_superclass=40
CPU_MINUTES_five_datasets=1440

fail() {  # STATUS MESSAGE
    echo "run_experiments.sh: error: $2" >&2
    exit "$1"
}

satisfies() {  # whether the Python $1 has what requirements.txt asks for; what it lacks is printed
    # By the recorded versions, not by import: a CUDA torchvision beside a CPU torch does for the scripts, but fails to import
    "$1" - 2>/dev/null <<'END'
import re, sys
from importlib.metadata import version
from importlib.util import find_spec

def numbers(text):  # "2.13.0+cpu" -> [2, 13, 0]
    return [int(n) for n in re.findall(r"\d+", text.partition("+")[0])]

def satisfied(requirement):  # "name>=a,<b"
    name, low, high = re.fullmatch(r"(\w+)>=([\d.]+),<([\d.]+)", requirement).groups()
    return find_spec(name) is not None and numbers(low) <= numbers(version(name)) < numbers(high)

lacking = [requirement for requirement in open("requirements.txt").read().split() if not satisfied(requirement)]
if sys.version_info < (3, 10):
    lacking.insert(0, "Python>=3.10")
print(*lacking)
sys.exit(len(lacking) > 0)
END
}

environment() {  # print the path of the file that activates the environment, or nothing if the current Python will do
    local python lacking
    if lacking=$(satisfies python); then return; fi
    if [ -e .venv/unfinished ]; then
        if kill -0 "$(cat .venv/unfinished)" 2>/dev/null; then fail 1 "another process is installing into $PWD/.venv: wait for it"; fi
        rm -rf .venv
    fi
    if ! satisfies .venv/bin/python >/dev/null; then
        python=$(command -v python || echo "no python")
        echo "$python${lacking:+ lacks $lacking}: installing requirements.txt into $PWD/.venv. This is done once." >&2
        if [ ! -e .venv ]; then
            for python in python python3 python3.13 python3.12 python3.11 python3.10 ""; do
                "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
            done
            [ -n "$python" ] || fail 1 "Python 3.10 or later is needed and was not found"
            # The file "unfinished" is there until the last package is: what is left of a killed installation is not used
            { mkdir .venv && echo $$ >.venv/unfinished && "$python" -m venv .venv >&2; } || fail 1 "$python could not make $PWD/.venv, see above"
        fi
        .venv/bin/python -m pip install -r requirements.txt >&2 || fail 1 "pip could not install requirements.txt into $PWD/.venv, see above"
        rm -f .venv/unfinished
    fi
    (. .venv/bin/activate && satisfies python >/dev/null) || fail 1 "$PWD/.venv does not work here (was its folder moved?): remove it and try again"
    echo "$PWD/.venv/bin/activate"
}

variants() {  # print the flags of each run of the benchmark $1, one run per line
    local order
    case $1 in
        cifar100_superclass)
            for order in 0 $([ -n "$QUICK" ] || echo 1 2 3 4); do
                printf '%s\n' " --t_order $order" " --t_order $order --official_data"
            done ;;
        five_datasets)
            echo
            [ -n "$QUICK" ] || echo " --official_data" ;;  # the same as without in the first tasks
        *) echo ;;
    esac
}

quick_flags() {  # print the flags that make a run of the benchmark $1 short
    case $1 in
        five_datasets) echo " --overwrite --n_epochs 1 --n_tasks 2 --pc_valid 0.9" ;;  # validation is cheaper than training
        *) echo " --overwrite --n_epochs 1 --n_tasks 3" ;;
    esac
}

runs() {  # print one line per run: its name, a tab, its command
    local benchmark seed variant flags name
    for benchmark in $BENCHMARKS; do
        for seed in ${SEEDS:-default}; do
            variants "$benchmark" | while IFS= read -r variant; do
                flags=$variant
                [ "$seed" = default ] || flags=" --seed $seed$variant"
                name=seed_$seed${variant// --/_}
                name=${name// /_}
                if [ -n "$QUICK" ]; then
                    name=quick_$name
                    flags="$flags$(quick_flags "$benchmark") --run_name $name"
                fi
                printf '%s/%s\tcd %s && python main_%s.py%s\n' "$benchmark" "$name" "$(quote "$PWD")" "$benchmark" "$flags$arguments"
            done
        done
    done
}

quote() {  # print $1 as a word of a shell command
    local quoted="'\\''"
    case $1 in
        *[!A-Za-z0-9_./=,:+@%-]* | "") echo "'${1//\'/$quoted}'" ;;
        *) echo "$1" ;;
    esac
}

run() {  # do what a line of runs() says; a failure is noted in the file $failures
    local name=${1%%$'\t'*} command=${1#*$'\t'} log status
    log=$PWD/models/logs/$name.txt
    mkdir -p "${log%/*}"
    echo "--- $name: ${command#* && }"
    echo "--- $(date): ${command#* && }" >>"$log"
    if [ "$JOBS" = 1 ]; then
        (eval "$command") 2>&1 | tee -a "$log"
        status=${PIPESTATUS[0]}
    else
        (eval "$command") >>"$log" 2>&1
        status=$?
        echo "--- $name: ended with status $status, $(tail -n 2 "$log" | tr '\n' ' ')"
    fi
    [ "$status" = 0 ] || echo "failed with status $status: $name, see $log" >>"$failures"
}

interrupted() {  # end what runs, all of it
    trap '' INT TERM HUP
    kill -TERM -- "-$group" 2>/dev/null
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        kill -0 -- "-$group" 2>/dev/null || break
        sleep 0.2
    done
    kill -KILL -- "-$group" 2>/dev/null
    echo "Interrupted. The same command goes on where this one stopped: nothing but the epochs at work is lost." >&2
    exit 130
}

# What is asked for
[ -e requirements.txt ] || fail 1 "$PWD is not the repository: the script works on what lies beside it, do not copy it elsewhere"
todo=--run
while [ $# -gt 0 ]; do
    case $1 in
        --setup | --list | --help) todo=$1 ;;
        --) shift; break ;;
        *) fail 2 "unknown option $1; there are --setup, --list, --help, and -- before arguments for the scripts" ;;
    esac
    shift
done
arguments= models_dir=models before=
for word in "$@"; do
    arguments="$arguments $(quote "$word")"
    if [ "$before" = --models_dir ]; then models_dir=$word; fi
    case $word in --models_dir=*) models_dir=${word#*=} ;; esac
    before=$word
done

# echo leaves one space between words
SEEDS=$(echo ${SEEDS-}) BENCHMARKS=$(echo ${BENCHMARKS-}) JOBS=${JOBS:-1} QUICK=${QUICK-}
[ "$QUICK" != 0 ] || QUICK=
case $JOBS in *[!0-9]* | 0* | ????*) fail 2 "JOBS must be a number of runs at a time, from 1 to 999, not '$JOBS'" ;; esac
case $SEEDS in *[!0-9\ ]*) fail 2 "SEEDS must be numbers with spaces between them, not '$SEEDS'" ;; esac
if [ -z "$BENCHMARKS" ]; then
    for word in pmnist cifar100 cifar100_superclass five_datasets; do [ ! -e "main_$word.py" ] || BENCHMARKS="$BENCHMARKS $word"; done
fi
for word in $BENCHMARKS; do [ -e "main_$word.py" ] || fail 2 "unknown benchmark '$word': there is no main_$word.py in $PWD"; done

if [ -n "${GPM_ONLY_ENVIRONMENT-}" ]; then  # for the caller's shell, which activates it
    case $todo in --run | --setup) environment ;; esac
    exit
fi
case $todo in
    --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${0##*/}"; exit ;;
    --list) runs | cut -f 2-; exit ;;
esac
activate=$(environment) || exit
if [ -n "$activate" ]; then . "$activate"; fi
if [ $todo = --setup ]; then exit; fi

if [ -z "$QUICK" ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    minutes=0
    for word in $(runs | cut -d / -f 1); do
        word=CPU_MINUTES_$word
        minutes=$((minutes + ${!word:-0}))
    done
    echo "torch sees no GPU: on two CPU cores these runs take roughly $((minutes / 60)) h $((minutes % 60)) min in all," \
        "less what is finished already; QUICK=1 takes minutes."
fi
if [ "$JOBS" -gt 1 ]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    threads=$((cores > JOBS ? cores / JOBS : 1))
    export OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads OPENBLAS_NUM_THREADS=$threads
fi

failures=$(mktemp) || exit 1
trap 'rm -f "$failures"' EXIT
export JOBS failures
export -f run
set -m  # the runs become a process group of their own, which can be ended as a whole
runs | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -c 'run "$1"' run &
group=$(jobs -p %1)
trap interrupted INT TERM HUP
set +m
wait
if [ -e models/report.py ]; then python models/report.py --models_dir "$models_dir" || echo "failed: models/report.py" >>"$failures"; fi
cat "$failures" >&2
[ ! -s "$failures" ]
