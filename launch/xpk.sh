#!/usr/bin/env bash
# Submits a command to TPU slices of a cluster that xpk has made.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/xpk.sh [--dry_run] --cluster=CLUSTER --name=NAME --image=IMAGE --tpu_type=TYPE
           [--slices=1] [--restarts=100] [--storage=NAME] [--project=PROJECT] [--zone=ZONE] COMMAND ARGUMENTS...

Submits `flexolmo COMMAND ARGUMENTS...` with `xpk workload create`. `train` runs on all hosts, with --distributed; any
other command on the first alone. It is restarted after exit status 75, and after all that a signal ends (128 and above);
after 1 and 2 it is not. --storage names one that `xpk storage attach` has made known, for /data. The image is that of
launch/docker/tpu.Dockerfile, built with --build-arg=USER=0, since xpk runs it as its user and the devices of a TPU host
belong to root.

  --dry_run  prints the command instead
HELP
  exit 0
fi
dry_run="" cluster="" name="" image="" tpu_type="" slices=1 restarts=100 optional=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=yes ;;
    --cluster=?*) cluster=${1#*=} ;;
    --name=?*) name=${1#*=} ;;
    --image=?*) image=${1#*=} ;;
    --tpu_type=?*) tpu_type=${1#*=} ;;
    --slices=?*) slices=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --storage=?* | --project=?* | --zone=?*) optional+=("$1") ;;
    -*) echo "unknown option $1; see --help" >&2; exit 2 ;;
    *) break ;;
  esac
  shift
done
for option in cluster name image tpu_type; do
  [ -n "${!option}" ] || { echo "give --$option; see --help" >&2; exit 2; }
done
[ $# -gt 0 ] || { echo "give a command, such as train; see --help" >&2; exit 2; }

# exec, since xpk passes SIGTERM on to the shell.
if [ "$1" = train ]; then
  command="exec flexolmo$(printf ' %q' "$@") --distributed"
else
  # shellcheck disable=SC2016 # the shell of the pod expands it
  command='test "${TPU_WORKER_ID:-0}${MEGASCALE_SLICE_ID:-0}" != 00 || exec '"flexolmo$(printf ' %q' "$@")"
fi
submit=(
  xpk workload create --cluster="$cluster" --workload="$name" --docker-image="$image" --tpu-type="$tpu_type"
  --num-slices="$slices" --max-restarts="$restarts" --restart-on-exit-codes=75
  --termination-grace-period-seconds=120 ${optional[@]+"${optional[@]}"} --command="$command"
)
if [ -n "$dry_run" ]; then
  printf '%q ' "${submit[@]}"
  echo
else
  exec "${submit[@]}"
fi
