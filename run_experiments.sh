#!/usr/bin/env bash
# Run the benchmarks, then print the table of results. From bash or zsh, from any folder:
#
#   source run_experiments.sh                 every benchmark, then the report
#   source run_experiments.sh -- --lr 0.02    what follows -- goes to every script; paths are relative to this folder
#   source run_experiments.sh --setup         only the environment, which stays activated
#   source run_experiments.sh --list          only print the commands, one per line; they need the environment
#   SEEDS="1 2 3" source ...                  seeds to run; default: each script's own
#   BENCHMARKS="pmnist cifar100" source ...   default: pmnist cifar100 cifar100_superclass five_datasets
#   JOBS=4 source ...                         so many runs at a time, each with its share of the cores; default: 1
#   QUICK=1 source ...                        one epoch of two tasks in models/quick, always anew: shows that it all works
#
# The environment is the current Python if it satisfies requirements.txt, else .venv, made here once. The same command again
# skips what is finished and resumes the rest; output is added to models/logs/. Exit status 0: all succeeded, 2: wrong input.

if (return 0) 2>/dev/null; then  # sourced, or run by zsh: this shell is only activated, a bash of its own does the rest
    case ${1-} in --list | --help) ;; *) eval "$(bash "${BASH_SOURCE:-${(%):-%x}}" --setup "$@" || echo "return $?")" ;; esac
    [ "${1-}" = --setup ] || SEEDS="${SEEDS-}" BENCHMARKS="${BENCHMARKS-}" JOBS="${JOBS-}" QUICK="${QUICK-}" \
        bash "${BASH_SOURCE:-${(%):-%x}}" "$@"
    return
fi

set -uf
CDPATH= cd -- "$(dirname -- "$0")" || exit
malloc="THP_MEM_ALLOC_ENABLE=1 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=33554432"  # 20 % of a step on a CPU

fail() { echo "run_experiments.sh: error: $2" >&2; exit "$1"; }

satisfied() {  # by recorded versions: a CUDA torchvision beside a CPU torch does for the scripts, but cannot be imported
    python -c 'if True:
        import importlib.metadata, packaging.requirements, sys
        sys.version_info >= (3, 10) or sys.exit(1)
        for wanted in map(packaging.requirements.Requirement, open("requirements.txt").read().split()):
            wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True) or sys.exit(1)' 2>/dev/null
}

environment() {  # make .venv if needed, print the command that activates it
    if ! (. .venv/bin/activate && satisfied) 2>/dev/null; then
        echo "python lacks what requirements.txt asks for: installing it into $PWD/.venv. This is done once." >&2
        for python in python python3 python3.1{4,3,2,1,0} false; do
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
        done
        { "$python" -m venv .venv && .venv/bin/python -m pip install -r requirements.txt; } >&2 ||
            fail 1 "$PWD/.venv was not made, see above: it takes Python 3.10 or later; try again, at last without that folder"
    fi
    printf '. %q\n' "$PWD/.venv/bin/activate"
}

runs() {  # print script and flags of each run, one run per line
    for benchmark in $BENCHMARKS; do
        for seed in ${SEEDS:-""}; do
            case $benchmark${QUICK:+-quick} in
                cifar100_superclass) printf ' --t_order %s\n' {0,1,2,3,4}{,' --official_data'} ;;
                cifar100_superclass-quick) printf ' --t_order %s\n' 0{,' --official_data'} ;;
                five_datasets) printf '%s\n' '' ' --official_data' ;;
                five_datasets-quick) echo ' --pc_valid 0.9' ;;  # a short epoch; --official_data has the same first tasks
                *) echo ;;
            esac | sed "s/^/main_$benchmark.py${seed:+ --seed $seed}/"
        done
    done
}

run() {  # run a line of runs(); its output is added to its log, a failure to the file $failures
    local command="python $1$arguments" log="models/logs/${1// /_}.txt"
    echo "--- $(date): $command" | tee -a "$log"
    if [ "$JOBS" = 1 ]; then eval "$command" 2>&1 | tee -a "$log"; else eval "$command" >>"$log" 2>&1; fi
    [ "${PIPESTATUS[0]}" = 0 ] || echo "failed: $command, see $PWD/$log" >>"$failures"
}

interrupted() {  # end the runs, then this script
    kill -TERM -- "-$!" 2>/dev/null
    for _ in {1..50}; do kill -0 -- "-$!" 2>/dev/null && sleep 0.1; done
    echo "Interrupted. The same command goes on where this one stopped." >&2
    exit 130
}

option=${1-}
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in --setup | --list | --help) shift ;; *) fail 2 "unknown option $1; flags for the scripts go after --" ;; esac
done
SEEDS=$(echo ${SEEDS-}) BENCHMARKS=$(echo ${BENCHMARKS-}) JOBS=${JOBS:-1} QUICK=${QUICK-}  # echo: one space between words
BENCHMARKS=${BENCHMARKS:-pmnist cifar100 cifar100_superclass five_datasets} QUICK=${QUICK#0}
case $JOBS in *[!0-9]* | 0* | ????*) fail 2 "JOBS must be a number of runs at a time, from 1 to 999, not '$JOBS'" ;; esac
case $SEEDS in *[!0-9\ ]*) fail 2 "SEEDS must be numbers with spaces between them, not '$SEEDS'" ;; esac
for word in $BENCHMARKS; do [ -e "main_$word.py" ] || fail 2 "BENCHMARKS: there is no main_$word.py in $PWD"; done
arguments=${QUICK:+ --n_epochs 1 --n_tasks 2 --models_dir models/quick}$([ $# -lt 2 ] || printf ' %q' "${@:2}")
case $option in
    --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${0##*/}"; exit ;;
    --list) runs | while read -r run; do printf 'cd %q && env %s python %s\n' "$PWD" "$malloc" "$run$arguments"; done; exit ;;
    --setup) satisfied || environment; exit ;;
esac
activate=$(satisfied || environment) && eval "$activate" || exit

[ -n "$QUICK" ] || python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    echo "warning: torch sees no GPU, so the runs go to the CPU: PMNIST takes minutes, the others take hours" >&2
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) threads=$((cores > JOBS ? cores / JOBS : 1))
[ "$JOBS" = 1 ] || export OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads
if [ -n "$QUICK" ]; then rm -rf models/quick; fi
mkdir -p models/logs && failures=$(mktemp) || exit
trap 'rm "$failures"' EXIT
export $malloc PYTHONUNBUFFERED=1 JOBS arguments failures
export -f run
set -m  # the runs become a process group of their own, which can be ended as a whole
(runs | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -c 'run "$1"' run) &
trap interrupted INT TERM HUP
set +m
wait "$!" || echo "xargs failed: not all was run" >>"$failures"
eval python models/report.py $(grep -oE -- '--models_dir[ =]([^\ ]|\\.)+' <<<"$arguments") ||  # the --models_dir of the runs
    echo "failed: models/report.py" >>"$failures"
! grep . "$failures" >&2
