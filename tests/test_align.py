"""`t5patches align`: towards a score, near the original, whatever the scorer does."""

import dataclasses
import functools
import itertools
import json
import pathlib

import editing_samples
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_samples

from t5patches import cli
from t5patches.editing import align as align_module
from t5patches.editing import policy as policy_module
from t5patches.editing.data import to_arrays
from t5patches.editing.fim import FillInTheMiddle
from t5patches.editing.other_text import read_other_text
from t5patches.editing.policy import (
    How,
    PolicySettings,
    Stopped,
    align,
    group_advantages,
    policy_loss,
    read,
    update,
)
from t5patches.editing.programs import BELOW, WEIGHT, State
from t5patches.editing.values import ValueHead, generalized_advantages, whitened
from t5patches.model.decoder.model import small_decoder
from t5patches.model.folder import load_model
from t5patches.model.huggingface import load_checkpoint, save_checkpoint
from t5patches.model.lora import Lora, attached, init_adapter, trained_shapes
from t5patches.model.tokenizer import SentencePieceTokenizer, train_sentencepiece
from t5patches.model.tokenizer_files import load_tokenizer

pytestmark = pytest.mark.usefixtures("shared_programs")

TEXTS = ["a cat sat on a mat", "a dog sat on a cat", "on a mat a dog sat"]
INPUTS = ["a cat sat", "on a mat", "a dog", "sat"]
# Compiles in a third of the time of those under `data/`.
TINY = editing_samples.tiny_model(vocab_size=64, emb_dim=8, head_dim=4)
SPIECE = train_sentencepiece(TEXTS * 20, 30)
TOKENIZER = SentencePieceTokenizer(SPIECE)
SETTINGS = PolicySettings(
    steps=8,
    inputs_per_step=4,
    samples=8,
    max_length=8,
    update_size=16,
    learning_rate=0.05,
    kl_coefficient=0.01,
    lora=Lora(2),
    most_kl=50.0,
    checkpoint_every=2,
    implementation="reference",  # compiles faster; the gradient's test has the others
)
DECODER = small_decoder(vocab_size=336, width=16, layers=1, begin_id=0)


def of_a(outputs):
    """How often the letter a is said: by an untrained model now and then."""
    return [float(text.count("a")) for text in outputs]


@functools.cache
def tiny_params():
    return jax.jit(TINY.init)(jax.random.key(0))


