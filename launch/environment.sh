# Sourced by the launch scripts: makes `.venv` with the pinned requirements and this package, once.
#
# PYTHON names the interpreter to make it with (3.11 or 3.12); otherwise the first fit one on the PATH is taken.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or 3.12 found${PYTHON:+ as PYTHON=$PYTHON}; install one, or name it: PYTHON=/path/to/python3.12" >&2
  return 2
}

# make_environment FILE: installs the pins of a requirements file, unless they are installed already.
make_environment() {
  local pins=$1 stamp=$venv/$1.installed wanted
  wanted=$(cat "$root"/requirements*.txt "$root/setup.cfg" "$root/pyproject.toml" | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    if [ ! -x "$venv/bin/python" ]; then
      local python
      python=$(find_python)
      if ! "$python" -m venv "$venv" >&2; then
        rm -rf "$venv"
        echo "could not make .venv: install what 'python -m venv' needs (on Debian and Ubuntu: apt install python3-venv)" >&2
        return 2
      fi
    fi
    echo "installing $pins into .venv ..." >&2
    # torch by itself first, so that a build for this machine that is at hand is taken.
    local torch
    if torch=$(grep '^torch==' "$root/$pins"); then
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch"
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/$pins"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable "$root"
    echo "$wanted" >"$stamp"
  fi
  export PATH=$venv/bin:$PATH
}
