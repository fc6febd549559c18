"""Engines: the GPUs they are for, and what builds and runs them. Nothing heavy is imported here."""

ENGINES, ENGINE_SUFFIX = "engines", ".engine"
"""The folder of an exported folder that holds its engines, and how their names end."""