def run(directory, scorer=of_a, settings=SETTINGS, **more):
    # Optax's Adam multiplies a float by an integer count.
    with jax.numpy_dtype_promotion("standard"):
        return align(TINY, tiny_params(), TOKENIZER, INPUTS, scorer, settings, directory, **more)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing interrupted."""
    return run(tmp_path_factory.getbasetemp() / "unbroken")


def assert_same(got, expected):
    assert got.history == expected.history
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


# --- The arithmetic -------------------------------------------------------------------------------


def test_advantages_are_within_the_group():
    scores = np.array([[0.0, 1.0, 2.0], [5.0, 5.0, 8.0], [0.1, 0.1, 0.1]])
    found = group_advantages(scores)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(found[:2].std(1), 1, rtol=1e-3)
    assert (found[2] == 0).all()
    np.testing.assert_allclose(group_advantages(10 * scores + 3)[:2], found[:2], rtol=1e-3)


def some_batch(model, rng, how):
    """Outputs of several lengths, an adapter that has moved, and what a step knows of them."""
    vocab = model.config.vocab_size
    base = jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, model.init(key)))(jax.random.key(0))
    adapter = jax.tree.map(
        lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32),
        init_adapter(model, how.lora, 0),
    )
    weights = (np.arange(5) < np.array([[5], [2], [1]])).astype(np.float32)
    batch = {
        "inputs": rng.integers(3, vocab, (3, 4)).astype(np.int32),
        "outputs": rng.integers(3, vocab, (3, 5)).astype(np.int32),
        "weights": weights,
        "advantages": np.array([[1.0], [-0.5], [2.0]], np.float32),
    }
    reading = jax.jit(functools.partial(read, model=model, how=how))
    found = reading(adapter, base, batch)
    noise = rng.choice([-0.5, -0.1, 0.1, 0.5], (3, 5)).astype(np.float32)
    batch |= {name: x for name, x in found.items() if name != "kl"}
    batch["old_log_probs"] += noise
    return base, adapter, batch


HOW = How(0.1, 0.7, (0.2, 0.3), 0.3, 2.0, Lora(2), None)
SOFTCAPPED = DECODER.replace(logit_softcap=2.0)


@pytest.mark.parametrize(
    ("model", "adapted"),
    # A coefficient that is given, and other text beside it; one that is compiled in, without.
    [
        (SOFTCAPPED, True),
        *(pytest.param(x, False, marks=pytest.mark.slow) for x in (TINY, DECODER)),
    ],
)
def test_the_gradient_is_that_of_the_text_in_float64(model, adapted):
    """By hand: ``rho A (p - [y])`` where the clip lets it, and ``beta p (log p/q - KL)``."""
    rng = np.random.default_rng(0)
    base, adapter, batch = some_batch(model, rng, HOW)

    @jax.jit
    def logits(adapter):
        params = attached(base, adapter, HOW.lora)
        return model.head(params).logits(model.hidden(params, batch))

    # At first, with B = 0, an adapter changes nothing.
    z, back = jax.vjp(logits, adapter)
    r = logits(init_adapter(model, HOW.lora, 0))
    said = np.eye(z.shape[-1])[batch["outputs"]]

    def log_softmax(x, temperature):
        x = np.asarray(x, np.float64) / temperature
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = (log_softmax(x, HOW.temperature) for x in (z, r))
    p = np.exp(log_p)
    rho = np.exp((log_p * said).sum(-1) - batch["old_log_probs"])
    a = np.broadcast_to(batch["advantages"], rho.shape).astype(np.float64)
    held = ((a > 0) & (rho > 1.3)) | ((a < 0) & (rho < 0.8))
    kl = (p * (log_p - log_q)).sum(-1, keepdims=True)
    w = batch["weights"].astype(np.float64)
    clipped = np.minimum(rho * a, np.clip(rho, 0.8, 1.3) * a)
    expected_loss = (w * (-clipped + 0.3 * kl[..., 0])).sum() / w.sum()
    gradient = np.where(held, 0, rho * a)[..., None] * (p - said)
    gradient += 0.3 * p * (log_p - log_q - kl)
    gradient /= HOW.temperature
    text, how = {}, HOW
    if adapted:  # the same outputs stand for other text, of weight 2, at temperature 1
        text = {name: batch[name] for name in ("inputs", "outputs", "weights")}
        how = HOW._replace(kl_coefficient=None)
        expected_loss -= 2 * (w * (log_softmax(z, 1) * said).sum(-1)).sum() / w.sum()
        gradient += 2 * (np.exp(log_softmax(z, 1)) - said)
    (expected,) = back(jnp.asarray(gradient * (w / w.sum())[..., None], jnp.float32))

    loss_of = functools.partial(policy_loss, model=model, how=how)
    graded = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, more), found = graded(adapter, base, batch, text, jnp.float32(0.3))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert more["clipped"] == pytest.approx((w * held).sum() / w.sum())
    assert 0 < more["clipped"] < 1
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * largest, rtol=1e-4)

    # What stands behind the end of an output counts nothing.
    other = np.where(batch["weights"] > 0, batch["outputs"], 3).astype(np.int32)
    assert (other != batch["outputs"]).any()
    (again, _), _ = graded(adapter, base, batch | {"outputs": other}, text, jnp.float32(0.3))
    assert again == pytest.approx(float(loss), rel=1e-6)
    # The control: a coefficient that is given counts, one that is compiled in is not asked for.
    (again, _), _ = graded(adapter, base, batch, text, jnp.float32(0.6))
    more = 0.3 * (w * kl[..., 0]).sum() / w.sum() if adapted else 0
    assert again == pytest.approx(expected_loss + more, rel=1e-5)


def test_the_coefficient_keeps_to_a_target():
    settings = PolicySettings(kl_coefficient=0.1, target_kl=0.2)
    scores, history = np.zeros((2, 2)), {}
    betas = []
    for kl in (0.0, 0.1, 0.22, 5.0):
        sampled = policy_module._Sampled([], [], {}, kl, 3.0)
        measures = policy_module._measures(scores, sampled, history, settings)
        policy_module._append(history, measures)
        betas.append(measures["kl_coefficient"])
    np.testing.assert_allclose(betas, [0.1, 0.1 * 0.8, 0.1 * 0.8 * 1.1, 0.1 * 0.8 * 1.1 * 1.2])


def test_advantages_by_values_are_those_of_the_recursion():
    """By hand, each output alone and no longer than it is."""
    rng = np.random.default_rng(0)
    lengths, gamma, lam = (6, 1, 4, 0), 0.9, 0.7
    weights = (np.arange(6) < np.array(lengths)[:, None]).astype(np.float32)
    values, rewards = rng.standard_normal((4, 6)).astype(np.float32), rng.standard_normal(4)
    advantages, returns = generalized_advantages(rewards, values, weights, gamma, lam)
    for row, length in enumerate(lengths):
        v = [float(x) for x in values[row, :length]] + [0.0]
        expected = [0.0] * (length + 1)
        for t in reversed(range(length)):
            reward = rewards[row] if t == length - 1 else 0.0
            expected[t] = reward + gamma * v[t + 1] - v[t] + gamma * lam * expected[t + 1]
        np.testing.assert_allclose(advantages[row, :length], expected[:length], rtol=1e-12)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()
    np.testing.assert_allclose(returns[weights > 0], (advantages + values)[weights > 0])
    # With gamma and lambda 1 it is the reward that a value is compared with.
    advantages, returns = generalized_advantages(rewards, values, weights, 1.0, 1.0)
    np.testing.assert_allclose(returns, rewards[:, None] * weights, atol=1e-7)
    white = whitened(advantages, weights)
    assert white.dtype == np.float32
    assert white[weights > 0].mean() == pytest.approx(0, abs=1e-6)
    assert white[weights > 0].std() == pytest.approx(1, rel=1e-3)
    assert not white[weights == 0].any()
    assert not whitened(np.full((4, 6), 0.1), weights).any()


def test_values_are_learnt_by_the_clipped_loss():
    """Where advantages are 0 and the KL costs nothing there is no other loss."""
    rng = np.random.default_rng(1)
    model, head = SOFTCAPPED, ValueHead(coefficient=0.4, clip=0.3)
    how = HOW._replace(value=head, kl_coefficient=0.0, learning_rate=0.01)
    base, adapter, batch = some_batch(model, rng, HOW)
    trained = {WEIGHT: jnp.asarray(0.3 * rng.standard_normal(16), jnp.float32), BELOW: adapter}
    found = jax.jit(functools.partial(read, model=model, how=how))(trained, base, batch)
    hidden = jax.jit(model.hidden)(attached(base, adapter, how.lora), batch)
    hidden, weight = (np.asarray(x, np.float64) for x in (hidden, trained[WEIGHT]))
    values = hidden @ weight
    np.testing.assert_allclose(found["old_values"], values, rtol=1e-4, atol=1e-5)
    old = values + rng.choice([-0.5, -0.1, 0.1, 0.5], values.shape)
    returns = values + rng.choice([-1.0, 1.0], values.shape)
    w, count = batch["weights"].astype(np.float64), batch["weights"].sum()
    own = (values - returns) ** 2
    held = (np.clip(values, old - 0.3, old + 0.3) - returns) ** 2
    assert (w * (held > own)).any()
    assert (w * (held < own)).any()
    near = (np.abs(values - old) <= 0.3) | (own >= held)
    expected = np.einsum("bl,bld->d", w * np.where(near, values - returns, 0), hidden) / count

    batch |= {"advantages": 0 * batch["advantages"], "returns": returns.astype(np.float32)}
    learning = jax.jit(functools.partial(update, model=model, how=how))
    state = State(trained, how.optimizer.init(trained))
    with jax.numpy_dtype_promotion("standard"):
        first, metrics = learning(state, base, batch | {"old_values": np.float32(old)}, {}, 0.0)
        assert metrics["value_loss"] == pytest.approx(
            0.5 * (w * np.maximum(own, held)).sum() / count, rel=1e-4
        )
        assert metrics["loss"] == pytest.approx(0.4 * float(metrics["value_loss"]), rel=1e-5)
        gradient = jax.tree.map(lambda x: x / (1 - 0.9), first.optimizer[0].mu)  # as Adam keeps it
        np.testing.assert_allclose(gradient[WEIGHT], 0.4 * expected, rtol=1e-3, atol=1e-5)
        # What is below the head learns too.
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient[BELOW])) > 1e-4
        # Updates bring it down, where no value has gone far enough on its way.
        losses = []
        for _ in range(8):
            given = batch | {"old_values": batch["returns"]}
            state, metrics = learning(state, base, given, {}, 0.0)
            losses.append(float(metrics["value_loss"]))
    assert losses[:5] == sorted(losses[:5], reverse=True)
    assert losses[-1] < 0.3 * losses[0]


def test_rewards_are_counted_in_the_first_steps_deviations():
    settings = dataclasses.replace(SETTINGS, value=ValueHead(gamma=1.0, lam=1.0))
    history = {"score": [10.0, 30.0], "deviation": [4.0, 100.0]}
    arrays = {"old_values": np.zeros((2, 1), np.float32), "weights": np.ones((2, 1), np.float32)}
    scores = np.array([[10.0, 18.0]])
    found, more = policy_module._with_advantages(arrays, scores, history, settings)
    np.testing.assert_array_equal(found["returns"], [[0.0], [2.0]])
    np.testing.assert_allclose(found["advantages"], [[-1.0], [1.0]], rtol=1e-3)
    assert more == {"explained_variance": 0.0}


def test_one_output_to_each_input_is_compared_with_the_other_inputs():
    policy_module._require_differences(np.array([[1.0], [2.0]]))
    with pytest.raises(
        ValueError, match=r"the first step's outputs have one score \(such as 1 for"
    ):
        policy_module._require_differences(np.array([[1.0], [1.0]]))


# --- A run ----------------------------------------------------------------------------------------


def test_the_score_rises_and_the_kl_begins_at_0(unbroken):
    history = unbroken.history
    assert {name: len(x) for name, x in history.items()} == {
        **dict.fromkeys(("score", "kl", "length", "same", "kl_coefficient"), 9),
        **dict.fromkeys(("loss", "clipped"), 8),
    }
    assert np.mean(history["score"][-3:]) > 1.3 * np.mean(history["score"][:2])
    assert history["kl"][0] == pytest.approx(0, abs=1e-6)
    assert history["kl"][-1] > 0.05
    assert max(history["clipped"]) > 0
    assert all(1 <= x <= 8 for x in history["length"])
    assert unbroken.collapse is None
    assert unbroken.steps == 8


BY_VALUE = dataclasses.replace(SETTINGS, value=ValueHead(), steps=4)


@pytest.fixture(scope="module")
def unbroken_by_value(tmp_path_factory):
    """One with a value head."""
    return run(tmp_path_factory.getbasetemp() / "by-value", settings=BY_VALUE)


def test_what_is_told_and_left_of_a_value_head(unbroken_by_value):
    history = unbroken_by_value.history
    measured = ("score", "kl", "length", "same", "kl_coefficient", "deviation")
    assert {name: len(x) for name, x in history.items()} == {
        **dict.fromkeys(measured, 5),
        **dict.fromkeys(("loss", "clipped", "value_loss", "explained_variance"), 4),
    }
    assert history["explained_variance"][0] == 0  # the head is zero
    assert all(history["explained_variance"][1:])
    # The head is no part of what is left.
    expected = trained_shapes(TINY, SETTINGS.lora)
    assert jax.tree.structure(unbroken_by_value.params) == jax.tree.structure(dict(expected))


@pytest.mark.slow
def test_with_a_value_head_the_score_rises_too(tmp_path):
    """Also with one output to each input."""
    settings = dataclasses.replace(BY_VALUE, steps=8, samples=1, inputs_per_step=16)
    score = run(tmp_path / "run", settings=settings).history["score"]
    assert np.mean(score[-3:]) > 1.3 * np.mean(score[:2])


@pytest.mark.slow
def test_a_value_head_is_gone_on_with(unbroken_by_value, tmp_path):
    scorer = Broken(4, KeyboardInterrupt())  # beyond the first checkpoint
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", scorer, BY_VALUE)
    assert_same(run(tmp_path / "run", scorer, BY_VALUE), unbroken_by_value)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_a_decoders_score_goes_where_it_is_asked_to(tmp_path, sign):
    """All parameters, several epochs; what is asked for is seen in what is said."""
    tokenizer = load_tokenizer(decoder_folder(tmp_path))
    settings = PolicySettings(
        steps=12,
        inputs_per_step=4,
        samples=8,
        max_length=8,
        update_size=32,
        epochs=2,
        learning_rate=0.01,
        lora=None,
        most_kl=50.0,
    )
    params = load_checkpoint(tmp_path / "decoder")[1]

    def of_letters(outputs):
        return [sign * sum(c in "abcdefghijklm" for c in text) for text in outputs]

    with jax.numpy_dtype_promotion("standard"):
        found = align(DECODER, params, tokenizer, INPUTS, of_letters, settings, tmp_path / "run")
    letters = [sign * x for x in found.history["score"]]
    assert letters[-1] > 2 * letters[0] if sign == 1 else letters[-1] < letters[0] / 2
    assert found.history["kl"][0] == pytest.approx(0, abs=1e-6)
    assert jax.tree.structure(found.params) == jax.tree.structure(dict(params))


def decoder_folder(path):
    files = {"tokenizer.json": tokenizer_samples.tokenizer_json("byte-level")}
    params = jax.tree.map(lambda x: np.asarray(2 * x), DECODER.init(jax.random.key(0)))
    save_checkpoint(path / "decoder", DECODER, params, files=files)
    return path / "decoder"


class Broken:
    """A scorer that fails at its nth call, once."""

    def __init__(self, when, error):
        self.calls, self.when, self.error = 0, when, error

    def __call__(self, outputs):
        self.calls += 1
        if self.calls == self.when:
            if isinstance(self.error, BaseException):
                raise self.error
            return self.error(outputs)
        return of_a(outputs)


@pytest.mark.parametrize("when", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_run_that_was_killed_ends_where_an_unbroken_one_does(unbroken, tmp_path, when):
    scorer = Broken(when, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", scorer)
    assert_same(run(tmp_path / "run", scorer), unbroken)


def test_what_is_finished_is_not_trained_again(unbroken, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(policy_module, "compiled_update", None)
    assert_same(run(tmp_path_factory.getbasetemp() / "unbroken"), unbroken)


FAILURES = {
    "raises": (RuntimeError("no network"), "RuntimeError: no network"),
    "too few": (lambda outputs: [1.0] * (len(outputs) - 1), "gave 31 numbers for 32 outputs"),
    "nan": (lambda outputs: [0.0, float("nan"), *of_a(outputs)[2:]], "nan for number 2, "),
    "none": (lambda outputs: None, "'NoneType' object is not iterable"),
    "words": (lambda outputs: ["good"] * len(outputs), "could not convert string to float"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in FAILURES])
def test_a_scorer_that_fails_on_the_way_costs_nothing(unbroken, tmp_path, name):
    error, said = FAILURES[name]
    scorer = Broken(4, error)
    with pytest.raises(Stopped, match=f"step 3: .*{said}"):
        run(tmp_path / "run", scorer)
    # Step 3 is no checkpoint's: it was kept because the scorer failed.
    scorer.calls = 100
    assert_same(run(tmp_path / "run", scorer), unbroken)
    assert scorer.calls == 100 + 6


def test_a_first_step_that_nothing_can_be_learnt_from_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"have one score \(such as 0.5 for all 8\): nothing can"):
        run(tmp_path / "run", lambda outputs: [0.5] * len(outputs))
    # The same for all outputs to an input, and another one for each input: the same.
    with pytest.raises(ValueError, match="have one score"):
        run(tmp_path / "run", lambda outputs, inputs: [len(text) for text in inputs])
    # For some of the inputs it is told, and nothing is learnt from them.
    found = run(
        tmp_path / "some",
        lambda outputs, inputs: [
            len(t) * (x == "sat") for t, x in zip(outputs, inputs, strict=True)
        ],
        SETTINGS_OF_1,
    )
    assert found.history["same"] == [0.75, 0.75]


SETTINGS_OF_1 = PolicySettings(**vars(SETTINGS) | {"steps": 1})


def test_a_model_that_collapses_is_given_up_for_its_last_good_state(unbroken, tmp_path):
    kl = unbroken.history["kl"]
    assert kl[2] < kl[3]
    bound = (max(kl[:3]) + kl[3]) / 2
    settings = PolicySettings(**vars(SETTINGS) | {"most_kl": bound})
    found = run(tmp_path / "run", settings=settings)
    assert found.steps == 2
    assert f"nats a token after 3 steps, and the bound is {bound:g}" in found.collapse
    assert found.history["kl"] == kl[:3]
    short = run(tmp_path / "short", settings=PolicySettings(**vars(SETTINGS) | {"steps": 2}))
    jax.tree.map(np.testing.assert_array_equal, found.params, short.params)
    settings = PolicySettings(**vars(SETTINGS) | {"most_kl": kl[1] / 2})
    with pytest.raises(FloatingPointError, match="of the steps before no state is kept"):
        run(tmp_path / "none", settings=settings)


def test_a_state_kept_where_a_scorer_failed_is_gone_back_to_with_all_that_was_measured(
    unbroken, tmp_path
):
    kl, history = unbroken.history["kl"], unbroken.history.items()
    last = next(i for i in range(4, 9) if kl[i] > max(kl[:i]))
    bound = (max(kl[:last]) + kl[last]) / 2
    settings = PolicySettings(**vars(SETTINGS) | {"most_kl": bound, "checkpoint_every": 100})
    with pytest.raises(Stopped):
        run(tmp_path / "run", Broken(last, RuntimeError()), settings)
    found = run(tmp_path / "run", settings=settings)
    assert found.steps == last - 1
    expected = {name: x[: last - (name in ("loss", "clipped"))] for name, x in history}
    assert found.history == expected


def test_bounds_of_the_length_and_of_the_loss():
    def said(length_, kl=0.1, **history):
        sampled = policy_module._Sampled([], [], {}, kl, length_)
        return policy_module._collapse(sampled, history, SETTINGS)

    assert said(3.0) is None
    assert said(2.5, length=[10.0], loss=[0.0]) is None
    assert "have 2.4 tokens after 1 steps and had 10.0" in said(2.4, length=[10.0], loss=[0.0])
    assert "have 40.5 tokens" in said(40.5, length=[10.0], loss=[0.0])
    assert "the loss of step 0 is nan" in said(10.0, length=[10.0], loss=[float("nan")])
    assert "the KL from the original is nan" in said(10.0, kl=float("nan"))


def test_another_run_is_refused(unbroken, tmp_path_factory):
    other = PolicySettings(**vars(SETTINGS) | {"kl_coefficient": 0.02})
    with pytest.raises(ValueError, match=r"kl_coefficient \(0.01 there, 0.02 asked for\)"):
        run(tmp_path_factory.getbasetemp() / "unbroken", settings=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "samples is 1: at least 2 is needed, as .* compared .*--advantages value"),
        (
            {"samples": 1, "inputs_per_step": 1, "update_size": 1, "value": ValueHead()},
            "a step has 1 output, and nothing to compare it with",
        ),
        ({"temperature": 0.0}, "temperature is 0.0: a number above 0 is needed"),
        ({"learning_rate": 1e39}, r"learning_rate is 1e\+39: a number above 0 is needed"),
        ({"update_size": 5}, "update_size is 5 and a step has 64 outputs"),
        ({"clip": (1.5, 0.2)}, "clip is"),
        ({"target_kl": 0.1, "kl_coefficient": 0.0}, "it must begin above 0"),
        ({"most_kl": float("nan")}, "most_kl is nan"),
        ({"most_length_change": 0.5}, "most_length_change is 0.5: at least 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicySettings(**settings)


# --- Other text -----------------------------------------------------------------------------------


def test_other_text_is_whole_cut_or_an_answer(tmp_path):
    (tmp_path / "text.txt").write_text("a cat sat on a mat\n\na dog\n")
    long, short = read_other_text(tmp_path / "text.txt", TOKENIZER, TOKENIZER, 4)
    assert (long.input_ids, short.input_ids) == ((1,), (1,))
    assert len(long.output_ids) == 4
    assert 1 not in long.output_ids
    assert short.output_ids[-1] == 1
    assert not any(short.marked)
    lines = [{"inputs": "a", "outputs": "a dog"}, {"inputs": "a"}, {"inputs": "a", "outputs": ""}]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="2 bad lines") as raised:
        read_other_text(tmp_path / "text.jsonl", TOKENIZER, TOKENIZER, 4)
    assert "line 2: got the fields ['inputs']; needed are 'inputs'" in str(raised.value)
    assert "line 3: 'outputs' must be a text that is not empty" in str(raised.value)
    (tmp_path / "text.jsonl").write_text(json.dumps(lines[0]))
    (only,) = read_other_text(tmp_path / "text.jsonl", TOKENIZER, TOKENIZER, 9)
    assert only.input_ids == TOKENIZER.encode_prompt("a")


@pytest.mark.slow
def test_a_decoder_keeps_other_text_told_with_its_middle_last(tmp_path):
    """No prompt at all: such a text begins where the model begins. With it its likelihood rises."""
    tokenizer = load_tokenizer(decoder_folder(tmp_path))
    params = load_checkpoint(tmp_path / "decoder")[1]
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 3))
    fim = FillInTheMiddle(0.7, ("<s>", "<|im_start|>", "<|im_end|>"))
    examples = read_other_text(tmp_path / "text.txt", tokenizer, tokenizer, 24, fim)
    text = to_arrays(examples, pad_id=DECODER.config.pad_id)
    assert text["inputs"].shape == (9, 0)
    changes = {"steps": 3, "lora": None, "learning_rate": 0.01}
    settings = PolicySettings(**vars(SETTINGS) | changes)

    def likelihood(params):
        logits = DECODER.head(params).logits(DECODER.hidden(params, text))
        found = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.maximum(text["outputs"], 0)[..., None], -1
        )
        return float((found[..., 0] * text["weights"]).sum() / text["weights"].sum())

    found = {}
    with jax.numpy_dtype_promotion("standard"):
        for name, given in (("beside", text), ("alone", None)):
            made = align(
                DECODER, params, tokenizer, INPUTS, of_a, settings, tmp_path / name,
                pretraining=given,
            )  # fmt: skip
            found[name] = likelihood(made.params)
        found["before"] = likelihood(params)
    assert found["beside"] > found["before"] + 0.5
    assert found["beside"] > found["alone"] + 0.5


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    files = {"spiece.model": SPIECE, "README.md": "# A model\n"}
    save_checkpoint(tmp_path / "tiny", TINY, tiny_params(), files=files)
    (tmp_path / "inputs.txt").write_text("\n".join(INPUTS))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("t5patches.editing.reward.load_callable", SCORERS.__getitem__)
    return tmp_path


SCORERS = {
    "mine:of_a": of_a,
    "mine:too_few": lambda outputs: [1.0],
    "mine:raises": lambda outputs: 1 / 0,
    "mine:not_empty": lambda outputs: [text.count("a") / len(text) for text in outputs],
    "mine:nan": lambda outputs: [float("nan")] * len(outputs),
    "mine:constant": lambda outputs: [1.0] * len(outputs),
    # Fine on the sample, and on nothing else.
    "mine:late": lambda outputs: [1.0] * 3 if len(outputs) == 3 else None,
}
SMALL = ("--steps", "2", "--inputs-per-step", "4", "--samples", "8", "--max-length", "8")
SMALL += ("--update-size", "16", "--learning-rate", "0.05", "--kl-coefficient", "0.01")
SMALL += ("--lora", "2", "--most-kl", "50", "--checkpoint-every", "1")
SMALL += ("--implementation", "reference")


def command(*more, scorer="mine:of_a", output="out"):
    given = ["--model", "tiny", "--inputs", "inputs.txt", "--scorer", scorer, "--output", output]
    try:
        with jax.numpy_dtype_promotion("standard"):
            return cli.main(["align", *given, *SMALL, *map(str, more)])
    except SystemExit as left:
        return left.code


def test_an_adapter_or_a_whole_folder_is_made(place, capsys):
    assert command("--quiet", "--json") == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert shown.err == ""
    assert record["steps"] == 2
    assert len(record["history"]["score"]) == 3
    assert record == json.loads((place / "out" / "align.json").read_text())
    assert sorted(p.name for p in (place / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "align.json",
    ]
    card = (place / "out" / "README.md").read_text()
    assert card.startswith("# A model\n\n## Aligned with a score\n\n")
    for part in ("`mine:of_a`", "rank 2", "2 steps of 4 inputs with 8 outputs", "Score "):
        assert part in card
    assert not (place / "out.unfinished").exists()
    beside = load_model("out", "tiny").params
    assert command("--merge", output="whole") == 0
    said = capsys.readouterr()
    assert "whole: 2 steps, score " in said.out
    assert "steps of 4 of 4 inputs, 8 outputs to each: 96 outputs" in said.err
    whole = load_model("whole").params
    jax.tree.map(np.testing.assert_array_equal, whole, beside)
    assert any(
        (np.asarray(x) != np.asarray(y)).any()
        for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(tiny_params()), strict=True)
    )
    assert command() == 2
    assert "out exists: nothing is overwritten" in capsys.readouterr().err
    assert command("--resume", "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out) == record
    assert command("--resume", "--seed", 3) == 2


@pytest.mark.slow
def test_killed_at_any_moment_there_is_no_folder_or_a_whole_one(place, monkeypatch, capsys):
    assert command(output="unbroken") == 0
    moments = [
        (policy_module, "score", 2),  # beyond the first checkpoint
        (align_module, "save_result", 1),  # trained, not written
        (pathlib.Path, "rename", 2),  # written, not renamed
    ]
    for module, name, when in moments:
        real, calls = getattr(module, name), itertools.count(1)

        def killed(*arguments, real=real, calls=calls, when=when, **options):
            if next(calls) == when:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, killed)
            assert command("--resume") == 130
        assert "repeat the command with --resume to go on" in capsys.readouterr().err
        assert not (place / "out").exists()
        assert (place / "out.unfinished").exists()
    assert command() == 2
    assert "holds an unfinished alignment: go on with it (--resume)" in (capsys.readouterr().err)
    assert command("--resume", "--temperature", "0.5") == 2
    assert "temperature (1.0 there, 0.5 asked for)" in capsys.readouterr().err
    assert command("--resume") == 0
    assert not (place / "out.unfinished").exists()
    one, other = (place / x / "adapter_model.safetensors" for x in ("out", "unbroken"))
    assert one.read_bytes() == other.read_bytes()


BAD_SCORERS = {
    "mine:too_few": "fails on a sample: ValueError: the scorer gave 1 numbers for 3 outputs",
    "mine:raises": "--scorer mine:raises fails on a sample: ZeroDivisionError: division by zero",
    "mine:not_empty": "ZeroDivisionError: division by zero; the outputs were ['This is a sample",
    "mine:nan": "3 of them not finite",
    "mine:constant": "have one score (such as 1 for all 8): nothing can be learnt",
    "mine:late": "the scorer failed on 32 outputs: TypeError: 'NoneType' object is not iterable",
}


@pytest.mark.parametrize("scorer", BAD_SCORERS)
def test_after_a_bad_scorer_nothing_is_left(place, scorer, capsys):
    assert command(scorer=scorer) == 2
    assert BAD_SCORERS[scorer] in capsys.readouterr().err
    assert not (place / "out").exists()
    assert not (place / "out.unfinished").exists()


@pytest.mark.slow
def test_a_scorer_that_fails_on_the_way_is_mended_and_gone_on_with(place, monkeypatch, capsys):
    broken = Broken(3, RuntimeError("no network"))  # after the sample, and the first step's
    monkeypatch.setitem(SCORERS, "mine:broken", broken)
    assert command(scorer="mine:broken") == 1
    said = capsys.readouterr().err
    assert "step 1: the scorer failed on 32 outputs: RuntimeError: no network" in said
    assert "What was reached is kept: repeat the command with --resume to go on" in said
    assert command("--resume", scorer="mine:broken") == 0


def test_a_terminal_does_not_obey_what_stopped_a_run(place, monkeypatch, capsys):
    def stopped(*_, **__):
        raise Stopped("step 1: the scorer failed: \x1b[2J")

    monkeypatch.setattr(align_module, "align_folder", stopped)
    assert command() == 1
    assert "t5patches align: step 1: the scorer failed: \\x1b[2J. What" in capsys.readouterr().err
    history = {"score": [0.0], "kl": [0.0], "length": [1.0]}
    record = {"steps": 1, "history": history, "collapse": "the KL is nan"}
    monkeypatch.setattr(align_module, "align_folder", lambda *_, **__: record)
    assert command("--quiet", output="\x1b[2J") == 1
    said = capsys.readouterr().err
    assert said.startswith("t5patches align: stopped early, as the KL is nan; \\x1b[2J holds ")


@pytest.mark.slow
def test_a_collapse_is_told_and_the_last_good_state_written(place, capsys):
    assert command("--json", "--quiet", output="all") == 0
    kl = json.loads(capsys.readouterr().out)["history"]["kl"]
    assert kl[1] < kl[2]
    assert command("--most-kl", (kl[1] + kl[2]) / 2) == 1
    said = capsys.readouterr()
    assert "stopped early, as the KL from the original is" in said.err
    assert "out holds the state after 1 steps" in said.err
    record = json.loads((place / "out" / "align.json").read_text())
    assert (record["steps"], record["edits"]) == (1, 0)
    assert "It ended early: the KL" in (place / "out" / "README.md").read_text()
    load_model("out", "tiny")


def test_what_is_wrong_is_told_before_weights_are_read(place, monkeypatch, capsys):
    monkeypatch.setattr(align_module, "load_checkpoint", None)

    def refused(*more):
        assert command(*more) == 2
        assert not (place / "out").exists()
        assert not (place / "out.unfinished").exists()
        return capsys.readouterr().err

    assert "nowhere is no folder" in refused("--model", "nowhere")
    assert "No such file" in refused("--pretraining", "nowhere.txt")
    assert "merge adds an adapter to the model, and there is none" in refused(
        "--merge", "--lora", "0"
    )
    assert "give --lora RANK too" in refused("--lora", "0", "--lora-alpha", "2")
    assert "update_size is 5" in refused("--update-size", "5")
    assert "dtype is 'float16'" in refused("--dtype", "float16")
    assert "need one another" in refused("--fim", "0.5")
    said = refused("--gamma", "0.9", "--gae-lambda", "1")
    assert "--gamma, --gae-lambda: of a value head alone; give --advantages value too" in said
    assert "samples is 1: at least 2 is needed" in refused("--samples", "1")
    value = ("--advantages", "value")
    assert "lam is 1.5: a number from 0 to 1" in refused(*value, "--gae-lambda", "1.5")
    assert "clip is 0.0: a number above 0" in refused(*value, "--value-clip", "0")
    fim = ("--fim", "0.5", "--fim-sentinels", "<a>", "<b>", "<c>")
    assert "fim transforms other text, and there is none (--pretraining)" in refused(*fim)
    for name in ("--pretraining-weight", "--pretraining-length"):
        assert f"{name} is of other text, and there is none" in refused(name, "2")
    assert "--fim-spm is a share of the texts that --fim RATE" in refused("--fim-spm", "0.5")
    assert "no special token '<a>'" in refused(*fim, "--pretraining", "text.txt")
    (place / "text.jsonl").write_text('{"inputs": "a"}')
    assert "line 1: got the fields ['inputs']" in refused("--pretraining", "text.jsonl")
    (place / "tiny" / "align.json").write_text("{")
    said = refused()
    assert "align.json cannot be read" in said
    assert "remove the folder" not in said
    (place / "tiny" / "align.json").unlink()
    monkeypatch.setattr("t5patches.editing.plan._host_memory", lambda: 1000)
    said = refused()
    assert "that does not fit" in said
    assert "bfloat16" not in said  # on a CPU it takes more


def test_a_plan_says_what_will_be_made(place, monkeypatch, capsys):
    monkeypatch.setattr(align_module, "load_checkpoint", None)
    assert command("--plan", "--advantages", "value", "--gamma", "0.9") == 0
    said = capsys.readouterr().out
    assert "advantages against a value head (gamma 0.9, lambda 0.95)" in said
    assert "2 steps of 4 of 4 inputs, 8 outputs to each: 96 outputs of at most 8 tokens" in said
    assert "4 updates of 16 outputs" in said
    assert "memory on each of 1 x" in said
    assert not (place / "out.unfinished").exists()
    (place / "out").mkdir()
    assert command("--plan") == 2
    assert "out exists: nothing is overwritten" in capsys.readouterr().err


def test_the_plan_is_of_the_programs_that_run(place, caplog):
    """Of a length that no other test has, with an adapter and a value head."""
    with jax.log_compiles():
        assert command("--max-length", "7", "--steps", "1", "--advantages", "value") == 0
    for program in ("_decode", "read", "update"):
        assert caplog.text.count(f"Compiling jit({program})") == 1, program
    card = (place / "out" / "README.md").read_text()
    assert "Advantages against a value head (explained variance 0.00)" in card


@pytest.mark.slow
def test_other_text_beside_it(place, capsys):
    assert command("--plan", "--pretraining", "text.txt") == 0
    assert "beside each update 16 of 3 other texts" in capsys.readouterr().out
    assert (
        command("--pretraining", "text.txt", "--pretraining-weight", "3", "--dtype", "bfloat16")
        == 0
    )
