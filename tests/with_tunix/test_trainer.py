"""The losses in tunix's trainer: `make test-tunix`. `Editing` below is all that it takes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from t5patches_kernels import targeted_negative_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, while it is imported
    peft_trainer = pytest.importorskip("tunix.sft.peft_trainer", reason="needs make test-tunix")
    from tunix.models.llama3 import model as llama3

pytestmark = pytest.mark.filterwarnings("ignore")  # tunix's own


def logits_of(model, tokens, weights):
    """[batch, length - 1, V] before each token but the first; nothing attends to padding."""
    length = tokens.shape[1]
    causal = jnp.tri(length, dtype=bool)
    mask = causal[None] & (weights != PADDING)[:, None, :]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return model(tokens, positions, None, mask)[0][:, :-1]


def loss_fn(model, tokens, weights, ref_logits):
    """The mean over the tokens that count: however much padding there is, it is the same."""
    said, counted = tokens[:, 1:], jnp.where(weights[:, 1:] == PADDING, 0.0, weights[:, 1:])
    out = targeted_negative_loss(
        logits_of(model, tokens, weights), ref_logits, said, counted, objective="tnrf", alpha=1.0
    )
    return out.loss.sum() / jnp.maximum((counted != 0).sum(), 1)


class Editing(peft_trainer.PeftTrainer):
    """Fine-tunes towards a frozen original without its marked tokens.

    A batch is `tokens` [batch, length], and `weights`: 1 where a token of an output is kept, -1
    where it is pushed down, 0 for prompts, and `PADDING`.
    """

    def __init__(self, model, original, optimizer, config):
        super().__init__(model, optimizer, config)
        self._original, self._logits = original, nnx.jit(logits_of)
        self.with_loss_fn(loss_fn)

    def _prepare_inputs(self, batch):
        return batch | {"ref_logits": self._logits(self._original, **batch)}


PADDING = 9.0

# --- Tests ----------------------------------------------------------------------------------------

SMALL = llama3.ModelConfig(
    num_layers=1,
    vocab_size=32,
    embed_dim=16,
    hidden_dim=32,
    num_heads=2,
    head_dim=8,
    num_kv_heads=1,
    rope_theta=10_000,
    norm_eps=1e-5,
    weight_tying=True,
)
TOKENS = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32)
WEIGHTS = np.array([[0, 0, -1, 1], [0, 1, 1, 1]], np.float32)


@pytest.fixture
def small():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), mesh:
        yield lambda: llama3.Llama3(SMALL, rngs=nnx.Rngs(0))


def padded(by):
    pad = ((0, 0), (0, by))
    return {
        "tokens": np.pad(TOKENS, pad),
        "weights": np.pad(WEIGHTS, pad, constant_values=PADDING),
    }


def test_the_marked_token_goes_and_the_rest_stays(small):
    model, original = small(), small()
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**6, max_steps=40)
    trainer = Editing(model, original, optax.adam(3e-3), config)
    trainer.train([padded(0)] * 40)
    before, after = (
        np.asarray(jax.nn.softmax(logits_of(m, TOKENS, WEIGHTS))) for m in (original, model)
    )
    assert after[0, 1, 7] < 0.2 * before[0, 1, 7]
    rest = np.delete(before[0, 1], 7) / (1 - before[0, 1, 7])
    assert np.abs(np.delete(after[0, 1], 7) - rest).max() < 0.5 * before[0, 1, 7]
    assert np.abs(after[1] - before[1]).max() < 0.5 * before[0, 1, 7]


def test_padding_changes_nothing(small):
    model = small()
    found = []
    for by in (0, 5):
        batch = padded(by)
        batch["ref_logits"] = jax.lax.stop_gradient(logits_of(model, **batch) + 0.1)
        found.append(nnx.value_and_grad(loss_fn)(model, **batch))
    (one, of_one), (other, of_other) = found
    np.testing.assert_allclose(one, other, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), of_one, of_other
    )
