"""ADAPT: adapt the teacher to the task."""
