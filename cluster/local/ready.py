"""Wait until the cluster is complete; runs in the head's container: ``python - WORKERS < ready.py``."""

from __future__ import annotations

import sys
import time
import urllib.request

import boto3
import ray

WAIT_S = 240.0


def missing(workers: int) -> str:
    """The part that is not ready yet; "" if the cluster is complete."""
    try:
        if not ray.is_initialized():
            ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
        there = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
        if there < workers:
            return f"{workers - there} of {workers} workers"
        urllib.request.urlopen("http://mlflow:5000/health", timeout=5).close()
        boto3.client("s3").head_bucket(Bucket="ktray")
    except Exception as error:  # a service that is starting may answer in any way
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def main() -> None:
    deadline, told = time.monotonic() + WAIT_S, ""
    while said := missing(int(sys.argv[1])):
        if time.monotonic() > deadline:
            sys.exit(f"the cluster is not complete after {WAIT_S:.0f} s; missing: {said}")
        if said != told:
            print(f"waiting for {said}", flush=True)
        told = said
        time.sleep(2)


if __name__ == "__main__":
    main()
