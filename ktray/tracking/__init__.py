"""Log the parameters, metrics and files of runs to MLflow and other trackers."""
