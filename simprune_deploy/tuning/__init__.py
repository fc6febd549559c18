"""Sweeps over settings, and the search for one that meets a target."""
