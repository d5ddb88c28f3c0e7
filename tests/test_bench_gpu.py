"""The script for a borrowed card, as far as a CPU can take it."""

import pytest

from bench import common, gpu_card

pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")


def test_a_kernel_that_is_wrong_is_told(monkeypatch):
    assert gpu_card.error("tnff", "float32", 264)["right"]
    honest = common.total

    def total(what, *rest):
        return honest(what, *rest) * (1.001 if what == gpu_card.KERNEL else 1.0)

    monkeypatch.setattr(common, "total", total)
    assert not gpu_card.error("tnff", "float32", 264)["right"]
