#!/usr/bin/env bash
# Train by papermill, on a laptop, a GPU, a node or a cluster.  Options are papermill's: parameters
# of notebooks/06_run.ipynb.
#   bash train_job.sh                               all contestants on digits, one after the other
#   bash train_job.sh -p model vit -p dataset fashion-mnist     one model
#   NPROC=2 bash train_job.sh …                     two processes on this machine
#   sbatch train_job.sh …                           one GPU
#   sbatch --gpus-per-node=8 --cpus-per-task=64 [--nodes=4] train_job.sh …      a node, or several
#   sbatch --array=0-4 train_job.sh -p model vit …  one seed per task
# The same command again goes on with a run that was stopped.  Preempted or out of time, a job saves
# and requeues itself.
# VIT_SETUP: a file to source first (modules, conda); without it, .venv beside this script is used.
# VIT_HOME: where data/, runs/ and saved_models/ are, if not here.
#SBATCH --job-name=vit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"      # sh train_job.sh
if [ "${BASH_SOURCE[0]}" != "$0" ]; then                # an exit would end the shell
    echo "train_job: run it, bash ${BASH_SOURCE[0]} …, rather than source it"
    return 2
fi
set +o posix -uo pipefail
unset CDPATH        # with it, cd would print, and might go elsewhere
{                   # read to its end before anything runs: an update does not reach a running job
say() { echo "$(date +%T) train_job: $*"; }

# The script may have been called by a link.  As a batch job, it is a copy in SLURM's spool folder;
# the job's record knows the original, with its options after it.
script=${BASH_SOURCE[0]} job=""
follow() {
    while [ -L "$script" ]; do
        local link; link=$(readlink "$script")
        case $link in /*) script=$link ;; *) script=$(dirname "$script")/$link ;; esac
    done
}
follow
if [ ! -e "$(dirname "$script")/vit_helpers.py" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    job=$SLURM_JOB_ID
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    script=$(scontrol -o show job "$job" | sed -n 's/.* Command=\(.*\) WorkDir=.*/\1/p')
    while [ ! -e "$script" ] && [ "$script" != "${script% *}" ]; do script=${script% *}; done
    follow
fi
ROOT=$(cd "$(dirname "$script")" && pwd -P) && [ -e "$ROOT/vit_helpers.py" ] || {
    say "there is no vit_helpers.py beside $script: it belongs into the project's folder"
    exit 1
}
VIT_HOME=${VIT_HOME:-$ROOT} VIT_CWD=${VIT_CWD:-$PWD}
case $VIT_HOME in
    "~"|"~/"*) VIT_HOME=${HOME:-}${VIT_HOME#"~"} ;;     # it was in quotes
    /*) ;;
    *) VIT_HOME=$VIT_CWD/$VIT_HOME ;;
esac
if ! mkdir -p "$VIT_HOME/runs" 2>/dev/null || [ ! -w "$VIT_HOME/runs" ]; then
    say "cannot write to $VIT_HOME/runs: set VIT_HOME to a folder that you may write to"
    exit 1
fi
VIT_HOME=$(cd "$VIT_HOME" && pwd)
export ROOT VIT_HOME VIT_CWD
case ${VIT_SETUP:-} in "~/"*) VIT_SETUP=${HOME:-}${VIT_SETUP#"~"} ;; esac
if [ -n "${VIT_SETUP:-}" ] && [ ! -r "$VIT_SETUP" ]; then
    say "cannot read the file to source, VIT_SETUP=$VIT_SETUP"
    exit 1
fi
given=("$@")
set --                                              # or the file would take them for its own
set +u                                              # module files and conda know no `set -u`
# shellcheck disable=SC1090,SC1091
if [ -n "${VIT_SETUP:-}" ]; then . "$VIT_SETUP"
elif [ -d "$ROOT/.venv" ]; then                         # wherever it was moved to
    PATH=$ROOT/.venv/bin:$PATH; unset PYTHONHOME
fi
set +eo pipefail +o posix -u                            # whatever that file has set
set -- ${given[@]+"${given[@]}"}
NPROC=${NPROC:-1} NODES=1
[ -n "$job" ] && NPROC=${SLURM_GPUS_ON_NODE:-1} NODES=${SLURM_NNODES:-1}
export NPROC NODES
cd "$ROOT" || exit 1    # what lies where this was typed, a random.py say, must not be imported
find_papermill='import importlib.util as u, sys; sys.exit(not u.find_spec("papermill"))'
if ! python -c "$find_papermill" 2>/dev/null; then
    say "no papermill in $(command -v python || echo 'a Python, for there is none'):" \
        "run \`make setup\` in $ROOT (delete .venv first, if there is one from elsewhere;" \
        "without make: python3 -m venv .venv && .venv/bin/pip install -r requirements.txt)," \
        "or name a file to source in VIT_SETUP"
    exit 1
fi

# Which models, and under what names.
model="" prefix="" seed="" arguments=()
while [ $# -gt 0 ]; do
    case "$1 ${2:-}" in
        "-p model"|"-r model") model=${3?"$2 needs a value"} ;;
        "-p run"|"-r run") prefix=${3?"$2 needs a value"} ;;
        "-p seed"|"-r seed") seed=${3?"$2 needs a value"} ;;
        -[pr]\ *=*) say "write $1 ${2%%=*} ${2#*=}, without ="; exit 2 ;;
        -h\ *|--help\ *) sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p;}' "$script"; exit ;;
        -[pr]\ ?*) arguments+=("$1" "$2" "${3?"$2 needs a value"}") ;;
        *) say "do not know '$1': options are -p NAME VALUE or -r NAME TEXT"; exit 2 ;;
    esac
    shift 3
done
for name in model prefix seed; do                       # None: left open
    [ "${!name}" = None ] && printf -v "$name" ""
done
while [ "${prefix%/}" != "$prefix" ]; do prefix=${prefix%/}; done      # completed by Tab
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
contestants() {
    python -c "import vit_helpers; print(*vit_helpers.load_notebook('01_models').MODELS)"
}
models=${model:-$(contestants)} || exit 1
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    if [ -n "$seed" ]; then
        say "in an array, the task's number is the seed: leave out -p seed"
        exit 2
    fi
    seed=$SLURM_ARRAY_TASK_ID prefix=${prefix:+$prefix-seed$seed}
fi

# The job's own folder.  A file `stop` in it asks the training to save and stop; the kernels never
# see a signal.
# (A number of a process is one in its container alone.)
here=$HOSTNAME-$(readlink /proc/self/ns/pid 2>/dev/null | tr -dc 0-9)
for old in "$VIT_HOME/runs/.job-$here@"*; do                    # of scripts that were killed
    [ ! -O "$old" ] || kill -0 "${old##*@}" 2>/dev/null || rm -rf "$old"
done
export VIT_JOB=$VIT_HOME/runs/.job-${job:-$here@$$}
rm -rf "$VIT_JOB" && mkdir "$VIT_JOB" || exit 1
if [ ! -w "${HOME:-/nowhere}" ]; then                   # a container's, or none: what needs one
    export IPYTHONDIR=$VIT_JOB/ipython JUPYTER_RUNTIME_DIR=$VIT_JOB/jupyter
    export MPLCONFIGDIR=$VIT_JOB/matplotlib HOME=${HOME:-$VIT_JOB}
fi
# Not the process group: JupyterLab's kernel may be in it.
# shellcheck disable=SC2317                         # called by the traps
below() { local child; for child in $(pgrep -P "$1"); do below "$child"; echo "$child"; done; }
# (The file `stop` does not tell whether this is the second: the shell of a node may have made it.)
stopping=""
# shellcheck disable=SC2317
asked() {
    if [ "$1" = INT ] && [ -n "$stopping" ]; then
        say "interrupted twice: killed"
        exec 2>/dev/null                                    # who was killed, we know
        command -v pgrep >/dev/null || { rm -rf "$VIT_JOB"; kill -KILL 0; }     # better too many
        # shellcheck disable=SC2046
        kill -KILL $(below $$)                              # first: none may write there any more
        rm -rf "$VIT_JOB" || { sleep 1; rm -rf "$VIT_JOB"; }
        kill -KILL $$
    fi
    stopping=yes
    say "$1: the training saves after its step and stops"; touch "$VIT_JOB/stop"
}
trap 'asked USR1' USR1; trap 'asked TERM' TERM; trap 'asked INT' INT

# Rank 0 lives on the job's first node.
# (Ports from 32768 on may be taken by connections to elsewhere.)
id=$$                                                   # several may share an allocation
[ -n "$job" ] && id=$SLURM_JOB_ID                       # all nodes must know it
export HEAD=127.0.0.1 PORT=$((20000 + id % 12000))
if [ "$NODES" -gt 1 ]; then
    HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
    if ! getent hosts "$HEAD" >/dev/null 2>&1; then
        HEAD=$(scontrol show node "$HEAD" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    fi
fi

# One rank: one papermill, one kernel.  The notebook is written once, at its end: after every cell,
# that would take a sixth of a short run.  Kernels that start at the same moment may pick the same
# port; the one that dies of it, or never answers, before it has run anything is started again.
quiet() { grep -v --line-buffered "Kernel is running over TCP without encryption"; }
end_if_port_is_taken() {    # such a kernel may neither die nor answer
    for _ in {1..300}; do
        sleep 1
        kill -0 "$1" 2>/dev/null || return
        grep -q "ZMQError: Address already in use" "$2" || continue
        pkill -KILL -P "$1"
        return
    done
}
rank() {
    local code papermill output=- errors="$VIT_JOB/errors${RANK:-0}"
    [ "${RANK:-0}" = 0 ] || output=/dev/null                # each would print the same
    for _ in 1 2 3; do
        rm -f "$errors"
        python -m papermill "$ROOT/notebooks/06_run.ipynb" "$VIT_JOB/rank${RANK:-0}.ipynb" \
            -k python3 --start-timeout 300 --cwd "$ROOT/notebooks" --no-progress-bar \
            --no-request-save-on-cell-execute --log-level ERROR \
            --stdout-file "$output" --stderr-file - "$@" \
            2> >(tee "$errors" | quiet >&2) &
        papermill=$!
        end_if_port_is_taken $papermill "$errors" >/dev/null 2>&1 &
        wait_for $papermill && return 0
        code=$?
        [ -e "$VIT_JOB/stop" ] || touch "$VIT_JOB/failed"   # then others are stopped because of it
        sleep 1
        grep -qE "Kernel died before replying to kernel_info|Kernel didn't respond in" "$errors" ||
            return "$code"
        rm -f "$VIT_JOB/failed"
        echo "train_job: the kernel did not start; once more"
    done
    return "$code"
}
# One node: torchrun if there are several ranks.  Signals that reach the shell of a node become the
# stop file; all below it ignores them (ignored signals stay ignored across exec).  torchrun would
# handle some all the same, SIGHUP under nohup among them: it is given one that nobody sends.
node() {
    trap 'touch "$VIT_JOB/stop"' USR1 TERM INT
    (   trap "" USR1 TERM INT
        if [ "$NODES" = 1 ] && [ "$NPROC" = 1 ]; then
            rank "$@"
            exit
        fi
        cores=$(python -c "import vit_helpers; print(vit_helpers.available_cores())")
        if [ "$cores" -lt "$NPROC" ]; then
            echo "train_job: $NPROC processes share $cores cores; ask for more" \
                "(sbatch --cpus-per-task=…)"
        fi
        threads=$((cores / NPROC > 0 ? cores / NPROC : 1))
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
        exec python -m torch.distributed.run --nnodes="$NODES" --node-rank="${SLURM_NODEID:-0}" \
            --nproc-per-node="$NPROC" --master-addr="$HEAD" --master-port="$PORT" \
            --signals-to-handle=SIGUSR2 --shutdown-timeout=5 --max-restarts=0 --no-python \
            --log-dir="$VIT_JOB/torchrun" \
            bash -c 'rank "$@"' rank "$@" ) &
    wait_for $!
}
wait_for() {                # a trap ends a `wait`: wait again until the process itself has ended
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1" 2>/dev/null
}
export -f rank node wait_for quiet end_if_port_is_taken

code=0 finished=() executed=""
for model in $models; do
    set -- -r model "$model" -p seed "${seed:-0}" ${arguments[@]+"${arguments[@]}"}
    if [ -n "$prefix" ]; then
        [ "$models" = "$model" ] && set -- "$@" -r run "$prefix"
        [ "$models" = "$model" ] || set -- "$@" -r run "$prefix-$model"
    fi
    if [ -n "$job" ]; then
        # One shell a node, with all GPUs that the job has there (however it was asked for them),
        # and with the functions of this one (whatever sbatch --export said).
        srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --export=ALL \
            ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$SLURM_GPUS_ON_NODE"} \
            --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
            --kill-on-bad-exit=1 bash -c 'node "$@"' node "$@" </dev/null &
    else
        node "$@" </dev/null &
    fi
    wait_for $!; code=$?
    executed=""                                         # there is none of a kernel that died
    run=$(cat "$VIT_JOB/run" 2>/dev/null) && [ -e "$VIT_JOB/rank0.ipynb" ] &&
        mv "$VIT_JOB/rank0.ipynb" "$VIT_HOME/runs/$run/06_run.ipynb" &&
        executed=", the executed notebook in runs/$run"
    [ "$code" = 0 ] || break
    finished+=("$(cat "$VIT_JOB"/run "$VIT_JOB"/was-done 2>/dev/null)")
    rm -f "$VIT_JOB"/run "$VIT_JOB"/was-done
done

state=$([ -n "$job" ] && scontrol -o show job "$job" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
if [ "$code" = 0 ]; then
    echo
    python -c 'import sys, vit_helpers; vit_helpers.print_runs(sys.argv[1:])' "${finished[@]}"
    echo "Runs are in $VIT_HOME/runs (see \`make tensorboard\`),"
    echo "the models with the lowest validation loss in $VIT_HOME/saved_models."
elif [ ! -e "$VIT_JOB/stop" ] || [ -e "$VIT_JOB/failed" ]; then
    say "failed with code $code; the error is above$executed"
elif [ "$state" = RUNNING ] && [ -e "$VIT_JOB/saved" ]; then    # not cancelled, and with progress
    say "saved: back into the queue"
    if scontrol requeue "$job"; then            # SLURM ends this script meanwhile
        sleep 60 & wait $!
        code=0
    fi
else
    say "stopped${state:+ in state $state}; the same command goes on from the last checkpoint"
fi
rm -rf "$VIT_JOB"
exit "$code"
}
