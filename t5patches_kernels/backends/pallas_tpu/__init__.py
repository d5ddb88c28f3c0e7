"""The fused kernel for TPUs: `kernel` reads from top to bottom like the algorithm."""
