"""The T5X models: T5Patches' numbers where they are right, and each defect that they had."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5x_stack as stack
from t5x_stack import OURS, TARGETED, model, on_both, one_row

import t5patches_kernels

pytestmark = pytest.mark.filterwarnings("ignore")  # T5X's own

ROW = [[2.0, 1.0, 0.0, -1.0], [0.5, 3.0, 0.0, 1.0], [0.0, 0.0, 2.0, 1.0]]
REF = [[1.0, 1.5, 0.0, -1.0], [0.0, 2.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]]


@pytest.fixture(autouse=True)
def _strict_jax():
    """T5X promotes as it likes."""


def loss_of(made, tokens, params, *original):
    return float(made.loss_fn(params, tokens, None, *original)[0])


def originals(name, params):
    """The arguments that only the targeted models take."""
    return (params,) if name in TARGETED else ()


# --- Upstream's defects, by their numbers in the notes -------------------------------------------


@on_both
@pytest.mark.parametrize("name", TARGETED)
def test_1_alpha_counts(library, name):
    tokens, params = one_row(ROW, [0, 1, 2], [-1, -1, -1])
    _, ref = one_row(REF, [0, 1, 2], [-1, -1, -1])
    at = [loss_of(model(library(), name, alpha=a), tokens, params, ref) for a in (1.0, 2.0)]
    assert at[1] == pytest.approx(2 * at[0], rel=1e-6)


@on_both
@pytest.mark.parametrize("name", ["TNFF", "TNFLL"])
def test_5_an_original_that_is_sure_of_the_negative(library, name):
    """A lead of 90: the rest of the mass, renormalised, is the target all the same."""
    r = np.array([90.0, 1.0, 0.0, -1.0])
    tokens, params = one_row([ROW[0]], [0], [-1])
    _, ref = one_row([r], [0], [-1])
    made = model(library(), name)
    made.alpha = 1.0  # its alpha is another defect
    slope = jax.grad(lambda p: made.loss_fn(p, tokens, None, ref)[0])(params)["logits"][0, 0]
    q = np.exp(r - 1) * np.array([0, 1, 1, 1])
    np.testing.assert_allclose(slope, jax.nn.softmax(jnp.array(ROW[0])) - q / q.sum(), atol=1e-6)


@on_both
@pytest.mark.parametrize("name", TARGETED)
def test_5_a_masked_entry(library, name):
    masked = np.array(ROW)
    masked[:, 3] = -np.inf
    tokens, params = one_row(masked, [0, 1, 2], [1, -1, 1])
    assert np.isfinite(loss_of(model(library(), name), tokens, params, params))


@on_both
@pytest.mark.parametrize("name", TARGETED)
def test_5_padding_cannot_poison_the_loss(library, name):
    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, 0])
    bad = np.array(REF)
    bad[2] = np.nan
    assert np.isfinite(loss_of(model(library(), name), tokens, params, one_row(bad, [0], [0])[1]))


@on_both
@pytest.mark.parametrize("name", ["TNFF", "TNRF", "TNFLL", "TNRLL"])
def test_6_a_weight_below_minus_one_removes_too(library, name):
    losses = []
    for w in (-1, -5):
        tokens, params = one_row(ROW, [0, 1, 2], [1, w, w])
        _, ref = one_row(REF, [0], [0])
        losses.append(loss_of(model(library(), name), tokens, params, ref))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@on_both
def test_7_the_original_does_not_drop(library):
    made = model(library(), "TNFF")
    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, 1])
    made.loss_fn(params, tokens, jax.random.key(0), params)
    student, teacher = made.module.calls
    assert student["enable_dropout"]
    assert not teacher["enable_dropout"]


def test_7_it_drops_where_asked_to():
    made = model(OURS, "TNFF", teacher_dropout=True)
    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, 1])
    made.loss_fn(params, tokens, jax.random.key(0), params)
    assert all(call["enable_dropout"] for call in made.module.calls)


@on_both
@pytest.mark.parametrize("name", stack.NAMES)
@pytest.mark.parametrize(
    "option", [{"z_loss": 0.1}, {"loss_normalizing_factor": 4.0}], ids=lambda x: next(iter(x))
)
def test_8_these_options_count(library, name, option):
    library = library()
    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, 1])
    plain, changed = (
        loss_of(model(library, name, **o), tokens, params, *originals(name, params))
        for o in ({}, option)
    )
    if "z_loss" in option:
        part = 0.1 * float(jnp.sum(jax.nn.logsumexp(jnp.array(ROW), axis=-1) ** 2))
        # alpha is a factor of the objective, not of what steadies training
        assert changed == pytest.approx(plain + part, rel=1e-5)
    else:
        assert changed == pytest.approx(plain / 4, rel=1e-6)


@on_both
def test_8_a_label_smoothing_without_a_meaning_raises(library):
    library = library()
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 has no meaning"):
        model(library, "TNFF", label_smoothing=0.1)


@on_both
def test_9_a_score_without_an_original_says_what_to_do(library):
    made = model(library(), "TNFF")
    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, 1])
    for f in (made.score_batch, made.eval_fn):
        with pytest.raises(ValueError, match=r"original_path to the original_params"):
            f(params, tokens)


@on_both
def test_10_the_smoothing_can_be_made_small(library):
    """At V = 32128, 1e-6 a token is 3% of the mass: TNRR is 0.02 where nothing has changed."""
    logits = jnp.zeros((1, 32128)).at[0, 5].set(15.0)
    tokens, params = one_row(logits, [5], [1])
    made = model(library(), "TNRR", smoothing=1e-10)
    assert abs(loss_of(made, tokens, params, params)) < 1e-4


@on_both
def test_11_metrics_count_tokens_by_their_kind(library):
    """Predicting a negative token is no accuracy, and tokens do not cancel out."""
    tokens, params = one_row(ROW, [0, 1, 0], [1, -1, 1])  # the third is wrong
    _, metrics = model(library(), "UL").loss_fn(params, tokens, None)
    assert float(metrics["accuracy"].compute()) == pytest.approx(0.5)
    count = metrics["loss_per_nonpadding_target_token"].count
    assert float(count) == 3


@on_both
def test_12_nl_holds_pushed_down_tokens_and_not_kept_ones(library):
    made = model(library(), "NL", alpha=1.0)
    logits = [[-20.0, 0.0, 0.0, 0.0]] * 2  # the target is all but impossible
    tokens, params = one_row(logits, [0, 0], [1, -1])
    slope = jax.grad(lambda p: made.loss_fn(p, tokens, None)[0])(params)["logits"][0]
    assert slope[0, 0] == pytest.approx(-1, abs=1e-3)
    assert (slope[1] == 0).all()


@on_both
def test_12_ul_still_pushes_where_the_model_is_sure(library):
    made = model(library(), "UL", alpha=1.0)
    tokens, params = one_row([[30.0, 0.0, 0.0, 0.0]], [0], [-1])
    slope = jax.grad(lambda p: made.loss_fn(p, tokens, None)[0])(params)["logits"][0, 0]
    np.testing.assert_allclose(slope, [1.0, -1 / 3, -1 / 3, -1 / 3], atol=1e-5)


class WithCounter(stack.GivenLogits):
    """A network with a collection that every call changes."""

    def apply(self, variables, *args, mutable=False, **kwargs):
        logits = variables["params"]["logits"]
        return logits, {"counters": {"seen": variables["counters"]["seen"] + 1}}


@on_both
@pytest.mark.parametrize("parts", [1, 2])
def test_14_flax_mutables(library, parts):
    """Through the trainer's own function, as a step has it."""
    library = library()
    made = model(library, "TNFF", WithCounter())
    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, 1])
    rows = jax.tree.map(lambda x: jnp.repeat(x, parts, axis=0), tokens)
    state = stack.State(params, {"counters": {"seen": jnp.zeros((), jnp.int32)}})
    _, _, mutables = library.trainer.accumulate_grads_microbatched(
        made, state, rows, jax.random.key(0), parts, orig_train_state=state
    )
    assert mutables["counters"]["seen"] == parts
    assert library.trainer.eval_step(made, state, tokens, state).keys() >= {"loss"}


