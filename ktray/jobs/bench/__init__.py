"""Benchmarks: what ktray reaches, as a ratio to a limit that is measured in the same run on the same cores.

A figure in images a second says little of another machine; the share of what the bare decoder or the bare encoder does
there says how much ktray itself costs.
"""
