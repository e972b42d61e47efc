"""Labelled images: the forms in which people keep them, splits, masks."""
