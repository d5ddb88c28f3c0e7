"""What is held, by the compiler's own account, in units of one [T, V] float32 array (TV)."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from harness import slow_unless

import t5patches_kernels as tk
from t5patches_kernels.core.objectives import TARGETED_NEGATIVE

CASES = {
    name: functools.partial(tk.targeted_negative_loss, objective=name) for name in TARGETED_NEGATIVE
} | {
    "ul": lambda z, r, y, w, **k: tk.unlikelihood_loss(z, y, w, **k),
    "nl": lambda z, r, y, w, **k: tk.negative_likelihood_loss(z, y, w, **k),
    "ce": lambda z, r, y, w, **k: tk.cross_entropy_loss(
        z, y, w, label_smoothing=0.1, z_loss=1e-4, **k
    ),
}
CASES |= {
    f"{name}-divergence": functools.partial(CASES[name], divergence=True)
    for name in TARGETED_NEGATIVE
}


def shapes(t, *arrays):
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return [*(f32(x) for x in arrays), jax.ShapeDtypeStruct((t,), jnp.int32), f32((t,))]


def temporaries(f, arguments, unit):
    compiled = jax.jit(f).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / unit, compiled


@pytest.mark.parametrize(
    ("name", "gradient"),
    [slow_unless(gradient or i % 4 == 1, name, gradient)
     for i, name in enumerate(CASES) for gradient in (False, True)],
)  # fmt: skip
def test_logits_hold_no_more_than_a_slice(name, gradient):
    t, v = 512, 32128

    def total(z, r, y, w):
        return CASES[name](z, r, y, w, implementation="xla").loss.sum()

    f = jax.value_and_grad(total) if gradient else total
    held, compiled = temporaries(f, shapes(t, (t, v), (t, v)), 4 * t * v)
    assert held <= 0.25
    # Each exponential and logarithm of rows is in the program once; of each of ours XLA makes one
    # shift of bits.
    rows = 1 if name in ("nl", "ce") else 2
    assert compiled.as_text().count(" shift-left(") == rows
    assert compiled.as_text().count(" shift-right-arithmetic(") == name.startswith("tnr")


@pytest.mark.parametrize("name", [*TARGETED_NEGATIVE, "ce"])
def test_the_gradient_takes_the_place_of_logits_that_end_here(name):
    """Both arrays of logits are made and used up, as in a training step: nothing is added."""
    t, v, d = 512, 32128, 64

    def total(h, k, rh, y, w):
        return CASES[name](h @ k, rh @ k, y, w, implementation="xla").loss.sum()

    arguments = shapes(t, (t, d), (d, v), (t, d))
    held, _ = temporaries(jax.value_and_grad(total, (0, 1)), arguments, 4 * t * v)
    assert held <= {"ce": 1.1}.get(name, 2.1)


def test_all_outputs_together_take_one_gradient():
    t, v = 512, 32128

    def total(z, r, y, w):
        s = tk.token_statistics(z, y, r, implementation="xla")
        return (s.log_prob + s.entropy + s.kl).sum()

    held, _ = temporaries(jax.grad(total), shapes(t, (t, v), (t, v)), 4 * t * v)
    assert held <= 0.25


@pytest.mark.parametrize(("name", "softcap"), [("tnff", None), ("tnrf", 30.0)])
def test_linear_holds_no_logits(name, softcap):
    t, v, d = 2048, 32128, 512

    def total(h, k, rh, rk, y, w):
        loss = tk.linear_targeted_negative_loss(
            h, k, rh, rk, y, w, objective=name, softcap=softcap, implementation="xla"
        ).loss
        return loss.sum()

    arguments = shapes(t, (t, d), (d, v), (t, d), (d, v))
    held, compiled = temporaries(jax.value_and_grad(total, (0, 1)), arguments, 4 * t * v)
    text = compiled.as_text()
    assert f"f32[{t},{v}]" not in text
    assert f"f32[{d},{v}]" in text  # what would be seen
    # One array for the kernel's gradient, made again in its own place where cotangents differ, and
    # a chunk.
    assert held <= d / t + 0.1


def test_a_head_takes_four_products():
    """The three that make a kernel's gradient again stay in the loop of one turn or none."""
    t, v, d = 64, 2048, 32

    def total(h, k, rh, rk, y, w):
        return tk.linear_targeted_negative_loss(h, k, rh, rk, y, w, implementation="xla").loss.sum()

    arguments = shapes(t, (t, d), (d, v), (t, d), (d, v))
    text = temporaries(jax.value_and_grad(total, (0, 1)), arguments, 1)[1].as_text()
    named = dict(re.findall(r"^(?:ENTRY )?(%[\w.-]+) \(.*?\{$(.*?)^\}", text, re.S | re.M))

    def products(name):
        called = re.findall(r"(?:calls|to_apply)=(%[\w.-]+)", named[name])
        return named[name].count(" dot(") + sum(map(products, called))

    assert products(re.search(r"^ENTRY (%[\w.-]+)", text, re.M)[1]) == 4
    assert 3 in [products(body) for body in re.findall(r"body=(%[\w.-]+)", text)]
