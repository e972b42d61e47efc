"""TEACH: store what the teacher says about the views of the transfer set."""
