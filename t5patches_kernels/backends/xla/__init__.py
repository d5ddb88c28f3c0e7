"""Streaming XLA: one form for CPUs and TPUs, one for GPUs."""
