"""Targeted negative training of language models: networks, editing loop, T5X drop-in."""
