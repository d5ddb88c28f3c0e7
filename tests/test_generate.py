"""Generation against the original library, and against one uncached pass a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_folders

from t5patches.model import generate as module
from t5patches.model.generate import generate
from t5patches.model.t5.model import T5
from t5patches.model.t5.network import T5Config

pytestmark = pytest.mark.usefixtures("shared_programs")

MODEL, PARAMS, EXPECTED = t5_folders.load("t5_1_1")
INPUTS = EXPECTED["inputs"]
# Of every length, one with the padding id inside, one that ends, one repeated.
PREFIXES = np.array(
    [[0, 0, 0, 0], [9, 0, 0, 0], [7, 10, 0, 0], [5, 0, 6, 0], [5, 8, 1, 9], [7, 10, 3, 50]]
)


def one_by_one(prefix, inputs, max_length):
    """The slow and obvious decoder: the whole network again for every token."""
    said = [*np.trim_zeros(prefix, "b")]
    said = said[: said.index(1) + 1] if 1 in said else said
    while len(said) < max_length and 1 not in said:
        # The token after the last is not yet known; any id but padding keeps its place unmasked.
        targets = np.full((1, max_length), 2)
        targets[0, : len(said)] = np.where(np.array(said) == 0, 2, said)
        said.append(int(np.argmax(_logits(inputs[None], said, targets)[len(said)])))
    return said + [0] * (max_length - len(said))


def _logits(inputs, said, targets):
    tokens = np.zeros_like(targets)
    tokens[0, 1 : len(said) + 1] = said
    return _apply(inputs, tokens, targets)[0]


@jax.jit
def _apply(inputs, tokens, targets):
    model = t5_folders.Transformer(MODEL.config)
    return model.apply({"params": PARAMS}, inputs, tokens, targets, enable_dropout=False)


@functools.cache
def expected_from_prefixes():
    return [one_by_one(p, x, 9) for p, x in zip(PREFIXES, INPUTS, strict=True)]


def test_given_outputs_are_read_as_they_were_decoded_with_the_padding_id_in_them():
    """A sampler may draw it: what is learnt is then of the distribution that it was drawn from."""
    outputs = np.array([[5, 0, 6, 0, 0], [0, 7, 8, 9, 1]])
    prompts = jnp.asarray(INPUTS[:2])
    prefill = functools.partial(MODEL.prefill, streams=1, max_length=5)
    cache = jax.jit(prefill)(PARAMS, prompts, np.zeros((2, 0), np.int32), np.int32(0))
    token, steps, decode = np.zeros(2, np.int32), [], jax.jit(MODEL.decode)
    for said in outputs.T:
        logits, cache = decode(PARAMS, cache, token[:, None])
        steps.append(np.asarray(logits[:, 0]))
        token = np.asarray(said, np.int32)
    states = jax.jit(MODEL.hidden)(PARAMS, {"inputs": prompts, "outputs": outputs})
    got = MODEL.head(PARAMS).logits(states)
    np.testing.assert_allclose(got, np.stack(steps, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_greedy_outputs_are_those_of_the_original_library(name):
    """Without a prefix and with one, in one batch."""
    model, params, expected = t5_folders.load(name)
    prefixes = expected["prefixes"]
    got = generate(
        model,
        params,
        np.concatenate([expected["inputs"]] * 2),
        prefixes=np.concatenate([0 * prefixes, prefixes]),
        max_length=24,
        batch_size=12,
    )
    np.testing.assert_array_equal(got[:6], expected["greedy"])
    np.testing.assert_array_equal(got[6:], expected["prefixed"])
    assert got.dtype == np.int32


@pytest.mark.parametrize("batch_size", [2, 4])
def test_prefixes_of_any_length_share_a_batch(batch_size):
    got = generate(MODEL, PARAMS, INPUTS, max_length=9, prefixes=PREFIXES, batch_size=batch_size)
    np.testing.assert_array_equal(got, expected_from_prefixes())


def test_an_output_may_end_soon_after_its_prefix():
    got = generate(
        MODEL, PARAMS, INPUTS, max_length=9, prefixes=PREFIXES, batch_size=4, beyond_prefix=3
    )
    expected = np.array(expected_from_prefixes())
    for row, prefix in zip(expected, PREFIXES, strict=True):
        row[len(np.trim_zeros(prefix, "b")) + 3 :] = 0
    np.testing.assert_array_equal(got, expected)
    assert (got != expected_from_prefixes()).any()
    with pytest.raises(ValueError, match=r"beyond_prefix \(0\) are at least 1"):
        generate(MODEL, PARAMS, INPUTS, max_length=9, beyond_prefix=0)


def test_the_streams_of_an_input_are_decoded_as_if_alone():
    streams = np.stack([PREFIXES, np.roll(PREFIXES, 1, axis=0), PREFIXES + (PREFIXES > 0)], 1)
    # An input all of whose streams share the first tokens, so that the shared part is not empty.
    streams[5] = [[7, 10, 3, 50], [7, 10, 4, 0], [7, 10, 0, 0]]
    expected = [
        [one_by_one(p, x, 9) for p in prefixes] for prefixes, x in zip(streams, INPUTS, strict=True)
    ]
    got = generate(MODEL, PARAMS, INPUTS, max_length=9, prefixes=streams, batch_size=6)
    np.testing.assert_array_equal(got, expected)
    alone = generate(MODEL, PARAMS, INPUTS[5:], max_length=9, prefixes=streams[5:], batch_size=6)
    np.testing.assert_array_equal(alone, expected[5:])


def test_a_program_for_each_length_and_none_for_the_last_batch():
    module._decode.clear_cache()
    # 4 prompts of 5 to 8 tokens in a batch, then 2 longer ones, which are filled up to 4.
    call = {"max_length": 5, "batch_size": 4}
    whole = generate(MODEL, PARAMS, INPUTS, **call)
    np.testing.assert_array_equal(generate(MODEL, PARAMS, INPUTS[:3], **call), whole[:3])
    assert generate(MODEL, PARAMS, INPUTS[:0], **call).shape == (0, 5)
    assert module._decode._cache_size() == 2


def test_decoding_stops_when_every_row_has_ended(monkeypatch):
    steps = []

    def counted(logits):
        jax.debug.callback(lambda: steps.append(1))
        return likeliest(logits)

    likeliest = module._likeliest
    monkeypatch.setattr(module, "_likeliest", counted)
    module._decode.clear_cache()
    ending = np.flatnonzero((EXPECTED["greedy"] == 1).any(axis=1))
    got = generate(MODEL, PARAMS, INPUTS[ending], max_length=24, batch_size=len(ending))
    module._decode.clear_cache()
    jax.effects_barrier()
    np.testing.assert_array_equal(got, EXPECTED["greedy"][ending])
    assert len(steps) == max(np.argmax(got == 1, axis=1)) + 1 < 24


def test_samples_follow_the_models_distribution():
    """One input, thousands of streams without a prefix: frequencies against probabilities."""
    many, temperature = 4000, 2.0
    got = generate(
        MODEL,
        PARAMS,
        INPUTS[:1],
        max_length=1,
        prefixes=np.zeros((1, many, 0), int),
        temperature=temperature,
        rng=jax.random.key(0),
    )
    logits = _logits(INPUTS[:1], [], np.full((1, 9), 2))[0]
    expected = many * np.asarray(jax.nn.softmax(logits / temperature))
    observed = np.bincount(got[0, :, 0], minlength=len(expected))
    assert np.all(np.abs(observed - expected) < 5 * np.sqrt(expected) + 1)


def test_a_sample_depends_on_its_seed_and_index_and_not_on_its_batch():
    def sample(seed, batch_size, temperature=1.0):
        return generate(
            *(MODEL, PARAMS, INPUTS),
            max_length=9,
            prefixes=PREFIXES,
            temperature=temperature,
            rng=jax.random.key(seed),
            batch_size=batch_size,
        )

    first = sample(3, 6)
    np.testing.assert_array_equal(first, sample(3, 4))
    assert (first != sample(4, 6)).any()
    forced = PREFIXES[:4] > 0  # the rows in which no forced token follows an end
    np.testing.assert_array_equal(first[:4, :4][forced], PREFIXES[:4][forced])
    np.testing.assert_array_equal(sample(3, 6, temperature=1e-4), expected_from_prefixes())


def test_a_greedy_stream_beside_a_sampled_one_changes_neither():
    call = {"max_length": 9, "temperature": 1.0, "rng": jax.random.key(3), "batch_size": 12}
    streams = np.stack([PREFIXES] * 2, 1)
    got = generate(MODEL, PARAMS, INPUTS, prefixes=streams, greedy_first=True, **call)
    np.testing.assert_array_equal(got[:, 0], expected_from_prefixes())
    sampled = generate(MODEL, PARAMS, INPUTS, prefixes=PREFIXES, **call)
    np.testing.assert_array_equal(got[:, 1], sampled)
    assert (got[:, 0] != got[:, 1]).any()


def test_other_ids_may_end_and_pad():
    greedy = EXPECTED["greedy"][0, :8].tolist()
    end = greedy.index(greedy[2])

    class Other(T5Config):
        end_id, pad_id = greedy[2], 63

    other = Other(**vars(MODEL.config))
    got = generate(T5(other), PARAMS, INPUTS[:1], max_length=8, batch_size=1)
    assert got[0].tolist() == greedy[: end + 1] + [63] * (7 - end)


def test_bfloat16_and_a_config_with_a_list_decode():
    model = MODEL.replace(dtype=jnp.bfloat16, mlp_activations=["gelu", "linear"])
    got = generate(model, PARAMS, INPUTS, max_length=4, batch_size=6)
    assert (got == EXPECTED["greedy"][:, :4]).mean() > 0.7


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": INPUTS * 1.0}, TypeError, "prompts must hold integer ids"),
        ({"prompts": INPUTS[0]}, ValueError, "prompts must have 2 dimensions"),
        ({"prompts": INPUTS + 60}, ValueError, "model has 0 to 63. Is this"),
        (
            {"prefixes": PREFIXES[:2]},
            ValueError,
            r"must be \[6, length\] or \[6, streams, length\]",
        ),
        ({"prefixes": np.zeros((6, 0, 2), int)}, ValueError, "with at least one stream"),
        ({"prefixes": PREFIXES[0]}, ValueError, "prefixes must have 2 dimensions"),
        ({"prefixes": PREFIXES - 1}, ValueError, "prefixes holds ids from -1"),
        ({"prefixes": PREFIXES, "max_length": 3}, ValueError, "4 tokens and max_length.* is 3"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": float("inf"), "rng": 0}, ValueError, "temperature is inf"),
        ({"temperature": 1.0}, ValueError, r"needs rng=jax.random.key\(seed\)"),
        ({"batch_size": 0}, ValueError, "at least 1"),
        ({"max_length": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_input_is_told(change, error, message):
    call = {"prompts": INPUTS, "max_length": 8} | change
    with pytest.raises(error, match=message):
        generate(MODEL, PARAMS, **call)
