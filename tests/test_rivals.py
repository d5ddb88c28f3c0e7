"""Other methods as objectives: each against its formula, written out over whole rows of logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train
from editing_samples import example, tiny_model, tiny_params, tokenizer
from harness import slow_unless

from t5patches.editing.data import pair_arrays, to_arrays
from t5patches.editing.rivals import RIVALS, Chosen, Given
from t5patches.editing.train import (
    KEEPING,
    NO_SETS,
    WITH_ORIGINAL,
    Batches,
    Step,
    TrainSettings,
    token_loss,
    train,
)
from t5patches.model.protocol import OutputHead
from t5patches_kernels import TARGETED_NEGATIVE, Edits

pytestmark = pytest.mark.usefixtures("shared_programs")

OUTPUTS, LENGTH, WIDTH, VOCABULARY = 4, 5, 6, 24
WEIGHTS = np.array(
    [[1, -1, 1, 0, 0], [1, 1, 1, 1, 0], [-1, 1, -1, 1, 1], [0, 0, 0, 0, 0]], np.float32
)
SETS = np.full((OUTPUTS, LENGTH, 3), -1, np.int32)


def given(name, *, sets=False, alpha=1.5):
    """A batch of random states, and the corrections of its outputs."""
    rng = np.random.default_rng(7)

    def states():
        return jnp.asarray(rng.normal(size=(OUTPUTS, LENGTH, WIDTH)), jnp.float32)

    def head():
        kernel = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32)
        return OutputHead(kernel, transposed=False, logit_scale=0.7)

    targets = rng.integers(0, VOCABULARY, (OUTPUTS, LENGTH)).astype(np.int32)
    own, original = head(), head()
    rival = RIVALS[name]
    hidden, original_hidden = states(), states()
    # The sets hold what the original would say there.
    likeliest = np.asarray(original.logits(original_hidden).argmax(-1))
    ids = SETS.copy()
    for at in map(tuple, np.argwhere(WEIGHTS < 0)):
        ids[at][:2] = (targets[at], likeliest[at])
    chosen = Chosen(
        jnp.asarray(rng.integers(0, VOCABULARY, (OUTPUTS, LENGTH)), jnp.int32),
        jnp.asarray([[1, 1, 0, 0, 0], [0] * 5, [1] * 5, [0] * 5], jnp.float32),
        states(),
        states(),
    )
    return Given(
        hidden=hidden,
        head=own,
        original_hidden=original_hidden if rival.original else hidden,
        original_head=original if rival.original else own,
        targets=jnp.asarray(targets),
        weights=jnp.asarray(WEIGHTS),
        edits=Edits(jnp.asarray(ids), jnp.zeros(ids.shape)) if sets else None,
        alpha=alpha,
        beta=0.7,
        options={**own.loss_options(), "z_loss": 0.0, "implementation": None, "skip_ignored": True},
        chosen=chosen,
    )


def rows(x):
    """Logits of the model and of the original, float32 [4, 5, 24]."""
    return x.head.logits(x.hidden), x.original_head.logits(x.original_hidden)


def log_softmax(z):
    return z - jax.nn.logsumexp(z, -1, keepdims=True)


def onehot(x):
    ids = x.targets[..., None] if x.edits is None else x.edits.ids
    return jax.nn.one_hot(ids, VOCABULARY).sum(-2) > 0


def at_target(x, z, targets=None):
    return jnp.take_along_axis(z, (x.targets if targets is None else targets)[..., None], -1)[
        ..., 0
    ]


def undial(x):
    z, r = rows(x)
    pushed = (x.weights < 0)[..., None]
    q = jax.nn.softmax(jnp.where(pushed & onehot(x), r - 0.7, r))
    loss = -(q * log_softmax(z)).sum(-1)
    return jnp.where(x.weights < 0, x.alpha * loss, loss)


def ceu(x):
    z, _ = rows(x)
    itself = jax.nn.softmax(jnp.where(onehot(x), -jnp.inf, jax.lax.stop_gradient(z)))
    return jnp.where(x.weights < 0, -x.alpha * (itself * log_softmax(z)).sum(-1), 0)


def unilogit(x):
    z, _ = rows(x)
    p = jax.nn.softmax(jax.lax.stop_gradient(z))
    others = jnp.where(onehot(x), 0, p)
    uniform = jnp.where(
        onehot(x), 1 / VOCABULARY, others / others.sum(-1, keepdims=True) * (1 - 1 / VOCABULARY)
    )
    kl = (jax.nn.softmax(z) * (log_softmax(z) - jnp.log(uniform))).sum(-1)
    return jnp.where(x.weights < 0, x.alpha * kl, 0)


def sums(x, z, targets, weights):
    return jnp.where(weights != 0, at_target(x, log_softmax(z), targets), 0).sum(-1)


def npo(x):
    z, r = rows(x)
    h = sums(x, z, x.targets, x.weights) - sums(x, r, x.targets, x.weights)
    of_output = 2 / 0.7 * jnp.log1p((jnp.exp(h)) ** 0.7)
    q = jax.nn.softmax(r)
    kl = (q * (log_softmax(r) - log_softmax(z))).sum(-1)
    return jnp.where((x.weights < 0).any(-1)[:, None], x.alpha * of_output[:, None], kl)


def dpo(x):
    z, r = rows(x)
    targets, weights, hidden, original_hidden = x.chosen
    chosen, ref_chosen = x.head.logits(hidden), x.original_head.logits(original_hidden)
    h_chosen = sums(x, chosen, targets, weights) - sums(x, ref_chosen, targets, weights)
    h = sums(x, z, x.targets, x.weights) - sums(x, r, x.targets, x.weights)
    of_pair = jnp.log1p(jnp.exp(-0.7 * (h_chosen - h)))
    return jnp.where((x.weights < 0).any(-1)[:, None], x.alpha * of_pair[:, None], 0)


def ftpo(x):
    """As the authors' trainer has it, row by row; which tokens are chosen is ours."""
    z, r = rows(x)
    of_margin, shares, of_others, others, of_free, free = ([] for _ in range(6))
    for at in map(tuple, np.argwhere(WEIGHTS < 0)):
        y = int(x.targets[at])
        named = {y} if x.edits is None else {y, *map(int, x.edits.ids[at])} - {-1}
        q = np.array(jax.nn.softmax(r[at]))
        q[list(named)] = 0
        chosen = [int(i) for i in np.argsort(-q, kind="stable")[:8] if q[i] >= 0.05 * q.max()]
        delta = z[at][np.array(chosen)] - z[at][y]
        share = jnp.clip((2 - delta) / 2, 0, 1)
        share = jnp.where(share.sum() < 1e-12, 1.0, share)
        of_margin.append((share * jnp.log1p(jnp.exp(2 - delta))).sum())
        shares.append(share.sum())
        moved = z[at] - r[at]
        targets = np.array([*chosen, y])
        rest = np.setdiff1d(np.arange(VOCABULARY), targets)
        of_others.append((moved[rest] ** 2).sum())
        others.append(len(rest))
        of_free.append((jnp.maximum(jnp.abs(moved[targets]) - 1, 0) ** 2).sum())
        free.append(len(targets))
    loss = (
        sum(of_margin) / sum(shares)
        + 0.4 * sum(of_others) / sum(others)
        + 0.05 * sum(of_free) / sum(free)
    )
    return jnp.where(x.weights < 0, x.alpha * loss, 0)


