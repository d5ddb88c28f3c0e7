"""Gin files for T5X configs; the functions that they name are those of `t5patches.t5x.configs`."""

from t5patches.t5x.configs import make_model, make_trainer

__all__ = ["make_model", "make_trainer"]
