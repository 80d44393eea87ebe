#!/usr/bin/env bash
# Finds terms that this project does not use.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/check_terms.sh [FILE OR FOLDER ...]

Prints FILE:LINE for each term that launch/terms.toml replaces, with the standard one, and ends with status 1 if there
is any. Reads all files that git lists, or those named. The tables of terms for people are in CONTRIBUTING.md.
HELP
  exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment requirements-test.txt
exec python "$root/launch/check_terms.py" "$@"