@on_both
@pytest.mark.parametrize("name", ["UL", *TARGETED])
def test_14_intermediates_have_the_token_scores(library, name):
    made = model(library(), name)
    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, 0])
    options = {"orig_params": params} if name in TARGETED else {}
    scores, seen = made.score_batch(params, tokens, return_intermediates=True, **options)
    (token_scores,) = seen["decoder"]["token_scores"]
    assert token_scores.shape == (1, 3)
    np.testing.assert_allclose(token_scores.sum(-1), scores, rtol=1e-6)


# --- What there is -------------------------------------------------------------------------------


def test_every_objective_has_its_classes():
    targeted = OURS.models.SelfDistillationModel.__subclasses__()
    assert tuple(c.OBJECTIVE for c in targeted) == t5patches_kernels.TARGETED_NEGATIVE
    for network in ("EncoderDecoderModel", "DecoderOnlyModel"):
        classes = {name for name in vars(OURS.models) if name.startswith(network)}
        assert classes == {network, *(f"{network}{name}" for name in stack.NAMES)}


@pytest.mark.parametrize(
    ("public", "room"),
    [(f"t5patches.{name}", f"t5patches.t5x.{name}")
     for name in ("models", "trainer", "feature_converters", "feature_converters_utils",
                  "cache_teacher")]
    + [(f"t5patches.{name}", f"t5patches.model.t5.{name}") for name in ("network", "layers")],
)  # fmt: skip
def test_a_public_module_is_the_one_in_its_room(public, room):
    """What is patched in the one, as T5Patches' own tests do, is patched in the other."""
    assert importlib.import_module(public) is importlib.import_module(room)


