"""Targeted negative training for T5: the network, the T5X drop-in and the editing loop."""
