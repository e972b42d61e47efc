"""Teacher families: one file for each library or place that teachers come from."""
