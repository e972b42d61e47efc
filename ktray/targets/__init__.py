"""The targets of the student: reproducible views, and the outputs of the teacher for each view."""
