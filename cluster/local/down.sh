#!/usr/bin/env bash
# Stop the cluster of this folder: cluster/local/down.sh [--volumes]
#
# Store, artifacts and runs stay in two volumes and the next up.sh finds them; --volumes deletes them and the secrets.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/tool.sh"
compose down "$@"
if [[ ${1:-} == --volumes ]]; then rm -f "$here/.env"; fi
