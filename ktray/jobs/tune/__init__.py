"""The best small model that a budget buys: Ray Tune and Optuna over the pipeline's recipes (`ktray.jobs.tune.run`)."""
