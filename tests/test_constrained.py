"""The original under the constraint: against decoding it token by token, with the same rule."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from editing_samples import logits, tiny_model, tiny_params, tokenizer

from t5patches.editing import annotate as annotate_module
from t5patches.editing.annotate import annotate, pattern, speak
from t5patches.editing.constrained import evaluate_constrained, speak_constrained
from t5patches.editing.evaluate import Measuring, evaluate, read_original
from t5patches.model.decoder.model import small_decoder

pytestmark = pytest.mark.usefixtures("shared_programs")

RULE = pattern(r"\S*[aeo]\S*")
INPUTS = [f"news {i}" for i in range(6)]
LENGTH = 12


@functools.partial(jax.jit, static_argnames="length")
def next_logits(prompt, said, count, length):
    """After the first tokens of an output, float32 [V]."""
    # The position to be told must not be padding.
    outputs = jnp.where(
        jnp.arange(length) < count, said, jnp.where(jnp.arange(length) > count, 0, 3)
    )
    batch = {"inputs": prompt[None], "outputs": outputs[None]}
    return logits(tiny_model(), tiny_params(), batch)[0, count]


def token_by_token(prompt):
    """Greedy decoding that starts anew whenever something is found, with one token less to say."""
    forbidden = set()
    while True:
        said = ()
        while len(said) < LENGTH and said[-1:] != (1,):
            padded = np.array((*said, *[0] * (LENGTH - len(said))), np.int32)
            scores = np.array(next_logits(np.array(prompt), padded, len(said), LENGTH))
            scores[[0, *(ids[-1] for ids in forbidden if ids[:-1] == said)]] = -np.inf
            said = (*said, int(scores.argmax()))
        (example,) = annotate(["news"], [said], tokenizer(), RULE)
        if not any(example.marked):
            return said
        forbidden.add(said[: example.marked.index(True) + 1])


def test_the_next_likeliest_output_without_a_match_is_said(monkeypatch):
    args = (tiny_model(), tiny_params(), INPUTS, RULE, tokenizer())
    free = speak(*args, max_length=LENGTH)
    found = speak_constrained(*args, max_length=LENGTH)
    assert [e.output_ids for e in found] == [token_by_token(e.input_ids) for e in free]
    assert [e.inputs for e in found] == INPUTS
    assert any(any(e.marked) for e in free)
    assert not any(any(e.marked) for e in found)
    # Without attempts what is unwanted stays, marked.
    monkeypatch.setattr("t5patches.editing.constrained.ATTEMPTS", 0)
    assert speak_constrained(*args, max_length=LENGTH) == free


def test_what_is_drawn_is_the_originals_distribution_without_what_is_barred(monkeypatch):
    """One token, of which the rule bars those with some letters; the rest keep their ratios."""
    monkeypatch.setattr(annotate_module, "_LAST_WORD", re.compile("$"))  # as if never cut off
    model, params, count = tiny_model(), tiny_params(), 1024
    rule = pattern(r".*[a-z].*")
    args = (model, params, ["news"] * count, rule, tokenizer())
    found = speak_constrained(*args, max_length=1, temperature=1.0, batch_size=8)
    assert not any(any(e.marked) for e in found)
    scores = next_logits(np.array(found[0].input_ids), np.zeros(1, np.int32), 0, 1)
    p = np.array(jax.nn.softmax(scores), np.float64)
    barred = [any(rule("", tokenizer().decode([i]).text)) for i in range(len(p))]
    assert 0.1 < p[barred].sum() < 0.9
    p[[0, *np.flatnonzero(barred)]] = 0
    drawn = np.bincount([(*e.output_ids, 0)[0] for e in found], minlength=len(p))
    # In ten parts of about the same probability each.
    order = np.argsort(p)
    part = np.minimum((p[order].cumsum() / p.sum() * 10).astype(int), 9)
    expected, seen = (np.bincount(part, x[order], 10) for x in (count * p / p.sum(), drawn))
    assert ((seen - expected) ** 2 / expected).sum() < 30  # chi-square, 9 degrees: p = 0.0004


def test_the_last_id_may_be_said_where_padding_is_no_token():
    """A decoder-only model's padding is -1; the last id is GPT-2's end of a text."""
    size = tokenizer().vocab_size
    model = small_decoder(vocab_size=size, width=16, layers=1, begin_id=0)
    # The same logits everywhere: "P" is the likeliest token, and the last id the next one.
    params = jax.tree.map(jnp.ones_like, jax.jit(model.init)(jax.random.key(0)))
    scores = jnp.zeros(size).at[tokenizer().encode("P").ids[0]].set(2).at[-1].set(1)
    params["head"]["kernel"] = jnp.tile(scores, (16, 1))
    args = (model, params, ["news"], pattern("P"), tokenizer())
    assert any(speak(*args, max_length=4)[0].marked)
    (found,) = speak_constrained(*args, max_length=4)
    assert found.output_ids[0] == size - 1


def test_the_constraint_is_measured_as_an_edit_is():
    model, params = tiny_model(), tiny_params()
    before = speak(model, params, INPUTS, RULE, tokenizer(), max_length=LENGTH)
    asked = Measuring(RULE, max_length=LENGTH, references=[["a fire"]] * len(INPUTS))
    found = evaluate_constrained(model, params, before, tokenizer(), asked)
    original = read_original(model, params, before)
    other = evaluate(model, params, original, tokenizer(), asked)
    assert found.measures.keys() == other.measures.keys()
    assert found.measures["kl"].value == 0
    for name in ("prevalence", "prevalence_sampled", "prevalence_tokens"):
        assert found.measures[name].value == 0
    assert other.measures["prevalence"].value > 0
    clean = [not any(e.marked) for e in before]
    assert any(clean)
    assert found.measures["exact_match_clean"].value == 100
    assert found.measures["exact_match"].value == pytest.approx(100 * np.mean(clean))
    with pytest.raises(ValueError, match="there is no rule"):
        evaluate_constrained(
            model, params, before, tokenizer(), dataclasses.replace(asked, rule=None)
        )
