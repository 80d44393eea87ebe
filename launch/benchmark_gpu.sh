#!/usr/bin/env bash
# Training steps of large models on one GPU: what they cost, and whether they fit.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/benchmark_gpu.sh [--dry-run] [--python=INTERPRETER] [OUT]

For a machine with one NVIDIA GPU of 141 GB (an H200); some five minutes. Tests its kernels, measures them, and takes
tiny steps of pairs; then measures the step of the published 7b pair and the joint step of four experts of 1b, both
with sequences of 4096 tokens, in bfloat16.
Writes OUT/*.json; OUT is runs/benchmark_gpu unless given, relative to the folder you call this from. Makes .venv
(once) with the pinned packages and jax[cuda13].

  --dry-run              prints the commands instead
  --python=INTERPRETER   one that has jax for this GPU, and what requirements-test.txt lists, to be used as it is
HELP
  exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
dry_run="" python="" out=runs/benchmark_gpu
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=yes ;;
    --python=*) python=${argument#*=} ;;
    -*) echo "unknown option $argument; see --help" >&2; exit 2 ;;
    *) out=$argument ;;
  esac
done

if [ -z "$python" ]; then
  python=python
  if [ -z "$dry_run" ]; then
    make_environment requirements-test.txt
    pip install --quiet --disable-pip-version-check --constraint "$root/requirements.txt" --editable "${root}[cuda]"
  fi
fi
# JAX takes three quarters of the GPU's memory by default; with less memory XLA rematerializes more.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}

run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

benchmark() {
  local name=$1
  shift
  run "$python" -m flexolmo_jax benchmark "$@" --json="$out/$name.json"
}

[[ $out = /* ]] || out=$PWD/$out
cd "$root"
run env JAX_PLATFORMS=cuda,cpu "$python" -m pytest \
  tests/model/kernels/test_accelerator_attention.py tests/model/kernels/test_grouped_matmul.py
run "$python" benchmarks/kernels.py
benchmark pair_tiny --config=configs/pair.py:tiny --step=pair
benchmark pair_7b --config=configs/pair.py:7b --step=pair --config.data.batch_size=2
benchmark joint_1b --config=configs/joint.py:1b --step=joint --config.data.batch_size=8 \
  --config.moe.num_experts=4 --config.moe.top_k=2
