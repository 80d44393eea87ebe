#!/usr/bin/env bash
# Whether runs end with the same bytes when their processes are killed at random moments.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/chaos.sh [--kills=20] [--processes=2] [--seed=0] [OUT]

Trains an anchor and an expert in several processes, merges them, and kills processes at random moments, while
checkpoints, outputs and merges are written too. Each killed command is started again. Prints a table; the exit status
is 1 if a result is not that of an undisturbed run, byte for byte, or a process does not end within a minute after
another was killed. About ten minutes on two idle CPU cores.

  OUT          a new folder; by default runs/chaos
HELP
  exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment requirements.txt
export JAX_PLATFORMS=cpu
exec python "$root/launch/chaos.py" "$@"
