#!/usr/bin/env bash
# Stop the cluster of this folder: cluster/local/down.sh [--volumes]
#
# Store, artifacts and runs stay in two volumes for the next up.sh; --volumes deletes the volumes and the secrets.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/tool.sh"
compose down "$@"
if [[ ${1:-} == --volumes ]]; then rm -f "$here/.env"; fi
