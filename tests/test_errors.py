"""Every error a user can make, once: what was got, what is needed, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5patches_kernels as tk
from t5patches_kernels import linear_losses

Z = jnp.zeros((2, 3, 5))
Y = jnp.zeros((2, 3), jnp.int32)
W = jnp.ones((2, 3))
H, K = jnp.zeros((2, 3, 4)), jnp.zeros((4, 5))
NONE = jnp.full((2, 3, 2), -1)


def tn(logits=Z, ref=Z, targets=Y, weights=W, **options):
    return tk.targeted_negative_loss(logits, ref, targets, weights, **options)


def policy(logits=Z, ref=Z, targets=Y, weights=W, advantages=W, old=W, **options):
    return tk.policy_gradient_loss(logits, ref, targets, weights, advantages, old, **options)


def preference(chosen=W, rejected=W, ref_chosen=W, ref_rejected=W, **options):
    return tk.preference_loss(chosen, rejected, ref_chosen, ref_rejected, **options)


def linear(hidden=H, kernel=K, ref_hidden=H, ref_kernel=K, **options):
    return tk.linear_targeted_negative_loss(hidden, kernel, ref_hidden, ref_kernel, Y, W, **options)


def _float64():
    with jax.enable_x64(True):
        return tn(jnp.zeros((2, 3, 5), jnp.float64), jnp.zeros((2, 3, 5), jnp.float64))


def _exported():
    (rows,) = jax.export.symbolic_shape("b")
    logits, targets = (rows, 5), (rows,)
    return jax.export.export(jax.jit(tk.cross_entropy_loss))(
        jax.ShapeDtypeStruct(logits, jnp.float32), jax.ShapeDtypeStruct(targets, jnp.int32)
    )


BAD = {
    "scalar logits": (
        lambda: tk.cross_entropy_loss(jnp.float32(0), Y),
        ValueError,
        r"\[\.\.\., V\].*\(\)",
    ),
    "no vocabulary": (lambda: tn(Z[..., :0], Z[..., :0]), ValueError, r"empty.*\(2, 3, 0\)"),
    "list": (lambda: tn([[1.0]]), TypeError, "logits must be an array, got list"),
    "shapes": (lambda: tn(ref=Z[:1]), ValueError, r"same shape, got \(1, 3, 5\) and \(2, 3, 5\)"),
    "integer logits": (lambda: tn(Z.astype(jnp.int32)), TypeError, r"int32.*astype\(jnp.float32\)"),
    "float16 logits": (
        lambda: tn(Z.astype(jnp.float16)),
        TypeError,
        "float16.*not tested.*float32 or bfloat16",
    ),
    "float16 reference": (lambda: tn(ref=Z.astype(jnp.float16)), TypeError, "ref_logits.*float16"),
    "targets shape": (
        lambda: tn(targets=Y[:, :2]),
        ValueError,
        r"targets must have shape \(2, 3\).*got \(2, 2\)",
    ),
    "one-hot targets": (lambda: tn(targets=Z.astype(jnp.int32)), ValueError, "no one-hot"),
    "float targets": (
        lambda: tn(targets=W),
        TypeError,
        r"targets.*integer.*float32.*astype\(jnp.int32\)",
    ),
    "weights shape": (
        lambda: tn(weights=W[0]),
        ValueError,
        r"weights must have shape \(2, 3\).*got \(3,\)",
    ),
    "bool weights": (lambda: tn(weights=W > 0), TypeError, "weights must be real numbers.*bool"),
    "objective": (
        lambda: tn(objective="tnfr"),
        ValueError,
        f"one of {', '.join(tk.TARGETED_NEGATIVE)}, got 'tnfr'",
    ),
    "smoothing 0": (
        lambda: tn(objective="tnrf", smoothing=0.0),
        ValueError,
        "smoothing must be > 0.*tnrf.*infinite",
    ),
    "smoothing < 0": (
        lambda: tn(smoothing=-1.0),
        ValueError,
        "smoothing must be finite and >= 0.0, got -1.0",
    ),
    "alpha": (lambda: tn(alpha=-2.0), ValueError, "alpha must be finite and >= 0"),
    "alpha too large": (
        lambda: tn(alpha=1e40),
        ValueError,
        r"alpha=1e\+40 is beyond float32.*pass 0",
    ),
    "smoothing too small": (lambda: tn(smoothing=1e-45), ValueError, "smoothing=1e-45 is beyond"),
    "smoothing subnormal": (lambda: tn(smoothing=1e-38), ValueError, "smoothing=1e-38 is beyond"),
    "threshold too large": (
        lambda: tk.negative_likelihood_loss(Z, Y, W, threshold=-1e39),
        ValueError,
        r"threshold=-1e\+39 is beyond float32.*3.4e\+38 in size",
    ),
    "alpha NaN": (lambda: tn(alpha=float("nan")), ValueError, "alpha must be finite"),
    "alpha text": (lambda: tn(alpha="2"), TypeError, "alpha must be a number, got '2'"),
    "alpha bool": (lambda: tn(alpha=True), TypeError, "alpha must be a number, got True"),
    "divergence text": (
        lambda: tn(divergence="False"),
        TypeError,
        "divergence must be True or False, got 'False'",
    ),
    "skip_ignored number": (
        lambda: tn(skip_ignored=1),
        TypeError,
        "skip_ignored must be True or False, got 1",
    ),
    "alpha traced": (
        lambda: jax.jit(lambda a: tn(alpha=a))(1.0),
        TypeError,
        "alpha.*traced.*static",
    ),
    "z_loss": (lambda: tn(z_loss=-1e-4), ValueError, "z_loss must be finite and >= 0"),
    "no factors": (
        lambda: tn(edits=tk.Edits(NONE, None)),
        ValueError,
        r"both ids and factors.*ids=\(2, 3, 2\), factors=None",
    ),
    "bare ids": (lambda: tn(edits=NONE), ValueError, "both ids and factors"),
    "factors shape": (
        lambda: tn(edits=tk.Edits(NONE, W)),
        ValueError,
        r"edits.factors and edits.ids.*\(2, 3\) and \(2, 3, 2\)",
    ),
    "edits shape": (
        lambda: tn(edits=tk.Edits(Y, W)),
        ValueError,
        r"\(2, 3, 'K'\).*got \(2, 3\).*-1",
    ),
    "edits float ids": (
        lambda: tn(edits=tk.Edits(W[..., None], W[..., None])),
        TypeError,
        "edits.ids must be integer",
    ),
    "integer factors": (
        lambda: tn(edits=tk.Edits(NONE, NONE)),
        TypeError,
        "edits.factors must be floating",
    ),
    "negative factors": (
        lambda: tn(edits=tk.Edits(0 * NONE, -1.0 * jnp.ones(NONE.shape))),
        ValueError,
        "factors must be >= 0, got -1.0",
    ),
    "direction": (
        lambda: tk.kl_divergence(Z, Z, direction="back"),
        ValueError,
        "one of forward, reverse, got 'back'",
    ),
    "reverse with edits": (
        lambda: tk.kl_divergence(
            Z, Z, direction="reverse", edits=tk.Edits(NONE, jnp.ones(NONE.shape))
        ),
        ValueError,
        "smoothing must be > 0.*reverse",
    ),
    "label smoothing": (
        lambda: tk.cross_entropy_loss(Z, Y, label_smoothing=1.0),
        ValueError,
        r"\[0, 1\), got 1.0",
    ),
    "label smoothing of one entry": (
        lambda: tk.cross_entropy_loss(Z[..., :1], Y, label_smoothing=0.1),
        ValueError,
        "at least 2 entries",
    ),
    "implementation": (
        lambda: tn(implementation="cuda"),
        ValueError,
        "one of pallas_tpu, pallas_gpu, xla, reference, got 'cuda'",
    ),
    "axis": (
        lambda: tn(vocab_axis="model"),
        ValueError,
        "vocab_axis='model' is not an axis.*shard_map",
    ),
    "axes": (
        lambda: tn(vocab_axis=("data", "model")),
        TypeError,
        r"vocab_axis must be the name of one mesh axis, got \('data', 'model'\)",
    ),
    "symbolic sizes": (
        _exported,
        NotImplementedError,
        r'logits has symbolic sizes, \(b, 5\).*export a program for each.*"reference"',
    ),
    "float64": (_float64, TypeError, 'float64.*implementation="reference"'),
    "kernel rank": (
        lambda: linear(kernel=jnp.zeros(4)),
        ValueError,
        r"kernel must be a matrix \[D, V\].*\(4,\)",
    ),
    "kernel shape": (
        lambda: linear(kernel=jnp.zeros((6, 7))),
        ValueError,
        r"\[D, V\] with D = 4.*got \(6, 7\)",
    ),
    "kernel flipped": (lambda: linear(kernel=K.T), ValueError, "Pass transposed=True"),
    "softcap 0": (lambda: linear(softcap=0.0), ValueError, "softcap must be > 0.*None"),
    "softcap < 0": (lambda: linear(softcap=-30), ValueError, "softcap must be > 0, got -30.0"),
    "softcap NaN": (lambda: linear(softcap=float("nan")), ValueError, "softcap must be finite"),
    "softcap inf": (lambda: linear(softcap=float("inf")), ValueError, "softcap must be finite"),
    "softcap bool": (lambda: linear(softcap=True), TypeError, "softcap must be a number.*True"),
    "softcap text": (lambda: linear(softcap="big"), TypeError, "softcap must be a number"),
    "softcap traced": (
        lambda: jax.jit(lambda c: linear(softcap=c))(30.0),
        TypeError,
        "softcap.*traced.*static",
    ),
    "softcap beyond float32": (lambda: linear(softcap=1e39), ValueError, "softcap=1e.39 is beyond"),
    "chunk_bytes in MiB": (
        lambda: linear(chunk_bytes=128),
        ValueError,
        "chunk_bytes must hold .* 8 tokens, here 160 bytes, got 128: it counts bytes.*Pass None",
    ),
    "chunk_bytes < 0": (
        lambda: tk.linear_cross_entropy_loss(H, K.T, Y, transposed=True, chunk_bytes=-1),
        ValueError,
        "here 160 bytes, got -1",
    ),
    "chunk_bytes float": (lambda: linear(chunk_bytes=1e9), TypeError, "must be a Python int.*1000"),
    "chunk_bytes bool": (lambda: linear(chunk_bytes=True), TypeError, "Python int.*got True"),
    "chunk_bytes traced": (
        lambda: jax.jit(lambda x: linear(chunk_bytes=x))(1 << 30),
        TypeError,
        "chunk_bytes must be a Python int",
    ),
    "vocabularies": (
        lambda: linear(ref_kernel=jnp.zeros((4, 6))),
        ValueError,
        "same vocabulary, got 5 and 6",
    ),
    "hidden shapes": (lambda: linear(ref_hidden=H[:1]), ValueError, r"\(1, 3, 4\) and \(2, 3, 4\)"),
    "clip of one": (lambda: policy(clip=0.2), TypeError, r"clip.*pair.*\(0.2, 0.2\).*got 0.2"),
    "clip of three": (lambda: policy(clip=(0.1, 0.2, 0.3)), TypeError, r"pair.*\(0.1, 0.2, 0.3\)"),
    "clip below": (lambda: policy(clip=(1.5, 0.2)), ValueError, r"clip\[0\].*\[0, 1\], got 1.5"),
    "clip above": (lambda: policy(clip=(0.2, -0.1)), ValueError, r"clip\[1\].*>= 0.0, got -0.1"),
    "clip traced": (
        lambda: jax.jit(lambda c: policy(clip=(0.2, c)))(0.2),
        TypeError,
        r"clip\[1\].*traced.*static",
    ),
    "kl": (lambda: policy(kl="k2"), ValueError, "kl must be one of exact, k1, k3, got 'k2'"),
    "kl_coefficient": (lambda: policy(kl_coefficient=-1.0), ValueError, "kl_coefficient.*>= 0"),
    "kl from nothing": (
        lambda: policy(ref=None, kl_coefficient=0.1),
        ValueError,
        "kl_coefficient=0.1 needs a reference, got ref_logits=None: pass.*kl_coefficient=0",
    ),
    "kl from no hidden": (
        lambda: tk.linear_policy_gradient_loss(H, K, None, None, Y, W, W, kl_coefficient=0.1),
        ValueError,
        "got ref_hidden=None",
    ),
    "half a policy's reference": (
        lambda: tk.linear_policy_gradient_loss(H, K, None, K, Y, W, W),
        ValueError,
        "ref_hidden is missing",
    ),
    "entropy_coefficient": (
        lambda: policy(entropy_coefficient=float("inf")),
        ValueError,
        "entropy_coefficient must be finite",
    ),
    "advantages shape": (
        lambda: policy(advantages=W[0]),
        ValueError,
        r"advantages must have shape \(2, 3\).*got \(3,\)",
    ),
    "advantages of sequences": (
        lambda: policy(advantages=W[:, 0]),
        ValueError,
        r"got \(2,\).*jnp.broadcast_to\(advantages\[..., None\], \(2, 3\)\)",
    ),
    "old_log_probs shape": (
        lambda: policy(old=Z),
        ValueError,
        "old_log_probs takes one entry a token",
    ),
    "integer advantages": (
        lambda: policy(advantages=Y),
        TypeError,
        r"advantages must be floating point, got int32.*astype\(jnp.float32\)",
    ),
    "preference": (
        lambda: preference(objective="kto"),
        ValueError,
        "objective must be one of dpo, ipo, npo, got 'kto'",
    ),
    "beta": (lambda: preference(beta=0.0), ValueError, "beta must be > 0, got 0.0"),
    "beta < 0": (lambda: preference(beta=-1.0), ValueError, "beta must be finite and >= 0"),
    "nothing chosen": (
        lambda: preference(chosen=None, objective="ipo"),
        ValueError,
        "got chosen_log_probs=None.*npo",
    ),
    "chosen for npo": (
        lambda: preference(ref_chosen=None, objective="npo"),
        ValueError,
        "no chosen answers, got chosen_log_probs: pass None",
    ),
    "preference shapes": (
        lambda: preference(chosen=W[0]),
        ValueError,
        r"chosen_log_probs and rejected_log_probs must have the same shape.*\(3,\) and \(2, 3\)",
    ),
    "reward shapes": (
        lambda: tk.pairwise_reward_loss(W, W[0]),
        ValueError,
        "rejected_rewards and chosen_rewards must have the same shape",
    ),
    "integer rewards": (
        lambda: tk.pairwise_reward_loss(Y, Y),
        TypeError,
        "chosen_rewards must be float32 or bfloat16, got int32",
    ),
    "no reference": (
        lambda: tn(ref=None),
        ValueError,
        "tnff needs a reference, got ref_logits=None",
    ),
    "no reference of a divergence": (
        lambda: tk.kl_divergence(Z, None),
        ValueError,
        "kl_forward needs a reference, got ref_logits=None",
    ),
    "no vocabulary of a kernel": (
        lambda: linear(kernel=K[:, :0], ref_kernel=K[:, :0]),
        ValueError,
        r"kernel has an empty vocabulary: shape \(4, 0\)",
    ),
    "chunks of no tokens": (
        lambda: linear_losses.tokens_per_chunk(0, 100, platform="cpu"),
        ValueError,
        "tokens must be at least 1, got 0",
    ),
    "chunks of no vocabulary": (
        lambda: linear_losses.tokens_per_chunk(100, 0, platform="cpu"),
        ValueError,
        "vocab_size must be",
    ),
    "chunks of half a token": (
        lambda: linear_losses.tokens_per_chunk(100.5, 100, platform="cpu"),
        TypeError,
        "tokens must be a Python int, got 100.5",
    ),
    "chunks of another platform": (
        lambda: linear_losses.tokens_per_chunk(1, 100, platform="cuda"),
        ValueError,
        "platform must be one of cpu, gpu, tpu, got 'cuda'",
    ),
    "divergence traced": (
        lambda: jax.jit(lambda x: tn(divergence=x))(True),
        TypeError,
        "divergence must be True or False, got a traced value.*static",
    ),
    "skip_ignored traced": (
        lambda: jax.jit(lambda x: tn(skip_ignored=x))(True),
        TypeError,
        "skip_ignored must be True or False, got a traced value.*static",
    ),
    "transposed traced": (
        lambda: jax.jit(lambda x: linear(transposed=x))(True),
        TypeError,
        "transposed must be True or False, got a traced value.*static",
    ),
    "targets list": (
        lambda: tn(targets=Y.tolist()),
        TypeError,
        r"targets must be an array, got list: pass jnp.asarray\(targets\)",
    ),
    "no targets": (
        lambda: tk.cross_entropy_loss(Z, None),
        TypeError,
        "targets must be an array, got NoneType",
    ),
    "weights list": (
        lambda: tn(weights=W.tolist()),
        TypeError,
        "weights must be an array, got list",
    ),
    "no weights": (lambda: tn(weights=()), TypeError, "weights must be an array, got tuple"),
    "advantages list": (
        lambda: policy(advantages=W.tolist()),
        TypeError,
        "advantages must be an array, got list",
    ),
    "no advantages": (
        lambda: policy(advantages=None),
        TypeError,
        "advantages must be an array, got NoneType",
    ),
    "edits list": (
        lambda: tn(edits=tk.Edits(NONE.tolist(), W)),
        TypeError,
        "edits.ids must be an array, got list",
    ),
    "factors list": (
        lambda: tn(edits=tk.Edits(NONE, NONE.tolist())),
        TypeError,
        "edits.factors must be an array, got list",
    ),
    "one weight for all": (
        lambda: tn(weights=1.0),
        ValueError,
        r"got \(\). One for all tokens is jnp.full\(\(2, 3\), weights\)",
    ),
    "half a reference": (
        lambda: tk.linear_token_statistics(H, K, Y, H),
        ValueError,
        "ref_kernel is missing",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_says_what_is_wrong_and_what_to_do(what):
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()


def test_at_trace_time():
    with pytest.raises(ValueError, match="same shape"):
        jax.eval_shape(lambda z, r: tn(z, r), Z, Z[:1])


def test_the_reference_takes_whole_rows():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P(None, None, "model")
    call = jax.shard_map(
        lambda z: tn(z, z, implementation="reference", vocab_axis="model").loss,
        mesh=mesh, in_specs=spec, out_specs=jax.P(),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"reference.*whole rows.*gather"):
        call(Z)


@pytest.mark.parametrize("differentiate", [jax.jacfwd, lambda f: lambda z: jax.jvp(f, (z,), (z,))])
def test_forward_mode_names_the_remedy(differentiate):
    with pytest.raises(NotImplementedError, match=r'forward-mode.*implementation="reference"'):
        differentiate(lambda z: tn(z).loss)(Z)
    assert np.isfinite(jax.jacfwd(lambda z: tn(z, implementation="reference").loss)(Z)).all()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("output", ["loss", "log_prob"])
def test_second_order_names_the_remedy(wrap, output):
    def total(z, implementation=None):
        return getattr(tn(z, implementation=implementation), output).sum()

    with pytest.raises(
        NotImplementedError, match=r'second derivatives.*implementation="reference"'
    ):
        jax.grad(lambda z: (wrap(jax.grad(total))(z) ** 2).sum())(Z)
    jax.grad(lambda z: (jax.grad(total)(z, "reference") ** 2).sum())(Z)


def test_second_order_of_linear_names_the_remedy():
    with pytest.raises(NotImplementedError, match="second derivatives"):
        jax.grad(lambda h: (jax.grad(lambda h: linear(h).loss.sum())(h) ** 2).sum())(H)
