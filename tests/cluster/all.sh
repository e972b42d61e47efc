#!/usr/bin/env bash
# Every check of tests/cluster/ that CI has no time or tools for, one after the other: tests/cluster/all.sh [NAME ...]
#
# An hour or more on two cores with nothing else running. Names are those of the scripts; without any all run, but
# containers.py only where docker or podman-compose is installed (images as cluster/local/up.sh takes them). Output goes
# to tests/cluster/logs/; a line for each says how it ended.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$here/../../.venv/bin/python
mkdir -p "$here/logs"
failed=0
check() { # NAME [ARGUMENTS]
  local log=$here/logs/$(tr ' ' '-' <<<"$*").log began=$SECONDS how=passed
  "$python" "$here/$1.py" "${@:2}" >"$log" 2>&1 || { how="FAILED (exit $?), see $log" && failed=1; }
  echo "$*: $how, $((SECONDS - began)) s"
}
wanted() { [[ ${#names[@]} -eq 0 || " ${names[*]} " == *" $1 "* ]]; }
names=("$@")
for name in auth bill autoscale s3_faults; do
  if wanted "$name"; then check "$name"; fi
done
# Another seed each time; the line that is printed holds it.
if wanted random_kills; then check random_kills 10 "$(date +%s)"; fi
if wanted predict_kills; then check predict_kills; fi
if wanted elastic; then
  check elastic
  check elastic --notice
fi
if wanted containers; then
  if docker compose version >/dev/null 2>&1 || command -v podman-compose >/dev/null; then
    check containers
  else
    echo "containers: not run, neither 'docker compose' nor podman-compose is installed"
  fi
fi
exit "$failed"