# --- What the models do beyond upstream's ---------------------------------------------------------


def test_metrics_by_kind():
    tokens, params = one_row(ROW, [0, 1, 0], [1, -1, 1])
    _, ref = one_row(REF, [0], [0])
    loss, metrics = model(OURS, "TNFF", alpha=2.0).eval_fn(params, tokens, ref)
    value = {name: float(m.compute()) for name, m in metrics.items() if "tive/" in name}
    log_p = jax.nn.log_softmax(jnp.array(ROW))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(jnp.array(REF))), axis=-1)
    assert value["positive/tokens"] == 2
    assert value["negative/tokens"] == 1
    assert value["positive/accuracy"] == 0.5
    assert value["negative/prevalence"] == 1
    assert value["negative/log_prob"] == pytest.approx(float(log_p[1, 1]), rel=1e-6)
    assert value["positive/kl"] == pytest.approx(float(kl[0] + kl[2]) / 2, rel=1e-5)
    assert value["negative/kl"] == pytest.approx(float(kl[1]), rel=1e-5)
    total = 2 * value["positive/loss"] + value["negative/loss"]
    assert total == pytest.approx(float(loss), rel=1e-6)


def test_the_training_step_looks_at_no_kl():
    """It would be one more pass over both models' logits."""
    tokens, params = one_row(ROW, [0, 1, 0], [1, -1, 1])
    _, metrics = model(OURS, "TNFF").loss_fn(params, tokens, None, params)
    assert not [name for name in metrics if name.endswith("kl")]


@pytest.mark.parametrize("weights", [[1, 0, 1], [1, 0.5, 0], [1, 2, 3]])
def test_cross_entropy_is_t5xs(weights):
    """Loss, z-loss, metrics and scores, with every option that T5X has."""
    tokens, params = one_row(ROW, [0, 1, 0], [0, 0, 0])
    tokens["decoder_loss_weights"] = jnp.asarray([weights], jnp.float32)
    for options in (
        {},
        {"z_loss": 0.1, "label_smoothing": 0.2},
        {"loss_normalizing_factor": "NUM_REAL_TARGET_TOKENS"},
        {"loss_normalizing_factor": "AVERAGE_PER_SEQUENCE"},
    ):
        ours, theirs = (model(lib, "", **options) for lib in (OURS, stack.T5X))
        a, b = (m.loss_fn(params, tokens, None) for m in (ours, theirs))
        assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-5), options
        assert a[1].keys() >= b[1].keys()
        if "AVERAGE" not in str(options):  # T5X then masks its metrics by fractions
            for name in (
                "accuracy",
                "loss_per_nonpadding_target_token",
                "non_padding_fraction/loss_weights",
                "z_loss",
            ):
                mine, its = (float(m[1][name].compute()) for m in (a, b))
                assert mine == pytest.approx(its, rel=1e-5), name
        scores = [m.score_batch(params, tokens) for m in (ours, theirs)]
        np.testing.assert_allclose(*scores, rtol=1e-5)


