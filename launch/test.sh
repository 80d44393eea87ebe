#!/usr/bin/env bash
# Style, import order and tests.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/test.sh [--interop] [--plan] [PYTEST ARGUMENTS]

Installs what it needs into .venv (once), then checks style (ruff) and the order of imports (import-linter),
and runs the tests on two processes. Arguments go to pytest: `bash launch/test.sh tests/combine -k order`.

  --interop      also installs torch, transformers, lm-eval and openai; without them the tests that compare with
                 these libraries are skipped
  --plan         also installs compilers for TPUs and GPUs; without them the tests that compile for these are skipped
  PYTHON=...     Python 3.11 or 3.12 to make .venv with; without effect once .venv is there
HELP
  exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment requirements-test.txt
while [ "${1:-}" = --interop ] || [ "${1:-}" = --plan ]; do
  make_environment "requirements-${1#--}.txt"
  # With libtpu, JAX would look for TPUs in every process, for half a minute.
  [ "$1" = --interop ] || export JAX_PLATFORMS=cpu
  shift
done
cd "$root"
ruff check
ruff format --check
lint-imports
exec python -m pytest -n 2 "$@"
