"""Metrics and artefacts of a run, and MLflow."""
