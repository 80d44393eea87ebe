#!/usr/bin/env bash
# Style, types, import order, terms and tests.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/test.sh [--fast | --all] [--interop] [--storage] [--plan] [PYTEST ARGUMENTS]

Installs what it needs into .venv (once), then checks style (ruff), the order of imports (import-linter) and terms
(launch/check_terms.py), and runs the tests on three processes, except slow ones, and beside them the check of types
(basedpyright), whose errors come last. Other arguments go to pytest: `bash launch/test.sh tests/combine -k order`.

  --fast         no check of types, and only fast tests: under 90 seconds on two cores
  --all          all tests, as CI does on the main branch and before a release
  --interop      also installs torch, transformers, lm-eval and openai; without them the tests that compare with
                 these libraries are skipped
  --storage      also installs clients of gs:// and s3://, and servers for them; without them the tests of these are
                 skipped
  --plan         also installs compilers for TPUs and GPUs; without them the tests that compile for these are skipped
  PYTHON=...     Python 3.11 or 3.12 to make .venv with; without effect once .venv is there
HELP
  exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
selection=(-m "not slow") extras=() types=yes
while [ $# -gt 0 ]; do
  case $1 in
    --fast) selection=(-m "fast and not slow") types="" ;;
    --all) selection=() ;;
    --interop | --storage | --plan) extras+=("${1#--}") ;;
    *) break ;;
  esac
  shift
done
make_environment requirements-test.txt
for extra in ${extras[@]+"${extras[@]}"}; do
  make_environment "requirements-$extra.txt"
  # With libtpu installed, JAX looks for TPUs in every process, which takes half a minute.
  [ "$extra" != plan ] || export JAX_PLATFORMS=cpu
done
cd "$root"
ruff check
ruff format --check
lint-imports
python launch/check_terms.py
types_log=$(mktemp)
trap 'kill %1 2>/dev/null || true; rm -f "$types_log"' EXIT
${types:+basedpyright} >"$types_log" 2>&1 & # beside the tests, on a core that is free now and then
# What a module makes for its tests is made once; the order of modules is that of tests/conftest.py.
# Three processes for two cores: many tests wait.
status=0
python -m pytest -n 3 --dist=loadfile --no-loadscope-reorder ${selection[@]+"${selection[@]}"} "$@" || status=$?
wait %1 || { cat "$types_log"; status=1; }
exit "$status"
