#!/usr/bin/env bash
# Wall time and memory of merging and opting out, next to copying and reading the same bytes.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/benchmark_merge.sh [--experts 4 16] [--d_model N] [--layers N] [--d_ff N] [--runs N] ... [--json FILE]

Makes an anchor and contributions with random weights in a temporary directory (--directory DIR: within DIR), and
times `flexolmo merge`, `flexolmo opt-out`, `cp -r` of the same bytes and reading them, in turns. By default: 4
experts, d_model 1024, 16 layers, 2752 hidden units, 5 runs; some minutes and 5 GB of disk. 16 experts take 18 GB of
disk and half an hour. Linux only.
HELP
  exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment requirements.txt
exec python "$root/benchmarks/merge.py" "$@"
