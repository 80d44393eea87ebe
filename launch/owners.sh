#!/usr/bin/env bash
# Trains the experts of several owners, each in a run of its own, and merges their contributions.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/owners.sh --anchor=MODEL --out=DIR --owner=NAME=CORPUS [--owner=NAME=CORPUS ...]
           [--config=configs/expert.py:tiny] [--launcher='bash launch/local.sh --processes=1'] [--merge_launcher=...]
           [--timeout=1209600] [--poll=10] [FLAGS OF TRAIN...]

Launches `train` once for each owner, all at the same time, with nothing between them: in DIR/NAME, on CORPUS. When all
have shipped DIR/NAME/contribution, it merges them with the anchor into DIR/model. Launchers are the scripts here; `{}` in
one stands for the owner's name, or for "merge":

  --launcher='bash launch/queued_resource.sh --name=expert-{} --zone=us-west4-a --accelerator_type=v5litepod-16 ...'
  --launcher='sbatch --nodes=2 --job-name={} launch/slurm.sbatch'

A launcher may end before its job does: contributions are waited for up to --timeout seconds. If one owner's launcher
fails, the others finish, and the exit status is that of the first owner that failed. The same command again resumes.
HELP
  exit 0
fi
anchor="" out="" config=configs/expert.py:tiny launcher="" merge_launcher="" timeout=1209600 poll=10
owners=() corpora=() rest=()
for argument in "$@"; do
  case $argument in
    --owner=?*=?*)
      owner=${argument#*=}
      owners+=("${owner%%=*}") corpora+=("${owner#*=}")
      ;;
    --anchor=?* | --out=?* | --config=?* | --launcher=?* | --merge_launcher=?* | --timeout=?* | --poll=?*)
      option=${argument%%=*}
      printf -v "${option#--}" %s "${argument#*=}"
      ;;
    --config.*=*) rest+=("$argument") ;;
    *) echo "unknown option $argument; see --help" >&2; exit 2 ;;
  esac
done
for option in anchor out owner; do
  [ -n "${!option:-}" ] || { echo "give --$option; see --help" >&2; exit 2; }
done
launcher=${launcher:-bash $(dirname "${BASH_SOURCE[0]}")/local.sh --processes=1}
merge_launcher=${merge_launcher:-$launcher}

declare -A running=() # process id: owner
pass_on() {
  trap '' TERM INT
  [ ${#running[@]} = 0 ] || kill -TERM "${!running[@]}" 2>/dev/null || true
  wait || true
  exit 143
}
trap pass_on TERM INT
# launch LAUNCHER NAME COMMAND ... &: the process that is started is the launcher, which gets signals
launch() {
  local words
  read -rd '' -a words <<<"${1//\{\}/$2}" || true # several lines are one command
  exec "${words[@]}" "${@:3}"
}

contributions=()
for i in "${!owners[@]}"; do
  name=${owners[i]}
  contributions+=("--contribution=$out/$name/contribution")
  [ ! -e "$out/$name/contribution" ] || continue
  launch "$launcher" "$name" train --config="$config" --workdir="$out/$name" --config.start_from="$anchor" \
    --config.expert="$name" --config.data.train="${corpora[i]}" ${rest[@]+"${rest[@]}"} &
  running[$!]=$name
done
status=0
for pid in "${!running[@]}"; do
  code=0
  wait "$pid" || code=$?
  if [ "$code" != 0 ]; then
    echo "owners.sh: the launcher of ${running[$pid]} ended with exit status $code" >&2
    [ "$status" != 0 ] || status=$code
  fi
  unset "running[$pid]"
done
[ "$status" = 0 ] || exit "$status"

for name in "${owners[@]}"; do
  until [ -e "$out/$name/contribution" ]; do # it is complete or absent
    if [ "$SECONDS" -ge "$timeout" ]; then
      echo "owners.sh: $out/$name/contribution is not there after $timeout seconds; see the log of $name" >&2
      exit 75
    fi
    sleep "$poll" & wait $!
  done
done
launch "$merge_launcher" merge merge --anchor="$anchor" "${contributions[@]}" --out="$out/model" &
running[$!]=merge
wait $!
