"""The rehearsal on S3: the gallery is put there, and the job's requests pass through a proxy that counts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faulty_s3 import proxy

from rehearsal import draw


def on_s3(place: str, folder: Path, counts: draw.Counts, run: Callable[..., Any], keys: Callable[..., Any]) -> Any:
    """The job with gallery and store under ``place`` (``s3://BUCKET/PREFIX``); the labelled images stay on disk.

    The server's address is taken from ``AWS_ENDPOINT_URL``, and its keys from the environment.
    """
    import boto3

    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    server = os.environ["AWS_ENDPOINT_URL"]
    client = boto3.client("s3")
    if bucket not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=bucket)
    tars = sorted((folder / "gallery").glob("*.tar"))
    with ThreadPoolExecutor(8) as several:
        list(several.map(lambda tar: client.upload_file(str(tar), bucket, f"{prefix}/gallery/{tar.name}"), tars))
    with proxy(server) as counted:
        os.environ["AWS_ENDPOINT_URL"] = counted.url
        try:
            words = keys(folder / "labels/images.csv", f"{place}/gallery", f"{place}/store", counts)
            job = run("s3", folder, words)
        finally:
            os.environ["AWS_ENDPOINT_URL"] = server
        job.requests = {method: n for (method, _), n in sorted(counted.seen.items())}
        job.requests["megabytes read"] = counted.sent >> 20
    return job
