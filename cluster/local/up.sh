#!/usr/bin/env bash
# Start the cluster of this folder: cluster/local/up.sh [--build]
#
# The first call creates the secrets (.env, readable by you only) and builds the missing images (the largest contains
# CUDA's libraries: several GB and minutes); --build builds all of them again, from the first change on. It needs docker
# compose, or podman and podman-compose. Settings, as environment variables: WORKERS (2), WORKER_CPUS (of each worker;
# by default an equal part of this machine: workers that claim more CPUs than exist slow each other down several times),
# DASHBOARD_PORT, MLFLOW_PORT, S3_PORT, BASE_IMAGE (of what is built here), and the images themselves: KTRAY_IMAGE,
# MLFLOW_IMAGE, S3_IMAGE, POSTGRES_IMAGE.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/tool.sh"

if [[ ! -e $here/.env ]]; then
  random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
  (
    umask 077
    for name in RAY_AUTH_TOKEN MLFLOW_PASSWORD MLFLOW_SECRET_KEY POSTGRES_PASSWORD S3_SECRET; do
      echo "$name=$(random)"
    done >"$here/.env"
  )
fi

build=${1:-}
base=${BASE_IMAGE:-debian:bookworm-slim}
make_image() { # NAME FOLDER [ARGUMENTS]
  if [[ $build != --build ]] && $tool image inspect "$1" >/dev/null 2>&1; then return; fi
  echo "building $1"
  BUILDAH_FORMAT=docker DOCKER_BUILDKIT=1 $tool build --tag "$1" "${@:3}" "$2"
}
make_image "${KTRAY_IMAGE:-localhost/ktray}" "$here/../.." --build-arg "BASE_IMAGE=$base"
make_image "${MLFLOW_IMAGE:-localhost/ktray-mlflow}" "$here/../mlflow" --build-arg "KTRAY_IMAGE=${KTRAY_IMAGE:-localhost/ktray}"
make_image "${S3_IMAGE:-localhost/ktray-s3}" "$here/s3" --build-arg "BASE_IMAGE=$base"

cpus=$(($(getconf _NPROCESSORS_ONLN) / ${WORKERS:-2}))
export WORKER_CPUS=${WORKER_CPUS:-$((cpus > 0 ? cpus : 1))}
compose up --detach
in_head python - "${WORKERS:-2}" <"$here/ready.py"
cat <<SAID
dashboard  http://127.0.0.1:${DASHBOARD_PORT:-8265} (asks for RAY_AUTH_TOKEN of cluster/local/.env)
MLflow     http://127.0.0.1:${MLFLOW_PORT:-5000} (user ktray, MLFLOW_PASSWORD of cluster/local/.env)
a job      cluster/local/job.sh python jobs/distill.py store=s3://ktray/store cluster.workers=2
SAID
