"""The Python interface: each job of the command line as a function, whose result is an object.

`ktray.distill`, `ktray.compare`, ... are the functions of `calls`; the objects are in `results`. A call has the same
keys as the command line, finds the same stages in the store, and gives the same result.
"""