@pytest.mark.parametrize("factor", ["NUM_REAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"])
@pytest.mark.parametrize("name", ["", "UL", "TNFF"])
def test_a_batch_of_ignored_tokens_adds_nothing(name, factor):
    tokens, params = one_row(ROW, [0, 1, 2], [0, 0, 0])
    made = model(OURS, name, z_loss=0.1, loss_normalizing_factor=factor)
    step = jax.value_and_grad(made.loss_fn, has_aux=True)
    (loss, metrics), grads = step(params, tokens, None, *originals(name, params))
    assert loss == metrics["loss"].compute() == metrics["z_loss"].compute() == 0
    assert not grads["logits"].any()


def test_sets_of_negatives():
    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, -1])
    _, ref = one_row(REF, [0], [0])
    ids = jnp.array([[[-1, -1], [1, 3], [2, -1]]], jnp.int32)
    factors = jnp.where(ids >= 0, 0.0, 1.0)
    tokens |= {"negative_ids": ids, "negative_factors": factors}
    expected = t5patches_kernels.targeted_negative_loss(
        params["logits"],
        ref["logits"],
        tokens["decoder_target_tokens"],
        tokens["decoder_loss_weights"].astype(jnp.float32),
        objective="tnrr",
        alpha=1e4,  # T5Patches' own
        edits=t5patches_kernels.Edits(ids, factors),
    )
    got = loss_of(model(OURS, "TNRR"), tokens, params, ref)
    assert got == pytest.approx(float(expected.loss.sum()), rel=1e-6)
    for name in ("NL", ""):
        with pytest.raises(NotImplementedError, match="one token a position"):
            model(OURS, name).loss_fn(params, tokens, None)
    del tokens["negative_factors"]
    with pytest.raises(ValueError, match="no negative_factors"):
        model(OURS, "TNRR").loss_fn(params, tokens, None, ref)


@functools.cache
def network_and_params():
    module = stack.tiny_network(dropout_rate=0.1)
    made = model(OURS, "TNFF", module)
    shapes = {name: x.shape for name, x in stack.batch().items()}
    types = dict.fromkeys(shapes, jnp.int32)
    variables = made.get_initial_variables(jax.random.key(0), shapes, types)
    params = dict(variables["params"])
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    moved = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params)
    return module, params, moved


