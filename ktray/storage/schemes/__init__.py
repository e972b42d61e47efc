"""File systems by the scheme of an address, one per file: ``hf://``, ``gs://``, ``az://``. ``s3://`` is in
`ktray.storage.s3`, with its own retries."""