FORMULAS = {f.__name__: f for f in (undial, ceu, unilogit, npo, dpo, ftpo)}


def value_and_gradient(loss, x, compiled=jax.jit):
    """The losses, and what their sum, each token with another factor, has for derivatives."""
    factors = jnp.linspace(1, 2, OUTPUTS * LENGTH).reshape(OUTPUTS, LENGTH)
    rival = x.original_head.kernel is not x.head.kernel

    def total(hidden, kernel, chosen):
        y = x._replace(
            hidden=hidden,
            head=x.head._replace(kernel=kernel),
            chosen=x.chosen._replace(hidden=chosen),
        )
        if not rival:
            y = y._replace(original_hidden=hidden, original_head=y.head)
        losses = jnp.where(x.weights != 0, loss(y), 0)
        return (losses * factors).sum(), losses

    arguments = (x.hidden, x.head.kernel, x.chosen.hidden)
    gradients, losses = compiled(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arguments)
    return losses, gradients


@pytest.mark.parametrize(
    ("name", "sets"),
    [slow_unless(sets == RIVALS[name].sets, name, sets)
     for name in RIVALS for sets in (False, True) if not sets or RIVALS[name].sets],
)  # fmt: skip
def test_a_method_is_its_formula(name, sets):
    assert FORMULAS.keys() == RIVALS.keys()
    x = given(name, sets=sets)
    got = value_and_gradient(lambda y: RIVALS[name].loss(y).loss, x)
    # Which tokens are chosen, a formula may ask of the numbers.
    as_it_is = (lambda f: f) if name == "ftpo" else jax.jit
    want = value_and_gradient(FORMULAS[name], x, as_it_is)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert np.abs(jax.tree.leaves(got)[1]).max() > 1e-3
    # What is said of tokens is what the kernels say.
    z, _ = rows(x)
    told = RIVALS[name].loss(x)
    pushed = WEIGHTS < 0
    np.testing.assert_allclose(
        np.asarray(told.log_prob)[pushed], np.asarray(at_target(x, log_softmax(z)))[pushed],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    best = np.asarray(z.argmax(-1) == x.targets)
    np.testing.assert_array_equal(np.asarray(told.correct)[pushed], best[pushed])
    assert not np.asarray(told.loss)[WEIGHTS == 0].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_the_formulas_differ_by_what_they_are_given(name):
    """A control: alpha, beta and the sets each change the loss where they are said to."""
    x = given(name, sets=RIVALS[name].sets)
    now = np.asarray(RIVALS[name].loss(x).loss)
    assert not np.allclose(now, RIVALS[name].loss(x._replace(alpha=1.0)).loss)
    by_beta = np.allclose(now, RIVALS[name].loss(x._replace(beta=2.0)).loss)
    assert by_beta == (RIVALS[name].beta is None)
    by_sets = np.allclose(now, RIVALS[name].loss(x._replace(edits=None)).loss)
    assert by_sets != RIVALS[name].sets


@pytest.mark.slow
def test_a_sure_model_has_a_finite_loss_and_gradient():
    """Of a token of which the model is sure there is nothing left in float32."""
    for name in RIVALS:
        x = given(name)
        kernel = x.head.kernel * 60
        y = x._replace(head=x.head._replace(kernel=kernel))
        best = y.head.logits(y.hidden).argmax(-1)
        if not RIVALS[name].original:
            y = y._replace(original_head=y.head)
        y = y._replace(targets=best)
        told, gradients = value_and_gradient(lambda y, n=name: RIVALS[n].loss(y).loss, y)
        assert np.isfinite(told).all(), name
        assert all(np.isfinite(g).all() for g in gradients), name
        assert np.abs(gradients[0]).max() > 0.1, name


def corrected():
    return [
        dataclasses.replace(e, corrected="a fire in the area" if any(e.marked) else None)
        for e in test_train.examples()
    ]


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.z_loss])
def test_a_z_loss_is_added_and_changes_nothing_else(name):
    x = given(name)
    with_it = RIVALS[name].loss(x._replace(options={**x.options, "z_loss": 0.1}))
    assert np.asarray(with_it.z_loss)[WEIGHTS < 0].min() > 0.01
    np.testing.assert_allclose(
        with_it.loss - with_it.z_loss, RIVALS[name].loss(x).loss, rtol=1e-4, atol=1e-5
    )


