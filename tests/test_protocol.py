"""The language model protocol: T5 keeps it, and so does a network that has no encoder."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_folders
from editing_samples import example, tiny_model, tiny_params

from t5patches.editing.data import to_arrays
from t5patches.editing.train import TrainSettings, token_loss
from t5patches.model.decoder.model import small_decoder
from t5patches.model.decoder.network import FULL, SLIDING
from t5patches.model.generate import generate
from t5patches.model.placement import make_mesh, param_shardings
from t5patches.model.protocol import OutputHead
from t5patches.model.t5.model import T5, small_t5
from t5patches_kernels import linear_token_statistics, targeted_negative_loss

VOCABULARY = 32


class TotalCache(NamedTuple):
    """The sum of all that came before, once for a prompt and once for a stream."""

    prompts: jax.Array
    streams: jax.Array


@dataclasses.dataclass(frozen=True)
class TotalConfig:
    """Its padding is no 0, so that nothing takes 0 for it."""

    vocab_size: int = VOCABULARY
    emb_dim: int = VOCABULARY
    dtype: type = jnp.float32
    dropout_rate: float = 0.0
    pad_id: int = 31
    begin_id: int = 30
    end_id: int = 29
    end_ids: tuple = (29,)
    max_positions: None = None


@dataclasses.dataclass(frozen=True)
class Total:
    """A decoder: the next token is the sum of all before it, prompt and output, times 3, plus 1.

    Its parameters are a table of rows that are all 0 but for a 1, its head is their transpose.
    """

    config: TotalConfig = TotalConfig()

    def head(self, params):
        return OutputHead(params["table"], transposed=True, logit_scale=5.0)

    def first_inputs(self, prompts):
        last = jnp.sum(prompts != self.config.pad_id, axis=-1) - 1
        return jnp.take_along_axis(prompts, last[:, None], axis=-1)[:, 0]

    def _total(self, tokens):
        return jnp.sum(jnp.where(tokens == self.config.pad_id, 0, tokens), axis=-1)

    def _state(self, params, total):
        return params["table"][(3 * total + 1) % 29]

    def hidden(self, params, batch, *, dropout_key=None):
        before = jnp.pad(batch["outputs"], ((0, 0), (1, 0)))[:, :-1]
        total = self._total(batch["inputs"])[:, None] + jnp.cumsum(before, axis=-1)
        return self._state(params, total)

    def prefill(self, params, prompts, begun, start, *, streams, max_length):
        # The last token of the prompt, and the last one begun, are left to `decode`.
        inputs = jnp.concatenate([self.first_inputs(prompts)[:, None], begun], axis=1)
        taken = jnp.where(jnp.arange(inputs.shape[1]) < start, inputs, 0)
        prompt = self._total(prompts) - self.first_inputs(prompts)
        return TotalCache(prompt, jnp.repeat(self._total(taken)[:, None], streams, axis=1))

    def decode(self, params, cache, tokens):
        cache = cache._replace(streams=cache.streams + tokens)
        total = cache.prompts[:, None] + cache.streams
        return self.head(params).logits(self._state(params, total)), cache


TABLE = {"table": np.eye(VOCABULARY, dtype=np.float32)}


def continued(prompt, forced, length):
    said = list(forced)
    while len(said) < length:
        said.append((3 * (sum(prompt) + sum(said)) + 1) % 29)
    return said


def padded(rows, width):
    return np.array([[*row, *[31] * (width - len(row))] for row in rows])


def test_a_network_without_an_encoder_generates():
    prompts = [[5, 6], [7], [0, 3, 9, 2, 4, 4, 1, 8, 0, 6], [1, 0, 2]]
    prefixes = [[[4, 5], [4, 5, 6]], [[3], []], [[0, 7, 1], [0, 7, 2]], [[], []]]
    got = generate(
        Total(),
        TABLE,
        padded(prompts, 10),
        max_length=6,
        prefixes=np.array([padded(streams, 3) for streams in prefixes]),
        batch_size=4,
    )
    want = [
        [continued(prompt, forced, 6) for forced in streams]
        for prompt, streams in zip(prompts, prefixes, strict=True)
    ]
    np.testing.assert_array_equal(got, want)


def test_what_is_generated_is_what_the_hidden_states_predict():
    prompts = padded([[5, 6], [7, 1, 2]], 3)
    outputs = generate(Total(), TABLE, prompts, max_length=5)
    batch = {"inputs": prompts, "outputs": outputs}
    logits = Total().head(TABLE).logits(Total().hidden(TABLE, batch))
    np.testing.assert_array_equal(np.argmax(logits, -1), outputs)


BOTH = pytest.mark.parametrize(
    "model",
    [
        small_t5(vocab_size=VOCABULARY, width=8, layers=2),
        small_decoder(
            vocab_size=VOCABULARY,
            width=8,
            layers=2,
            layer_types=(FULL, SLIDING),
            sliding_window=3,
        ),
    ],
    ids=["t5", "decoder"],
)


@BOTH
def test_a_prompt_is_read_once_for_all_outputs_to_it(model):
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    inputs = rng.integers(3, VOCABULARY, (2, 40)).astype(np.int32)
    inputs[1, 2:] = model.config.pad_id
    outputs = rng.integers(3, VOCABULARY, (2, 8, 5)).astype(np.int32)
    ways = np.asarray(rng.standard_normal((2, 8, 5, 8)), np.float32)
    together = {"inputs": inputs, "outputs": outputs}
    apart = {"inputs": np.repeat(inputs, 8, axis=0), "outputs": outputs.reshape(16, 5)}

    @jax.jit
    def states_and_gradient(params, batch):
        def along(params):
            states = model.hidden(params, batch)
            return jnp.vdot(states, ways.reshape(states.shape)), states

        return jax.grad(along, has_aux=True)(params)

    (gradient, states), (expected_gradient, expected) = (
        states_and_gradient(params, batch) for batch in (together, apart)
    )
    np.testing.assert_allclose(states.reshape(expected.shape), expected, rtol=2e-5, atol=2e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max()),
        gradient,
        expected_gradient,
    )
    once, each = (
        jax.jit(model.hidden).lower(params, batch).compile().cost_analysis()["flops"]
        for batch in (together, apart)
    )
    assert once < 0.5 * each


def bytes_of(cache):
    """Of the arrays of a tree that are numbers of the network."""
    arrays = jax.tree.leaves(cache)
    return sum(x.size * x.dtype.itemsize for x in arrays if jnp.issubdtype(x.dtype, jnp.floating))


@BOTH
def test_what_is_held_of_a_prompt_is_held_once_for_all_outputs_to_it(model):
    def caches(length, streams):
        """Bytes after the prompt, and after one more step."""

        def found(params):
            prompts, begun = jnp.full((2, length), 5), jnp.full((2, 1), 5)
            cache = model.prefill(params, prompts, begun, 1, streams=streams, max_length=3)
            return cache, model.decode(params, cache, jnp.full((2, streams), 6))[1]

        return [bytes_of(cache) for cache in jax.eval_shape(found, model.param_shapes())]

    # Keys and values of two layers, in float32; the decoder's two heads share them.
    is_t5 = isinstance(model, T5)
    of_a_token = 2 * 2 * (8 if is_t5 else 4) * 4
    encoded = 8 * 4 if is_t5 else 0
    for long, short, one in zip(caches(40, 8), caches(9, 8), caches(40, 1), strict=True):
        assert long - short == 2 * (40 - 9) * (of_a_token + encoded)
        # What each output has of its own has nothing to do with the prompt's length.
        assert long - one == 2 * (8 - 1) * 3 * of_a_token


@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_t5s_hidden_states_and_head_give_its_logits(name):
    model, params, expected = t5_folders.load(name)
    batch = {"inputs": expected["inputs"], "outputs": expected["targets"]}
    got = model.head(params).logits(model.hidden(params, batch))
    want = t5_folders.logits(model.config, params, batch["inputs"], batch["outputs"])
    real = batch["outputs"] > 0
    np.testing.assert_allclose(got[real], want[real], rtol=1e-5, atol=1e-5)
    assert jax.tree.map(np.shape, model.head_params(params)) != jax.tree.map(np.shape, params)
    np.testing.assert_array_equal(
        model.head(model.head_params(params)).kernel, model.head(params).kernel
    )


def test_shapes_axes_and_names_are_of_the_same_parameters():
    model = tiny_model()
    shapes = {
        tuple(key.key for key in path): x.shape
        for path, x in jax.tree.leaves_with_path(model.param_shapes())
    }
    assert {path: len(names) for path, names in model.param_axes().items()} == {
        path: len(shape) for path, shape in shapes.items()
    }
    tensors = model.family.tensors(model.config).values()
    assert shapes == {t.path: t.shape[::-1] if t.transposed else t.shape for t in tensors}


def test_devices_split_between_units():
    """Two heads of 8 entries are split over 2 devices and not over 4."""
    for count, split in ((2, "model"), (4, None)):
        placed = param_shardings(make_mesh(count, jax.devices()[:count]), tiny_model(vocab_size=8))
        query = placed["encoder"]["layers_0"]["attention"]["query"]["kernel"]
        assert query.spec[1] == split
        assert placed["token_embedder"]["embedding"].spec[0] == "model"


def test_a_softcap_bounds_the_logits_and_is_in_the_losses():
    head = OutputHead(jnp.eye(3), transposed=False, logit_scale=1.0, softcap=2.0)
    hidden = jnp.array([-9.0, 0.5, 9.0])
    np.testing.assert_allclose(head.logits(hidden), 2 * np.tanh(np.array(hidden) / 2), rtol=1e-6)
    plain = head._replace(softcap=None)
    np.testing.assert_array_equal(plain.logits(hidden), hidden)
    assert plain.loss_options() == {"logit_scale": 1.0, "transposed": False, "softcap": None}

    @dataclasses.dataclass(frozen=True)
    class Capped(T5):
        def head(self, params):
            return super().head(params)._replace(softcap=1.0)

    model, params, settings = Capped(tiny_model().config), tiny_params(), TrainSettings()
    batch = to_arrays([example("a", "a fire in Paris", "Paris")], pad_id=0)
    loss_of = jax.jit(token_loss, static_argnums=(0, 4))
    got = loss_of(model, params, params, batch, settings)
    logits = jax.jit(lambda p, b: model.head(p).logits(model.hidden(p, b)))(params, batch)
    assert np.abs(logits).max() <= 1.0
    want = targeted_negative_loss(
        logits, logits, batch["outputs"], batch["weights"], alpha=settings.alpha
    )
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    unbounded = loss_of(T5(model.config), params, params, batch, settings)
    assert np.abs(got.loss - unbounded.loss).max() > 0.1


def test_equal_models_are_one_for_the_compiler():
    model = tiny_model(mlp_activations=["gelu", "linear"])
    assert hash(model) == hash(tiny_model())
    assert model == tiny_model() != model.replace(dropout_rate=0.5)


@pytest.mark.parametrize("transposed", [False, True])
def test_logits_are_those_of_the_losses(transposed):
    """In bfloat16 too: else what is sampled would be of another distribution than what is read."""
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=(64, 500)), jnp.float32)
    hidden = jnp.asarray(random.normal(size=(9, 64)), jnp.bfloat16)
    targets = jnp.arange(9) * 50
    head = OutputHead(kernel.T if transposed else kernel, transposed, 0.5, softcap=9.0)
    found = linear_token_statistics(hidden, head.kernel, targets, **head.loss_options())
    of_logits = jax.nn.log_softmax(head.logits(hidden))[jnp.arange(9), targets]
    np.testing.assert_allclose(found.log_prob, of_logits, rtol=0, atol=2e-5)
