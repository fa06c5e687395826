#!/usr/bin/env bash
# A real SLURM on this one machine: munged, slurmctld and two virtual nodes with two fake GPUs each, on loopback, as root,
# without systemd.  All that it writes is in the folder $1; down.sh stops it by pid files.
set -euo pipefail
dir=$1 here=$(cd "$(dirname "$0")" && pwd)
trap '"$here/down.sh" "$dir"' ERR                                   # nothing of it stays behind
mkdir -p "$dir"/{state,spool,log,munge} && chmod 755 "$dir" "$dir/munge"
for i in 0 1 2 3; do mknod -m 666 "$dir/gpu$i" c 1 3; done         # SLURM wants device files: copies of /dev/null
for file in slurm.conf gres.conf; do sed "s|@D@|$dir|g; s|@HOST@|$(hostname -s)|g" "$here/$file.in" > "$dir/$file"; done
export SLURM_CONF=$dir/slurm.conf

(umask 077; head -c 1024 /dev/urandom > "$dir/munge/key")
munged --key-file="$dir/munge/key" --socket="$dir/munge/sock" --pid-file="$dir/munge/pid" --log-file="$dir/log/munged.log" \
    --seed-file="$dir/munge/seed" --num-threads=2 --force 2>> "$dir/log/munged.err"
slurmctld
slurmd -N n1
slurmd -N n2
for _ in $(seq 300); do
    [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = 2 ] && exit 0
    sleep 0.2
done
echo "SLURM did not come up; see $dir/log" >&2
"$here/down.sh" "$dir"
exit 1