def test_pairs_have_their_corrections_and_outputs_without_marks_have_none():
    arrays = pair_arrays(corrected(), tokenizer(), pad_id=0)
    ids = (*tokenizer().encode("a fire in the area").ids, tokenizer().eos_id)
    assert arrays["chosen"].shape == arrays["outputs"].shape
    for row, e in enumerate(corrected()):
        count = int(arrays["chosen_weights"][row].sum())
        assert count == (len(ids) if any(e.marked) else 0)
        if count:
            assert tuple(arrays["chosen"][row][:count]) == ids
    with pytest.raises(ValueError, match="have marked tokens and no correction"):
        pair_arrays(test_train.examples(), tokenizer(), pad_id=0)
    # A correction that is longer than all outputs of a batch is not cut off.
    long = dataclasses.replace(corrected()[0], corrected="a fire in the area " * 8)
    arrays = pair_arrays([long, example("news", "the mayor " * 40)], tokenizer(), pad_id=0)
    settings = TrainSettings(objective="dpo", steps=1, batch_size=1)
    batch = Batches(arrays, settings, 0, np.array([0])).at(0)
    assert batch["chosen_weights"].sum() == arrays["chosen_weights"][0].sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_a_model_is_trained_with_a_method(name, tmp_path):
    model = tiny_model()
    if name == "dpo":
        arrays = pair_arrays(corrected(), tokenizer(), pad_id=0)
    else:
        arrays = to_arrays(corrected(), pad_id=0)
    settings = TrainSettings(objective=name, steps=8, batch_size=4, learning_rate=1e-2)
    trained = train(model, tiny_params(), arrays, settings, tmp_path / "run")
    assert trained.history["marked"] == [float((arrays["weights"] < 0).sum())] * 8

    def pushed(params):
        told = token_loss(tiny_model(), params, tiny_params(), arrays, settings)
        return float(np.asarray(told.log_prob)[arrays["weights"] < 0].mean())

    after, before = pushed(trained.params), pushed(tiny_params())
    if name == "unilogit":
        assert abs(after + math.log(330)) < 0.3 < abs(before + math.log(330))
    else:
        assert after < before - 0.01
    if RIVALS[name].original:
        with pytest.raises(ValueError, match=f"{name} needs the parameters of the original"):
            token_loss(model, tiny_params(), None, arrays, settings)


