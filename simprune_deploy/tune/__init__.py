"""Choosing the threshold: data sets, sweeps, the search. Nothing heavy is imported here."""
