"""Weights of the task losses."""
