"""EVALUATE: score the models on validation and test."""
