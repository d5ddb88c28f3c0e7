"""Drivers: each brings rows of logits to the specification in its own way."""
