"""The script for a borrowed card, as far as a CPU can take it."""

import pytest

from bench import card, common

pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")


def test_a_kernel_that_is_wrong_is_told(monkeypatch):
    assert card.error("tnff", "float32", 8, 264)["right"]
    honest = common.total

    def total(what, *rest):
        return honest(what, *rest) * (1.001 if what == card.KERNEL else 1.0)

    monkeypatch.setattr(common, "total", total)
    assert not card.error("tnff", "float32", 8, 264)["right"]
