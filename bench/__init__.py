"""Benchmarks: every number in this repository comes from a command here that prints it."""
