"""The store: directories on a disk or on S3, leases, and retries."""
