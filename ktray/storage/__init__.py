"""The store: directories on disk or S3, leases, retries."""