@pytest.mark.parametrize("name", ["", *stack.NAMES])
def test_a_fused_head_makes_the_same_step_without_logits(name):
    module, original, params = network_and_params()
    tokens, results = stack.batch(rows=4), []
    tokens["decoder_loss_weights"] = tokens["decoder_loss_weights"].clip(0 if name == "" else -1)
    for fused in (False, True):
        made = model(OURS, name, module, fused_head=fused)

        def loss(p, made=made):
            return made.loss_fn(p, tokens, jax.random.key(2), *originals(name, original))

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
        logits = "f32[4,6,64]" in str(jax.make_jaxpr(jax.grad(lambda p: loss(p)[0]))(params))
        assert logits != fused
    (a, seen_a), slope_a = results[0]
    (b, seen_b), slope_b = results[1]
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    assert seen_a.keys() == seen_b.keys()
    for x, y in zip(jax.tree.leaves(slope_a), jax.tree.leaves(slope_b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


def test_hidden_states_computed_beforehand():
    """The same loss as with the original run beside the model."""
    module, original, params = network_and_params()
    tokens = stack.batch(rows=4)
    made = model(OURS, "TNFF", module, fused_head=True)
    (hidden, _), _, _ = made._outputs(original, tokens, None)
    cached = tokens | {"original_hidden": np.asarray(hidden)}
    losses = [float(made.loss_fn(params, b, None, original)[0]) for b in (tokens, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(ValueError, match="need fused_head=True"):
        model(OURS, "TNFF", module).loss_fn(params, cached, None, original)


def test_a_fused_head_needs_hidden_states():
    with pytest.raises(NotImplementedError, match=r"use t5patches\.network\.Transformer"):
        model(OURS, "TNFF", stack.GivenLogits(), fused_head=True)


@pytest.mark.parametrize("name", ["", "UL", "TNFF"])
def test_predict(name):
    module, _, params = network_and_params()
    tokens = {k: jnp.asarray(v) for k, v in stack.batch(rows=2, length=4).items()}
    ours = model(OURS, name, module).predict_batch(params, tokens)
    theirs = model(stack.T5X, "", module).predict_batch(params, tokens)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["", *stack.NAMES])
def test_decoder_only_twins(name):
    """Loss, score and prediction on T5X's decoder-only network."""
    made, t5x = (stack.decoder_only(lib, n) for lib, n in ((OURS, name), (stack.T5X, "")))
    tokens = stack.decoder_only_batch()
    tokens["decoder_loss_weights"] = tokens["decoder_loss_weights"].clip(0 if name == "" else -1)
    shapes = {k: v.shape for k, v in tokens.items()}
    params = t5x.get_initial_variables(jax.random.key(0), shapes, dict.fromkeys(shapes, jnp.int32))[
        "params"
    ]
    loss, metrics = made.loss_fn(params, tokens, None, *originals(name, params))
    assert np.isfinite(loss)
    assert metrics["positive/tokens"].total == (tokens["decoder_loss_weights"] > 0).sum()
    options = {"orig_params": params} if name in TARGETED else {}
    score = made.score_batch(params, tokens, **options)
    np.testing.assert_allclose(score.sum(), -loss, rtol=1e-5)
    if name == "":
        np.testing.assert_allclose(score, t5x.score_batch(params, tokens), rtol=1e-5)
        predicted = [m.predict_batch(params, tokens, jax.random.key(1)) for m in (made, t5x)]
        np.testing.assert_array_equal(*predicted)


def test_a_score_finds_its_original_by_its_path(tmp_path):
    """As T5X's infer has it: jitted, and with nothing but parameters and a batch."""
    from t5patches.t5x import original

    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, 1])
    _, ref = one_row(REF, [0], [0])
    original.load_or_save(tmp_path, ref)
    made = model(OURS, "TNFF", original_path=str(tmp_path / "original_params"))
    given = made.score_batch(params, tokens, orig_params=ref)
    np.testing.assert_allclose(jax.jit(made.score_batch)(params, tokens), given, rtol=1e-6)


def test_it_finds_its_original_in_both_of_t5xs_formats(tmp_path):
    from t5patches.t5x import original

    trained = model(OURS, "TNFF", stack.tiny_network())
    parts = stack.partitioner()
    state, _ = stack.initial_state(trained, parts)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    saver = stack.checkpoints.Checkpointer(shapes, parts, str(tmp_path / "first"))
    saver.save(state)
    manager = stack.checkpoints.OrbaxCheckpointManagerInterface(
        str(tmp_path), shapes, parts, period=1
    )
    manager.save(state)
    manager.close()
    for folder in (tmp_path / "first" / "checkpoint_0", tmp_path / "checkpoint_0"):
        for on_host in (True, False):
            found = original.load(folder, state.params, on_host=on_host)
            jax.tree.map(np.testing.assert_array_equal, found, state.params)


def test_without_weights_it_says_what_is_needed():
    tokens, params = one_row(ROW, [0, 1, 2], [1, -1, 1])
    del tokens["decoder_loss_weights"]
    with pytest.raises(ValueError, match="no decoder_loss_weights"):
        model(OURS, "UL").loss_fn(params, tokens, None)
