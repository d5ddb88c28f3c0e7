"""The network against the original library, against T5X, and against itself done otherwise."""

import dataclasses
import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_folders
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5patches import layers
from t5patches.network import T5Config, Transformer, output_head

TINY = T5Config(
    vocab_size=12,
    emb_dim=8,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    head_dim=3,
    mlp_dim=10,
    mlp_activations=("gelu", "linear"),
)
TIED = dataclasses.replace(TINY, logits_via_embedding=True, mlp_activations=("relu",))
INPUTS = np.array([[5, 6, 7, 1], [8, 1, 0, 0]])
TARGETS = np.array([[3, 4, 1], [9, 1, 0]])
# Compiles several times faster than the default generator.
RNG = jax.random.key(0, impl="rbg")


def init(model, rng):
    ids = jnp.ones((1, 4), jnp.int32)
    return model.init(rng, ids, ids, ids, enable_dropout=False)


def lively(config):
    """Parameters far from their initial values: scales of norms around 1, the rest around 0."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        return jnp.asarray(0.5 * rng.normal(size=x.shape) + (path[-1].key == "scale"), x.dtype)

    shapes = jax.eval_shape(functools.partial(init, Transformer(config)), RNG)
    return jax.tree.map_with_path(draw, shapes["params"])


# Against the original library.


@pytest.mark.parametrize("batch", ["", "long_"])
@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_logits_are_those_of_the_original_library(name, batch):
    model, params, expected = t5_folders.load(name)
    targets = expected[batch + "targets"]
    got = t5_folders.logits(model.config, params, expected[batch + "inputs"], targets)
    real = targets > 0
    np.testing.assert_allclose(got[real], expected[batch + "logits"][real], rtol=0, atol=1e-4)


# Against T5X.


@pytest.fixture
def t5x_network():
    reason = "t5x is on no package index: put a source checkout on PYTHONPATH to compare with it"
    # T5X relies on implicit promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield pytest.importorskip("t5x.examples.t5.network", reason=reason)


def t5xs(config, theirs):
    """The fields that T5X's class has; it computes with the defaults of the others."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(theirs)}


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_t5x_has_the_same_tree_values_and_axes(t5x_network, config):
    theirs = t5x_network.Transformer(t5x_network.T5Config(**t5xs(config, t5x_network.T5Config)))
    expected = jax.jit(functools.partial(init, theirs))(RNG)
    got = jax.jit(functools.partial(init, Transformer(config)))(RNG)
    jax.tree.map(np.testing.assert_array_equal, got, flax.core.unfreeze(expected))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_t5x_gives_the_same_logits(t5x_network, config, dtype, dropout):
    config = dataclasses.replace(config, dtype=dtype)
    theirs = t5x_network.Transformer(t5x_network.T5Config(**t5xs(config, t5x_network.T5Config)))
    call = [{"params": lively(config)}, INPUTS, t5_folders.shift_right(TARGETS), TARGETS]
    options = {"enable_dropout": dropout, "rngs": {"dropout": RNG}}
    got = Transformer(config).apply(*call, **options)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(got, theirs.apply(*call, **options), rtol=0, atol=tolerance)


