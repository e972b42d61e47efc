"""One folder for each script in ``jobs/`` at the top of the repository."""
