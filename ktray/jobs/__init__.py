"""One folder for each script in ``jobs/`` at the top level of the repository."""
