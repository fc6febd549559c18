"""Data sets, classes, accuracy, statistics, timing."""
