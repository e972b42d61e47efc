"""ADAPT: teach the task to the teacher."""
