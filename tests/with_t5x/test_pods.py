"""The figures of `bench.pods` on a step that is compiled whole, for eight CPU devices."""

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
    ("variant", "numbers", "collectives"),
    [
        pytest.param("upstream", 16, 8, marks=t5x_stack.needs_upstream),
        ("ours", 10, 3),
        ("ours, fused head", 10, 3),
    ],
)
def test_what_the_loss_moves_in_a_whole_step(variant, numbers, collectives):
    parts, batch = t5x_stack.partitioner(model_axis=4), pods.batch_of(4)
    step = t5x_step.prepare(variant, pods.OBJECTIVE, SIZES, batch, "float32", "xla", parts)
    found = moved(pods.compiled(step, batch).as_text())
    moves = pods.numbers_a_token(found, (2, pods.TARGETS), SIZES["emb_dim"])
    print(moves)
    assert sum(map(sum, moves)) == numbers
    assert len(moves) <= collectives + 9
