"""Benchmarks: the rates of ktray, as ratios to limits that are measured in the same run on the same cores.

A rate in images a second says little about another machine. The ratio to the rate of the bare decoder or the bare
encoder shows how much ktray itself costs.
"""
