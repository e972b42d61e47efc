"""SUGGEST: which unlabelled images people should label next."""
