#!/usr/bin/env bash
# Submit a command to the cluster of this folder and follow its output: cluster/local/job.sh python jobs/distill.py ...
#
# The job runs the code of the image. Ctrl-C leaves the job running. Without arguments, the script lists the jobs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/tool.sh"
if (($# == 0)); then in_head ray job list; else in_head ray job submit -- "$@"; fi
