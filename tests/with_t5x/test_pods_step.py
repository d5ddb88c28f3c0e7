"""The figures of `bench.pods` on a step that is compiled whole, for eight CPU devices."""

import jax
import pytest

pytest.importorskip("t5x", reason="needs T5X: make test-t5x")

import t5x_stack

from bench import pods, t5x_step
from bench.collectives import moved

SIZES = {
    "vocab_size": 512, "emb_dim": 48, "num_heads": 4, "head_dim": 8, "mlp_dim": 64,
    "num_encoder_layers": 1, "num_decoder_layers": 1, "mlp_activations": ("gelu", "linear"),
    "dropout_rate": 0.0,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # T5X's own
@pytest.mark.parametrize(
    ("variant", "most", "numbers"),
    [
        # Its accuracy gathers the largest logit of each of 4 parts, and where it is.
        pytest.param("upstream", 4, 28, marks=t5x_stack.needs_upstream),
        ("ours", 1, 10),
        ("ours, fused head", 1, 10),
    ],
)
def test_what_the_loss_moves_in_a_whole_step(variant, most, numbers):
    parts, batch = t5x_stack.partitioner(model_axis=4), pods.batch_of(4)
    # T5X's network and T5Patches' losses promote.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step = t5x_step.prepare(variant, pods.OBJECTIVE, SIZES, batch, "float32", "xla", parts)
        found = moved(pods.compiled(step, batch).as_text())
    moves = pods.numbers_a_token(found, (2, pods.TARGETS), SIZES["emb_dim"])
    assert max(map(max, moves)) == most
    assert 0 < sum(map(sum, moves)) <= numbers
