"""ktray: knowledge transfer on Ray, from a vision foundation model to a small model for one task."""

__version__ = "0.1.0"
