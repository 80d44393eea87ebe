#!/usr/bin/env bash
# Runs a command on a TPU slice of spot machines, which is created again whenever it is preempted.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/queued_resource.sh [--dry_run] --name=NAME --zone=ZONE --accelerator_type=TYPE --image=IMAGE
           [--runtime_version=VERSION] [--nfs=HOST:/SHARE] [--project=PROJECT] [--restarts=100] [--poll=30]
           COMMAND ARGUMENTS...

Requests the slice as a queued resource, waits for it, and runs `flexolmo COMMAND ARGUMENTS...` in the container image of
launch/docker/tpu.Dockerfile: `train` on all workers, with --distributed; any other command on the first. An NFS share is
mounted as /data. When the slice is preempted, it is deleted and requested again, and the command resumes. The slice is
deleted at the end: after exit status 0 or 2, after SIGTERM, which is passed on to the workers, and after so many
restarts. The exit status is that of the command.

  --dry_run  prints the commands of gcloud instead
  --poll     seconds between two looks at the state of the request
HELP
  exit 0
fi
dry_run="" name="" zone="" accelerator_type="" image="" runtime_version=v2-alpha-tpuv5-lite nfs="" project=""
restarts=100 poll=30
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=yes ;;
    --name=?* | --zone=?* | --accelerator_type=?* | --image=?* | --runtime_version=?* | --nfs=?* | --project=?* | \
      --restarts=?* | --poll=?*)
      option=${1%%=*}
      printf -v "${option#--}" %s "${1#*=}"
      ;;
    -*) echo "unknown option $1; see --help" >&2; exit 2 ;;
    *) break ;;
  esac
  shift
done
for option in name zone accelerator_type image; do
  [ -n "${!option}" ] || { echo "give --$option; see --help" >&2; exit 2; }
done
[ $# -gt 0 ] || { echo "give a command, such as train; see --help" >&2; exit 2; }

worker=0
if [ "$1" = train ]; then
  worker=all
  set -- "$@" --distributed
fi
place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")
# What a lost connection left running has the workdir's lock.
remote="sudo docker rm --force flexolmo >/dev/null 2>&1"
if [[ ${image%%/*} = *.pkg.dev ]]; then
  remote+="; sudo gcloud auth configure-docker ${image%%/*} --quiet"
fi
if [ -n "$nfs" ]; then
  remote+="; sudo apt-get install --yes --quiet nfs-common >/dev/null; sudo mkdir -p /data"
  remote+="; mountpoint --quiet /data || sudo mount -t nfs $nfs /data || exit"
fi
# The devices of a TPU host belong to root.
remote+="; sudo docker run --rm --name=flexolmo --privileged --net=host --user=root --volume=/data:/data $image"
remote+=$(printf ' %q' "$@")

gcloud_() {
  if [ -n "$dry_run" ]; then
    printf '%q ' gcloud "$@"
    echo
  else
    gcloud "$@"
  fi
}
create() {
  gcloud_ compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" --spot \
    --accelerator-type="$accelerator_type" --runtime-version="$runtime_version"
}
state() { gcloud_ compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'; }
delete() { gcloud_ compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }
# on_workers WORKER COMMAND
on_workers() { gcloud_ compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"; }

if [ -n "$dry_run" ]; then
  create && state && on_workers "$worker" "$remote" && delete
  exit
fi

stopping="" running=""
# shellcheck disable=SC2329 # the trap calls it
stop() {
  stopping=yes
  [ -z "$running" ] || on_workers "$worker" "sudo docker kill --signal=TERM flexolmo" || true
}
trap stop TERM INT

wait_until_active() {
  local now
  while [ -z "$stopping" ]; do
    now=$(state 2>/dev/null) || now=""
    case $now in
      ACTIVE) return ;;
      "") create ;;
      FAILED | SUSPENDING | SUSPENDED) delete ;;
      *) sleep "$poll" & wait $! || true ;;
    esac
  done
}

for ((restart = 0; restart <= restarts; restart++)); do
  wait_until_active
  [ -z "$stopping" ] || { status=143; break; }
  on_workers "$worker" "$remote" &
  running=$! status=0
  wait $running || status=$?
  while kill -0 $running 2>/dev/null; do # a signal came first, and was passed on
    status=0
    wait $running || status=$?
  done
  running=""
  case $status in 0 | 2) break ;; esac
  [ -z "$stopping" ] || break
  echo "queued_resource.sh: exit status $status, restart $((restart + 1))" >&2
done
delete
exit "$status"
