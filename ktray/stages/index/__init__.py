"""INDEX: embed the gallery."""
