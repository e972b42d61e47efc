"""Teachers: how they are loaded and adapted."""