def test_the_parameter_tree_is_t5xs():
    """What a T5X checkpoint names, written down for where T5X is not at hand."""
    norm, own = {"scale": ((8,), ("embed",))}, {"kernel": ((8, 6), ("embed", "joined_kv"))}
    out = {"kernel": ((6, 8), ("joined_kv", "embed"))}
    attention = {"query": own, "key": own, "value": own, "out": out}
    wi, wo = {"kernel": ((8, 10), ("embed", "mlp"))}, {"kernel": ((10, 8), ("mlp", "embed"))}
    mlp = {"wi_0": wi, "wi_1": wi, "wo": wo}
    encoder_layer = {
        "pre_attention_layer_norm": norm,
        "attention": attention,
        "pre_mlp_layer_norm": norm,
        "mlp": mlp,
    }
    decoder_layer = {
        "pre_self_attention_layer_norm": norm,
        "self_attention": attention,
        "pre_cross_attention_layer_norm": norm,
        "encoder_decoder_attention": attention,
        "pre_mlp_layer_norm": norm,
        "mlp": mlp,
    }
    positions = {"rel_embedding": ((2, 32), ("heads", "relpos_buckets"))}
    expected = {
        "token_embedder": {"embedding": ((12, 8), ("vocab", "embed"))},
        "encoder": {
            "relpos_bias": positions,
            "layers_0": encoder_layer,
            "encoder_norm": norm,
        },
        "decoder": {
            "relpos_bias": positions,
            "layers_0": decoder_layer,
            "layers_1": decoder_layer,
            "decoder_norm": norm,
            "logits_dense": {"kernel": ((8, 12), ("embed", "vocab"))},
        },
    }
    variables = jax.eval_shape(functools.partial(init, Transformer(TINY)), RNG)
    shapes = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    axes = flax.traverse_util.flatten_dict(variables["params_axes"], sep="/")
    got = {name: (x.shape, tuple(axes[f"{name}_axes"].names)) for name, x in shapes.items()}
    assert got == flax.traverse_util.flatten_dict(expected, sep="/")
    assert {x.dtype for x in shapes.values()} == {jnp.dtype(jnp.float32)}


def test_initial_values_have_t5xs_spread():
    config = dataclasses.replace(TINY, vocab_size=512, emb_dim=256, head_dim=64, mlp_dim=512)
    params = jax.jit(functools.partial(init, Transformer(config)))(RNG)["params"]
    layer = params["decoder"]["layers_0"]
    spreads = [
        (params["token_embedder"]["embedding"], 1.0),
        (layer["self_attention"]["query"]["kernel"], (256 * 64) ** -0.5),
        (layer["self_attention"]["key"]["kernel"], 256**-0.5),
        (layer["self_attention"]["out"]["kernel"], 128**-0.5),
        (layer["mlp"]["wi_0"]["kernel"], 256**-0.5),
        (layer["mlp"]["wo"]["kernel"], 512**-0.5),
        (params["decoder"]["logits_dense"]["kernel"], 256**-0.5),
        (params["decoder"]["relpos_bias"]["rel_embedding"], ((2 + 32) / 2) ** -0.5),
    ]
    for values, spread in spreads:
        few = 0.2 if values.size < 1000 else 0.03
        np.testing.assert_allclose(np.std(values), spread, rtol=few)
    assert np.all(layer["pre_mlp_layer_norm"]["scale"] == 1)


# Against itself.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_the_head_turns_hidden_states_into_the_logits(config, dtype):
    config = dataclasses.replace(config, dtype=dtype)
    params = lively(config)

    @jax.jit
    def both(params):
        call = functools.partial(t5_folders.apply, config, params, INPUTS, TARGETS)
        return call(return_hidden=True), call()

    hidden, expected = both(params)
    assert (hidden.dtype, expected.dtype) == (dtype, jnp.float32)
    head = output_head(config, params)
    kernel = head.kernel.T if head.transposed else head.kernel
    got = head.logit_scale * jnp.dot(hidden.astype(jnp.float32), kernel)
    # In bfloat16 the compiler may keep more digits of hidden states that it need not return.
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_a_packed_row_gives_the_logits_of_its_examples():
    params = lively(TINY)
    alone = [
        t5_folders.logits(TINY, params, INPUTS[i : i + 1], TARGETS[i : i + 1])[0] for i in (0, 1)
    ]
    packed = jax.jit(functools.partial(Transformer(TINY).apply, enable_dropout=False))(
        {"params": params},
        jnp.array([[5, 6, 7, 1, 8, 1, 0]]),
        jnp.array([[0, 3, 4, 0, 9, 0]]),
        jnp.array([[3, 4, 1, 9, 1, 0]]),
        encoder_segment_ids=jnp.array([[1, 1, 1, 1, 2, 2, 0]]),
        decoder_segment_ids=jnp.array([[1, 1, 1, 2, 2, 0]]),
        encoder_positions=jnp.array([[0, 1, 2, 3, 0, 1, 0]]),
        decoder_positions=jnp.array([[0, 1, 2, 0, 1, 0]]),
    )[0]
    np.testing.assert_allclose(packed[:3], alone[0], atol=1e-5)
    np.testing.assert_allclose(packed[3:5], alone[1][:2], atol=1e-5)


