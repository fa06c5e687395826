#!/usr/bin/env bash
# Stop what up.sh started in the folder $1.
export SLURM_CONF=$1/slurm.conf
scancel --user="$(id -un)" 2>/dev/null
sleep 1
for file in "$1"/slurmd.n1.pid "$1"/slurmd.n2.pid "$1"/slurmctld.pid "$1"/munge/pid; do
    pid=$(cat "$file" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null
    for _ in $(seq 25); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
    kill -9 "$pid" 2>/dev/null
done
exit 0
