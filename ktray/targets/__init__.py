"""What the student is to match: replayable views, and the teacher's outputs on each of them."""
