"""Reports, plots, units, log lines and progress lines."""
