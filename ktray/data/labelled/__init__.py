"""Labelled images: their file formats, splits and masks."""
