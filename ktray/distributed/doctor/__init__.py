"""What can be wrong with a cluster, found out before money is spent: one line a check, with cause and remedy."""