def test_padding_on_either_side_changes_nothing():
    params = lively(TINY)
    wide = [np.pad(x, ((0, 0), (0, 3))) for x in (INPUTS, TARGETS)]
    got = t5_folders.logits(TINY, params, *wide)[:, :3]
    expected = t5_folders.logits(TINY, params, INPUTS, TARGETS)
    np.testing.assert_allclose(got[TARGETS > 0], expected[TARGETS > 0], atol=1e-5)


def test_a_row_of_padding_has_a_finite_gradient():
    def total(params):
        nothing = np.zeros((1, 3), int)
        return jnp.sum(t5_folders.apply(TINY, params, nothing, nothing))

    gradient = jax.jit(jax.grad(total))(lively(TINY))
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), gradient))


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_decoding_step_by_step_gives_the_logits_of_one_pass(config):
    """The protocol of T5X: allocate with `decode=True`, then one position at a time."""
    params, targets = lively(config), np.array([[3, 4, 9, 5], [9, 2, 7, 6]])
    expected = t5_folders.logits(config, params, INPUTS, targets)
    model, tokens = Transformer(config), t5_folders.shift_right(targets)
    call = {"enable_dropout": False, "decode": True, "mutable": ["cache"]}
    allocate = jax.jit(functools.partial(model.apply, **call))
    _, variables = allocate({"params": params}, INPUTS, targets, targets)
    encode = jax.jit(functools.partial(model.apply, enable_dropout=False, method="encode"))
    encoded = encode({"params": params}, INPUTS)
    assert not any(x.any() for x in jax.tree.leaves(variables["cache"]))
    step = jax.jit(functools.partial(model.apply, **call, max_decode_length=4, method="decode"))
    for t in range(4):
        token = tokens[:, t : t + 1]
        state = {"params": params, "cache": variables["cache"]}
        logits, variables = step(state, encoded, INPUTS, token, token)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-5)


def test_a_step_refuses_a_cache_of_another_size():
    ids = jnp.ones((2, 3), jnp.int32)
    call = {"enable_dropout": False, "decode": True, "mutable": ["cache"]}
    call = functools.partial(Transformer(TINY).apply, **call)
    params = lively(TINY)
    _, variables = jax.eval_shape(call, {"params": params}, ids, ids, ids)
    with pytest.raises(ValueError, match=r"2 rows of 2 heads of 3, got queries of shape \(2, 3,"):
        jax.eval_shape(call, {"params": params, "cache": variables["cache"]}, ids, ids, ids)


def test_dropout_follows_its_rng_and_is_off_when_told():
    config = dataclasses.replace(TINY, dropout_rate=0.5)
    params = lively(config)

    def call(**kwargs):
        return t5_folders.logits(config, params, INPUTS, TARGETS, **kwargs)

    def dropped(seed):
        return call(enable_dropout=True, rngs={"dropout": jax.random.fold_in(RNG, seed)})

    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert np.abs(dropped(1) - dropped(2)).max() > 0.1
    assert np.abs(dropped(1) - call()).max() > 0.1
    np.testing.assert_array_equal(t5_folders.logits(TINY, params, INPUTS, TARGETS), call())


