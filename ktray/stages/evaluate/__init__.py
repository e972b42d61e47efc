"""EVALUATE: score the models on the test split."""