def test_what_a_method_has_no_use_for_is_refused(tmp_path):
    assert set(WITH_ORIGINAL) == {*TARGETED_NEGATIVE, "undial", "npo", "dpo", "ftpo"}
    assert not {"ceu", "unilogit", "dpo", "ftpo"} & set(KEEPING)
    for name in NO_SETS:
        with pytest.raises(NotImplementedError, match=f"{name} pushes down one token"):
            TrainSettings(objective=name, negatives=2)
    for objective, beta in (("tnff", 0.1), ("ceu", 0.1), ("npo", 0.0), ("npo", math.nan)):
        with pytest.raises(ValueError, match=rf"beta is {beta} and the objective {objective}"):
            TrainSettings(objective=objective, beta=beta)
    with pytest.raises(NotImplementedError, match="npo has no z-loss"):
        TrainSettings(objective="npo", z_loss=1e-4)
    settings = TrainSettings(objective="dpo", steps=1, batch_size=1)
    arrays = to_arrays(test_train.examples(), pad_id=0)
    with pytest.raises(ValueError, match="the arrays have none: make them with pair_arrays"):
        train(tiny_model(), tiny_params(), arrays, settings, tmp_path)
    arrays = pair_arrays(corrected(), tokenizer(), pad_id=0)
    with pytest.raises(NotImplementedError, match="dpo runs the original on the corrections"):
        Step(tiny_model(), settings, arrays, cached="float32")
    with pytest.raises(ValueError, match="ceu keeps to no original model"):
        Step(tiny_model(), dataclasses.replace(settings, objective="ceu"), arrays, cached="float32")
