#!/usr/bin/env bash
# bash launch/ssh/train.sh HOST,HOST,... FLAGS: one `fusedit train` on each machine, by ssh.
#
# Each machine has fusedit on its PATH, and sees the same --output_dir under the same name. Ctrl-C
# ends the run with a checkpoint, on all machines; the same command goes on from it.
# PORT=29500 is that of the rendezvous, on the first machine; FUSEDIT=.venv/bin/fusedit another path.
set -uo pipefail

if (($# < 2)); then
  sed -n '2s/^# //p' "$0" >&2
  exit 2
fi
IFS=, read -ra hosts <<<"$1"
shift
command=("${FUSEDIT:-fusedit}" train --nnodes "${#hosts[@]}" --rdzv_id "fusedit-$$"
  --rdzv_endpoint "${hosts[0]}:${PORT:-29500}" "$@")

runs=()
is_host=1 # of the rendezvous: the first, by whatever name or address it is given
for host in "${hosts[@]}"; do
  # -tt: the end of this side is a SIGHUP on that one, which asks the run to stop.
  ssh -tt -o ServerAliveInterval=15 "$host" "cd $(printf %q "$PWD") &&
    ${command[*]@Q} --rdzv_conf is_host=$is_host" </dev/null &
  runs+=($!)
  is_host=0
done

trap 'kill "${runs[@]}" 2>/dev/null' INT TERM
code=0
for run in "${runs[@]}"; do
  wait "$run"
  ended=$?
  if ((ended > code)); then code=$ended; fi
done
exit "$code"
