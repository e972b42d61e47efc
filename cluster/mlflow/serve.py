"""Start the MLflow server of this image after its database and its bucket are available.

All settings come from the environment: ``DATABASE_URI`` (``postgresql+psycopg2://user:password@host/name``), ``BUCKET``
(created if it does not exist; artifacts are under ``mlflow/`` in it), and the variables of MLflow and boto3:
``MLFLOW_AUTH_ADMIN_USERNAME``, ``MLFLOW_AUTH_ADMIN_PASSWORD``, ``MLFLOW_FLASK_SERVER_SECRET_KEY``,
``MLFLOW_SERVER_ALLOWED_HOSTS`` (names that clients may use for the server, with ports), ``AWS_*``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import botocore.exceptions
import sqlalchemy

WAIT_S = 180.0


def wait_for(what: str, there: Callable[[], None], errors: tuple[type[Exception], ...]) -> None:
    """Call ``there`` until it raises none of ``errors``; raise the last error when the time is up."""
    deadline, told = time.monotonic() + WAIT_S, False
    while True:
        try:
            return there()
        except errors as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                print(f"waiting for {what}: {type(error).__name__}", flush=True)
            told = True
            time.sleep(1)


def ensure_bucket(name: str) -> None:
    s3 = boto3.client("s3")
    if name not in (bucket["Name"] for bucket in s3.list_buckets()["Buckets"]):
        s3.create_bucket(Bucket=name)


def main() -> None:
    database, bucket = os.environ["DATABASE_URI"], os.environ["BUCKET"]
    engine = sqlalchemy.create_engine(database)
    wait_for("the database", lambda: engine.connect().close(), (sqlalchemy.exc.OperationalError,))
    wait_for(
        "the S3 server",
        lambda: ensure_bucket(bucket),
        (botocore.exceptions.EndpointConnectionError, botocore.exceptions.ClientError),
    )
    # The log-in keeps its users in the same database; MLflow reads these settings from a file only.
    settings = Path(tempfile.mkdtemp()) / "auth.ini"
    settings.touch(mode=0o600)
    escaped = database.replace("%", "%%")
    settings.write_text(f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {escaped}\n")
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(settings)
    # In the environment, so that the list of processes shows no password.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = database
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # evaluation jobs of its UI; 230 MB and seven processes
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    command += ["--host", "0.0.0.0", "--port", "5000", "--artifacts-destination", f"s3://{bucket}/mlflow"]
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