def test_float32_attention_logits_are_finer_than_bfloat16_ones():
    exact = t5_folders.logits(TINY, lively(TINY), INPUTS, TARGETS)
    config = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    fine = dataclasses.replace(config, float32_attention_logits=True)
    got, finer = (t5_folders.logits(c, lively(TINY), INPUTS, TARGETS) for c in (config, fine))
    assert not np.array_equal(got, finer)
    np.testing.assert_allclose(finer, exact, atol=0.3)


def test_a_vocabulary_split_over_devices_is_not_gathered():
    """Why `Transformer` may look ids up by indexing: forward and gradient stay on their shards."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    split = NamedSharding(mesh, PartitionSpec("model", None))
    table = jax.ShapeDtypeStruct((4096, 8), jnp.float32, sharding=split)
    embed = layers.Embed(4096, 8)

    def loss(table, ids):
        return jnp.sum(embed.apply({"params": {"embedding": table}}, ids) ** 2)

    ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss), out_shardings=(None, split)).lower(table, ids)
    text = compiled.compile().as_text()
    assert "all-gather" not in text
    assert "[4096," not in text


# Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_input_tokens": INPUTS[0]}, r"encoder_input_tokens must be \[batch, length\]"),
        ({"decoder_input_tokens": TARGETS[0]}, r"decoder_input_tokens must be \[batch, length\]"),
        ({"encoder_segment_ids": INPUTS}, "come together"),
        (
            {"encoder_segment_ids": INPUTS, "decoder_segment_ids": TARGETS, "decode": True},
            "packing should not be used",
        ),
    ],
)
def test_transformer_says_what_is_wrong(change, message):
    call = {
        "encoder_input_tokens": INPUTS,
        "decoder_input_tokens": TARGETS,
        "decoder_target_tokens": TARGETS,
        "enable_dropout": False,
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda params: Transformer(TINY).apply({"params": params}, **(call | change)),
            lively(TINY),
        )


def test_the_head_of_other_params_is_refused():
    with pytest.raises(ValueError, match=r"No decoder/logits_dense/kernel in params.*Pass the"):
        output_head(TINY, lively(TIED))


# Layers.


def test_attention_is_the_textbooks_without_the_scale():
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 4, 5), (2, 6, 4, 5), (2, 6, 4, 7), (2, 4, 3, 6)]
    query, key, value, bias = (rng.normal(size=s) for s in shapes)
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", query, key) + bias)
    scores /= scores.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", scores, value)
    got = layers.dot_product_attention(
        *(jnp.asarray(x, jnp.float32) for x in (query, key, value, bias)), deterministic=True
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_attention_drops_a_key_for_all_queries_and_keeps_the_mean():
    eye = jnp.eye(64)[None, :, None, :]
    same = jnp.zeros((1, 64, 1, 4))
    got = 64 * layers.dot_product_attention(same, same, eye, dropout_rng=RNG, dropout_rate=0.25)
    np.testing.assert_array_equal(got[0, 0], got[0, -1])
    np.testing.assert_allclose(np.unique(got.round(4)), [0, 1.3333], atol=1e-4)
    np.testing.assert_allclose(got.mean(), 1, atol=0.2)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_of_distances_are_exact(bidirectional):
    """Against whole numbers: far bucket k begins where (distance/exact)^buckets = ratio^k."""
    distances = np.arange(-300, 301)
    got = layers.RelativePositionBiases._relative_position_bucket(
        distances, bidirectional=bidirectional
    )
    each = 16 if bidirectional else 32
    exact = each // 2

    def bucket(past):
        if past < exact:
            return past
        steps = range(each - exact)
        begun = [k for k in steps if past**exact >= exact**exact * (128 // exact) ** k]
        return exact + begun[-1]

    for distance, found in zip(distances.tolist(), got.tolist(), strict=True):
        past = abs(distance) if bidirectional else max(0, -distance)
        assert found == bucket(past) + (16 if bidirectional and distance > 0 else 0)


@pytest.mark.parametrize(("buckets", "furthest"), [(64, 256), (10, 20), (33, 128), (4, 3)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_other_buckets_are_the_original_librarys(buckets, furthest, bidirectional):
    """Its formula, in float32 as it computes it."""
    distances = np.arange(-300, 301)
    got = layers.RelativePositionBiases._relative_position_bucket(
        distances, bidirectional, buckets, furthest
    )
    each = buckets // 2 if bidirectional else buckets
    exact = each // 2
    past = np.abs(distances) if bidirectional else np.maximum(-distances, 0)
    ratio = np.log(np.maximum(past, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(np.log(furthest / exact)) * np.float32(each - exact)).astype(
        int
    )
    expected = np.where(past < exact, past, np.minimum(far, each - 1))
    expected += each * (bidirectional & (distances > 0))
    np.testing.assert_array_equal(got, expected)


def test_settings_of_the_network_reach_its_layers():
    """T5X has one value of each; `test_original_library.py` has the numbers of others."""
    params, inputs = lively(TIED), np.tile(INPUTS[:1, :3], (1, 8))  # beyond the exact distances

    def logits(**changes):
        config = dataclasses.replace(TIED, **changes)
        return t5_folders.logits(config, params, inputs, TARGETS[:1])

    np.testing.assert_allclose(logits(scale_embedding_logits=False), logits() * 8**0.5, rtol=1e-5)
    for changes in ({"layer_norm_epsilon": 0.5}, {"relative_attention_max_distance": 20}):
        assert np.abs(logits(**changes) - logits()).max() > 1e-3, changes
    few = dataclasses.replace(TIED, relative_attention_num_buckets=8)
    shapes = jax.eval_shape(functools.partial(init, Transformer(few)), RNG)["params"]
    assert shapes["encoder"]["relpos_bias"]["rel_embedding"].shape == (2, 8)


def test_t5xs_own_config_may_stand_in_its_place():
    """As gin files have it: it lacks what T5X has one value of."""
    added = ("scale_", "layer_norm_", "relative_")
    theirs = {k: v for k, v in vars(TIED).items() if not k.startswith(added)}
    config = dataclasses.make_dataclass("T5XConfig", theirs, frozen=True)(**theirs)
    got, expected = (
        jax.eval_shape(functools.partial(init, Transformer(c)), RNG) for c in (config, TIED)
    )
    assert got == expected
    params = {"token_embedder": {"embedding": np.ones((12, 8))}}
    assert output_head(config, params).logit_scale == 8**-0.5


def test_the_norms_epsilon_is_added_to_the_mean_square():
    x = np.array([[[0.01, -0.02, 0.03]]], np.float32)
    norm = layers.LayerNorm(epsilon=1e-3)
    got = norm.apply({"params": {"scale": jnp.ones(3)}}, x)
    np.testing.assert_allclose(got, x / np.sqrt((x**2).mean() + 1e-3), rtol=1e-5)


def test_the_exact_gelu_is_not_t5xs():
    x = np.linspace(-3, 3, 13, dtype=np.float32)
    want = [0.5 * v * (1 + math.erf(v / 2**0.5)) for v in x.tolist()]
    np.testing.assert_allclose(layers._activation("gelu_exact")(x), want, atol=1e-6)
    assert np.abs(layers._activation("gelu")(x) - np.array(want)).max() > 1e-4


def test_the_cache_holds_each_position_at_its_place():
    module = layers.MultiHeadDotProductAttention(num_heads=2, head_dim=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 6)), jnp.float32)
    params = jax.jit(module.init)(RNG, x, x)["params"]
    cache = {
        "cached_key": jnp.zeros((2, 2, 3, 5)),
        "cached_value": jnp.zeros((2, 2, 3, 5)),
        "cache_index": jnp.array(3),
    }
    call = {"decode": True, "deterministic": True, "mutable": "cache"}
    step = jax.jit(functools.partial(module.apply, **call))
    _, new = step({"params": params, "cache": cache}, x, x)
    assert new["cache"]["cache_index"] == 4
    key = (x @ params["key"]["kernel"]).reshape(2, 2, 3)
    np.testing.assert_allclose(new["cache"]["cached_key"][..., 3], key, rtol=1e-6)
    assert not new["cache"]["cached_key"][..., [0, 1, 2, 4]].any()


def test_lookup_by_product_is_the_lookup():
    ids = jnp.array([[3, 0, 7]], jnp.uint8)
    plain, product = layers.Embed(8, 4), layers.Embed(8, 4, one_hot=True)
    variables = plain.init(RNG, ids)
    np.testing.assert_array_equal(plain.apply(variables, ids), product.apply(variables, ids))


def test_lookup_may_cast_its_ids_and_wants_whole_numbers():
    ids = jnp.array([3.0])
    variables = layers.Embed(8, 4).init(RNG, ids.astype(jnp.int32))
    cast = layers.Embed(8, 4, cast_input_dtype=jnp.int32)
    np.testing.assert_array_equal(
        cast.apply(variables, ids)[0], variables["params"]["embedding"][3]
    )
    with pytest.raises(ValueError, match=r"must be an integer.*float32"):
        layers.Embed(8, 4).apply(variables, ids)


def test_masks_combine_by_and_biases_by_sum():
    a, b = jnp.array([0.0, 1, 0, 1]), jnp.array([1.0, 1, 1, 0])
    np.testing.assert_array_equal(layers.combine_masks(a, None, b), [0, 1, 0, 0])
    np.testing.assert_array_equal(layers.combine_biases(a, None, b), [1, 2, 1, 1])
    assert layers.combine_masks(None) is None
    assert layers.combine_biases() is None
    for combine in (layers.combine_masks, layers.combine_biases):
        with pytest.raises(ValueError, match=r"same rank; got shapes \[\(4,\), \(1, 4\)\]"):
            combine(a, b[None])


def test_a_prefix_sees_itself_both_ways_within_its_example():
    mask = layers.make_decoder_mask(
        jnp.array([[6, 7, 3, 4, 5, 0]]),
        jnp.float32,
        decoder_causal_attention=jnp.array([[1, 1, 0, 1, 1, 0]]),
        decoder_segment_ids=jnp.array([[1, 1, 1, 2, 2, 0]]),
    )
    expected = np.zeros((6, 6))
    expected[:2, :2] = expected[3:5, 3:5] = 1
    expected[2, :3] = 1
    np.testing.assert_array_equal(mask[0, 0], expected)


def test_extra_axes_of_a_mask_come_first():
    assert layers.make_causal_mask(jnp.ones((3, 3, 5)), 2).shape == (1, 1, 3, 3, 1, 5, 5)


def test_activations_may_be_functions_and_unknown_names_are_told():
    x = jnp.ones((1, 1, 3))
    named = layers.MlpBlock(4, ("relu",))
    variables = named.init(RNG, x, deterministic=True)
    given = layers.MlpBlock(4, (jax.nn.relu,))
    np.testing.assert_array_equal(
        named.apply(variables, x, deterministic=True), given.apply(variables, x, deterministic=True)
    )
    with pytest.raises(ValueError, match="Unknown activation 'rulu': give 'linear'"):
        layers.MlpBlock(4, ("rulu",)).apply(variables, x, deterministic=True)


def test_attention_says_which_shapes_do_not_fit():
    x = jnp.ones((2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 5\), \(2, 3, 4, 5\), \(2, 2, 4, 5\)"):
        layers.dot_product_attention(x, x, x[:, :2])
    with pytest.raises(ValueError, match="dropout_rng is None"):
        layers.dot_product_attention(x, x, x, dropout_rate=0.1)
