"""CURATE: choose the transfer set."""
