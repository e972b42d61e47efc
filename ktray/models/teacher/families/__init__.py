"""Teacher families: one file for each library from which teachers are loaded."""
