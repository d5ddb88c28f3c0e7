"""The fused kernel for Hopper GPUs and newer ones."""
