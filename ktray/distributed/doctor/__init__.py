"""Checks of a cluster before money is spent on it. Each check prints one line, with cause and remedy."""
