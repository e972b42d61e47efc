"""The search for the best small model within a budget: Ray Tune and Optuna over recipes (`ktray.jobs.tune.run`)."""
