"""How often each of several files is drawn from, in which order, and under which instruction."""

import dataclasses
import math

import numpy as np
import pytest
from editing_samples import example, tokenizer

from t5patches.editing.data import Source
from t5patches.editing.mixing import mixing_rates, mixture_order, with_share
from t5patches.editing.templates import read_templates, template_items, with_templates


def test_rates_go_by_size_with_a_cap_and_a_temperature():
    assert mixing_rates([10, 30, 60]) == (0.1, 0.3, 0.6)
    assert mixing_rates([10, 30, 60], cap=20) == (0.2, 0.4, 0.4)
    assert mixing_rates([10, 30, 60], temperature=2, cap=40) == pytest.approx(
        np.sqrt([10, 30, 40]) / np.sqrt([10, 30, 40]).sum()
    )
    assert mixing_rates([10, 30], temperature=1e9) == pytest.approx((0.5, 0.5))
    assert mixing_rates([10, 30], rates=[3, 1]) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([], {}, "at least one set"),
        ([3, 0], {}, "no empty one"),
        ([3], {"cap": 0}, "the cap is 0"),
        ([3], {"temperature": 0.5}, "the temperature is 0.5"),
        ([3], {"temperature": math.inf}, "the temperature is inf"),
        ([3, 4], {"rates": [1]}, "got 1 rates for 2 sets"),
        ([3, 4], {"rates": [1, 0]}, "each must be above 0"),
        ([3, 4], {"rates": [1, math.nan]}, "each must be above 0"),
        ([3, 4], {"rates": [1, 1], "cap": 3}, "rates leave nothing for these to do"),
        ([3, 4], {"rates": [1, 1], "temperature": 2}, "rates leave nothing for these to do"),
    ],
)
def test_rates_that_mean_nothing_are_refused(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        mixing_rates(sizes, **options)


def test_sets_are_drawn_at_their_rates_each_in_whole_permutations():
    sizes, rates = (7, 50, 1000), (0.5, 0.3, 0.2)
    drawn = mixture_order(sizes, rates, 6400, seed=3)
    starts = np.array([0, 7, 57, 1057])
    for number, rate in enumerate(rates):
        own = drawn[(drawn >= starts[number]) & (drawn < starts[number + 1])] - starts[number]
        assert len(own) / len(drawn) == pytest.approx(rate, abs=4 * math.sqrt(rate / len(drawn)))
        size = sizes[number]
        epochs = [own[i : i + size] for i in range(0, len(own), size)]
        assert all(sorted(e) == list(range(size)) for e in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        if len(epochs) > 2:
            assert epochs[0].tolist() != epochs[1].tolist()


def test_a_longer_run_begins_as_a_shorter_one():
    long = mixture_order((7, 50), (0.5, 0.5), 1000, seed=0)
    assert mixture_order((7, 50), (0.5, 0.5), 90, seed=0).tolist() == long[:90].tolist()
    assert mixture_order((7, 50), (0.5, 0.5), 90, seed=1).tolist() != long[:90].tolist()


def test_templates_are_read_and_bad_ones_named(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("Short: {inputs}\n\n{inputs} {odd} TL;DR\n")
    assert read_templates(path) == ("Short: {inputs}", "{inputs} {odd} TL;DR")
    path.write_text("Short: {input}\n{inputs}\nShort:\n")
    with pytest.raises(ValueError, match=r"2 bad lines\n  line 1: .* has no {inputs}.*\n  line 3"):
        read_templates(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"templates.txt has no templates"):
        read_templates(path)
    with pytest.raises(ValueError, match="no templates to draw from"):
        with_templates(["a"], [], seed=0)


def test_each_example_draws_a_template_by_its_number_and_the_seed():
    known = ["A {inputs}", "{inputs} B {inputs}", "C {inputs}"]
    texts = [f"<{i}>" for i in range(300)]
    drawn = with_templates(texts, known, seed=0)
    assert drawn[:50] == with_templates(texts[:50], known, seed=0)
    assert drawn != with_templates(texts, known, seed=1)
    by_template = [[t.replace("{inputs}", text) for t in known] for text in texts]
    which = [options.index(said) for options, said in zip(by_template, drawn, strict=True)]
    assert np.bincount(which).min() > 70


def test_templates_change_the_input_of_an_example_and_nothing_else():
    plain = example("news", "a fire in Paris", "Paris")
    (changed,) = template_items([plain], ["Short: {inputs}"], tokenizer(), seed=0)
    assert changed.inputs == "Short: news"
    assert changed.input_ids == (*tokenizer().encode("Short: news").ids, tokenizer().eos_id)
    assert dataclasses.replace(changed, inputs="news", input_ids=plain.input_ids) == plain
    items = [Source("news", ("a", "b")), plain]
    source, _ = template_items(items, ["Short: {inputs}"], tokenizer(), seed=0)
    assert source == Source("Short: news", ("a", "b"))


def test_a_share_is_drawn_whatever_the_sizes():
    rates = with_share(mixing_rates([10, 30]), 0.2)
    assert rates == pytest.approx((0.2, 0.6, 0.2))
    drawn = mixture_order((10, 30, 5000), rates, 6400, seed=3)
    assert (drawn >= 40).mean() == pytest.approx(0.2, abs=0.02)
    for share in (0, 1, -0.5, math.nan):
        with pytest.raises(ValueError, match=r"keep_share is .*: above 0 and below 1"):
            with_share((1.0,), share)
