#!/usr/bin/env bash
# The whole journey on one machine, on text found there: anchor, three experts, merge, opt-out, report.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/quickstart.sh [OUT] [--size=small]

Installs what it needs into .venv (once), then trains an anchor and three experts on text found on this
machine, merges them, evaluates, opts one owner out, and writes OUT/results.json and OUT/report.html.
OUT is runs/quickstart unless given, relative to the folder you call this from. Two CPU cores take about six
minutes, once packages are installed.

  --size=small   only shows that every step runs, in about a minute; the results mean nothing
  PYTHON=...     Python 3.11 or 3.12 to make .venv with; without effect once .venv is there
HELP
  exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment requirements.txt
exec python "$root/examples/quickstart.py" "$@"
