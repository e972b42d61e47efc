"""What a run is told: the recipe's schema, its sections, and how it is loaded."""
