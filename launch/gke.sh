#!/usr/bin/env bash
# Submits a command to a GKE cluster with JobSet.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/gke.sh [--dry_run] --kind=tpu|gpu --name=NAME --image=IMAGE --claim=CLAIM --accelerator=ACCELERATOR
           [--topology=TOPOLOGY] [--hosts=1] [--chips=4] [--slices=1] [--restarts=100] COMMAND ARGUMENTS...

Fills in launch/gke/tpu.yaml or launch/gke/gpu.yaml for `train`, and launch/gke/cpu.yaml for any other command, which is
one process without an accelerator; then `kubectl apply`. The claim is of a volume that all nodes can write, mounted as
/data. Hosts are those of a slice, or GPU nodes; chips are those of a host.

  --dry_run  prints the JobSet instead

  bash launch/gke.sh --kind=tpu --name=news --image=REGISTRY/flexolmo-tpu --claim=shared \
      --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 train --config=configs/expert.py:7b ...
  kubectl get jobset news; kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=news
HELP
  exit 0
fi
dry_run="" kind="" name="" image="" claim="" accelerator="" topology="" hosts=1 chips=4 slices=1 restarts=100
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=yes ;;
    --kind=tpu | --kind=gpu | --name=?* | --image=?* | --claim=?* | --accelerator=?* | --topology=?* | --hosts=?* | \
      --chips=?* | --slices=?* | --restarts=?*)
      option=${1%%=*}
      printf -v "${option#--}" %s "${1#*=}"
      ;;
    -*) echo "unknown option $1; see --help" >&2; exit 2 ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || { echo "give a command, such as train; see --help" >&2; exit 2; }
needed=(name image claim)
if [ "$1" = train ]; then
  needed+=(kind accelerator)
  [ "$kind" != tpu ] || needed+=(topology)
  shift
else
  kind=cpu
fi
for option in "${needed[@]}"; do
  [ -n "${!option}" ] || { echo "give --$option; see --help" >&2; exit 2; }
done

export NAME=$name IMAGE=$image CLAIM=$claim ACCELERATOR=$accelerator TOPOLOGY=$topology
export HOSTS=$hosts CHIPS=$chips SLICES=$slices RESTARTS=$restarts
ARGUMENTS=$(printf '%q ' "$@")
export ARGUMENTS=${ARGUMENTS% }
template=$(dirname "${BASH_SOURCE[0]}")/gke/$kind.yaml
if [ -n "$dry_run" ]; then
  envsubst <"$template"
else
  envsubst <"$template" | kubectl apply -f -
fi
