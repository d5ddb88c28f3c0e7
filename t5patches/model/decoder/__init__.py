"""Decoder-only networks: one network, its families, and their folders."""
