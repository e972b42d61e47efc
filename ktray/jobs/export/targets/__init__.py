"""What a student can be exported to, one file for each; ``base`` says what such a target is."""
