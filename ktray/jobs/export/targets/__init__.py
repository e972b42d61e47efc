"""The export targets of a student, one module for each; ``base`` defines what a target is."""
