#!/usr/bin/env bash
# Tokens per second of generation, next to those of transformers.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/benchmark_generation.sh [--batch 1 8] [--d_model N] [--layers N] [--new N] ... [--json FILE]

Makes a random FlexOlmo, brings it over with `flexolmo import-hf`, and times `Model.generate` and transformers'
`generate` on it in turns, in one process; both must write the same tokens. By default: d_model 512, 8 layers,
4 experts, top-2, vocabulary 50,304, prompts of 64 tokens, 64 new ones; some minutes. Installs torch and
transformers (requirements-interop.txt) into .venv on the first run.
HELP
  exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment requirements-interop.txt
exec python "$root/benchmarks/generation.py" "$@"
