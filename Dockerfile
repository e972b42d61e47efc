# One image for the head, the CPU workers and the GPU workers of a cluster, and for a single machine.
#
#   docker build -t ktray .                                              CUDA, for machines with and without GPU
#   docker build --build-arg BASE_IMAGE=python:3.12-slim -t ktray .      another base; or debian:bookworm, debian:trixie
#   docker build --secret id=ca,src=ca.crt --secret id=pipconf,src=pip.conf -t ktray .            behind a mirror
#
# podman takes the same arguments (add --format docker, otherwise it drops the health check). Docker before version 23
# needs DOCKER_BUILDKIT=1. The file uses no heredocs and no syntax line: some builders refuse the first, or cannot fetch
# the second.
#
# The locked torch includes its own CUDA libraries (about 7 GB), on a base without a GPU too: torch without CUDA is a
# different file from a different registry, so it would need a second lock file that names this registry. Because torch
# includes the libraries, the smallest CUDA base is enough for GPUs ("base", not "runtime" with a second copy of them).
ARG BASE_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04

# ---------------------------------------------------------------- the base of both other stages
FROM ${BASE_IMAGE} AS base

# The base's own Python is used if it is 3.10 or newer and complete. rsync and ssh are for `ray up`: it copies files
# into the container by rsync, and the head starts the workers by ssh. wget is for KubeRay's probes and for HEALTHCHECK.
# EXTRA_PACKAGES adds Debian packages; .devcontainer/ uses it for git.
ARG EXTRA_PACKAGES=
RUN apt-get update \
 && python=$(python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2> /dev/null \
             || echo python3 python3-venv) \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        bash ca-certificates openssh-client rsync wget ${python} ${EXTRA_PACKAGES} \
 && rm -rf /var/lib/apt/lists/*

# The uid is fixed, so that volumes and Kubernetes can name it; Ubuntu's images give 1000 to their own user. The token's
# folder exists in advance, because Docker would create it for root when it mounts the file. The line in profile.d is
# for login shells, which `ray up` uses and which reset PATH.
RUN if getent passwd 1000 > /dev/null; then userdel --remove "$(getent passwd 1000 | cut -d: -f1)" 2> /dev/null; fi; \
    groupadd --gid 1000 ktray \
 && useradd --create-home --uid 1000 --gid 1000 --shell /bin/bash ktray \
 && install --directory --owner=1000 --group=1000 --mode=0700 /home/ktray/.ray \
 && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/ktray.sh

# ---------------------------------------------------------------- the packages, at the locked versions and hashes
FROM base AS builder

RUN python3 -m venv /opt/venv
COPY requirements/constraints.txt requirements/constraints-gcp.txt /tmp/requirements/
# The options are those of ktray/bootstrap.py. Both secrets are optional, and neither stays in the image: "ca" is a CA
# file to trust in addition to pip's own setting, "pipconf" is a pip.conf with the address of a mirror.
RUN --mount=type=secret,id=ca,target=/run/secrets/ca --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
 && /opt/venv/bin/pip install --no-input --no-cache-dir --progress-bar off --disable-pip-version-check \
        --require-hashes --only-binary :all: \
        -r /tmp/requirements/constraints.txt -r /tmp/requirements/constraints-gcp.txt

# ---------------------------------------------------------------- the image
FROM base

COPY --from=builder /opt/venv /opt/venv
WORKDIR /opt/ktray
# The code comes last: after a change of the code, machines fetch only a layer of a few MB.
COPY pyproject.toml README.md LICENSE ./
COPY jobs jobs
COPY ktray ktray
# The folder ktray-store is where a job without store= writes; mount a volume there to keep it.
RUN /opt/venv/bin/pip install --no-input --no-cache-dir --disable-pip-version-check \
        --no-deps --no-build-isolation --no-index -e . \
 && /opt/venv/bin/python -c 'import sys; from ktray.bootstrap import check_torchvision; sys.exit(check_torchvision())' \
 && chmod -R a+rX . \
 && install --directory --owner=1000 --group=1000 ktray-store

# HOME is set, because `ray up` reads it from the image's settings and otherwise uses /root. Token authentication is on
# unless a command turns it off: `ray start` without a token then ends with an error instead of an open cluster. The two
# NVIDIA settings let the container toolkit pass GPUs on a base that is not from NVIDIA.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/ktray \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 1000:1000

# This check works for head and workers: on every node, the agent reports without a token whether its raylet is alive.
# (`ray health-check` asks only whether the head answers, and importing Ray takes several seconds of CPU each time.) A
# container that runs one job without `ray start` has no agent and shows as unhealthy, which has no effect outside of a
# cluster.
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m --retries=4 \
    CMD wget -q -t 1 -T 5 -O- http://localhost:52365/api/local_raylet_healthz | grep -q success

# No entry point: `ray up` and KubeRay start the container with their own commands.
CMD ["python", "jobs/distill.py", "--help"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="ktray" \
      org.opencontainers.image.description="Knowledge transfer from vision foundation models to small models, on Ray" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"
