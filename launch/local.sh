#!/usr/bin/env bash
# Runs a command on this machine, and training in several processes that work as one.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
usage: bash launch/local.sh [--processes=N] [--grace=SECONDS] COMMAND ARGUMENTS...

Runs `flexolmo COMMAND ARGUMENTS...`. `train` takes N processes (2), which find each other on a free port of loopback;
any other command takes one. Lines of their logs begin with the number of the process. Standard output is that of
process 0. If a process fails, the others get SIGTERM, and SIGKILL after the grace period (30). SIGTERM and Ctrl-C are
passed on to all as SIGTERM. The exit status is that of the first process that failed.

  bash launch/local.sh --processes=2 train --config=configs/anchor.py:tiny --workdir=runs/anchor \
      --config.data.train=corpora/public
HELP
  exit 0
fi
processes=2 grace=30
while [ $# -gt 0 ]; do
  case $1 in
    --processes=?*) processes=${1#*=} ;;
    --grace=?*) grace=${1#*=} ;;
    -*) echo "unknown option $1; see --help" >&2; exit 2 ;;
    *) break ;;
  esac
  shift
done
if ! [[ $processes =~ ^[1-9][0-9]*$ && $grace =~ ^[0-9]+$ ]]; then
  echo "--processes=$processes --grace=$grace: give whole numbers, of processes at least 1" >&2
  exit 2
fi
[ $# -gt 0 ] || { echo "give a command, such as train; see --help" >&2; exit 2; }
command -v flexolmo >/dev/null || PATH=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH
if [ "$1" != train ] || [ "$processes" = 1 ]; then
  exec flexolmo "$@"
fi

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
declare -A running # process id: number
logs=() stopping=""
pass_on() { [ ${#running[@]} = 0 ] || kill -TERM "${!running[@]}" 2>/dev/null || true; }
trap 'stopping=yes; pass_on' TERM INT
exec 3>&1
for ((number = 0; number < processes; number++)); do
  exec {log}> >(trap '' TERM INT && exec sed --unbuffered "s/^/[$number] /" >&2)
  logs+=($!)
  [ "$number" = 0 ] || exec 3>&"$log"
  flexolmo "$@" --coordinator="localhost:$port" --num_processes="$processes" --process_id="$number" \
    >&3 2>&"$log" 3>&- {log}>&- &
  running[$!]=$number
  exec {log}>&- 3>&-
done
[ -z "$stopping" ] || pass_on # to those that started after the signal

status=0 deadline=""
while [ ${#running[@]} -gt 0 ]; do
  for pid in "${!running[@]}"; do
    ! kill -0 "$pid" 2>/dev/null || continue
    code=0
    wait "$pid" || code=$?
    if [ "$code" != 0 ] && [ "$status" = 0 ]; then
      status=$code deadline=$((SECONDS + grace))
      echo "local.sh: process ${running[$pid]} of $processes ended first, with exit status $code" >&2
      pass_on
    fi
    unset "running[$pid]"
  done
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    [ ${#running[@]} = 0 ] || kill -KILL "${!running[@]}" 2>/dev/null || true
    deadline=""
  fi
  sleep 0.1
done
wait "${logs[@]}" || true
exit "$status"
