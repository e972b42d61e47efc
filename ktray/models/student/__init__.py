"""Students: how they are built, saved and loaded."""
