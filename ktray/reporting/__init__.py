"""Reports, plots, units, progress lines."""
