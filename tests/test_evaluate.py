"""Measures of an edit against numbers worked out by hand or by another way."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from editing_samples import example, logits, tiny_model, tiny_params, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU

from t5patches.editing.annotate import pattern, speak
from t5patches.editing.data import Example, to_arrays
from t5patches.editing.evaluate import (
    Measure,
    Measuring,
    Meter,
    differs,
    diversity,
    evaluate,
    kept_divergence,
    malformed,
    over_seeds,
    own_measures,
    prevalence,
    quality,
    ratio,
    read_original,
    say,
    scores_of_several,
    similarity,
)
from t5patches.editing.words import words
from t5patches.model.decoder.model import small_decoder

pytestmark = pytest.mark.usefixtures("shared_programs")

BEFORE = [
    example("a", "a fire in Paris", "Paris"),
    example("b", "the mayor sold the bridge in New York", "New York"),
    example("c", "a flood hit the library"),
    example("d", "London is near the river"),
]
AFTER = [
    example("a", "a fire in the library"),
    example("b", "the mayor sold the bridge in Rome", "Rome"),
    example("c", "a flood hit the library"),
    example("d", "London is near"),
]


def saying(texts):
    """An output to each of as many inputs."""
    return [Example(str(i), text, (), (), (1,), (False,)) for i, text in enumerate(texts)]


def test_prevalence_counts_outputs_and_tokens():
    found = prevalence(BEFORE)
    assert found["prevalence"].value == 50
    marked = sum(sum(e.marked) for e in BEFORE)
    assert found["prevalence_tokens"].value == pytest.approx(
        100 * marked / sum(len(e.marked) for e in BEFORE)
    )


def test_similarity_of_the_same_outputs_is_whole():
    found = similarity(BEFORE, BEFORE)
    assert {name: round(m.value, 9) for name, m in found.items()} == {
        "bleu": 100,
        "rouge_l": 100,
        "exact_match": 100,
        "exact_match_clean": 100,
    }
    assert all(m.error == pytest.approx(0, abs=1e-9) for m in found.values())


def test_outputs_to_an_input_that_is_there_again_make_nothing_surer():
    def measured(times):
        before, after = BEFORE * times, AFTER * times
        references = [[e.outputs] for e in before]
        return prevalence(after) | similarity(after, before) | quality(after, references)

    once, again = measured(1), measured(30)
    assert {k: m.value for k, m in again.items()} == pytest.approx(
        {k: m.value for k, m in once.items()}
    )
    for name, measure in once.items():
        # BLEU of four outputs is not linear; its bootstrap alone would be 5 times too small.
        close = 0.4 if "bleu" in name else 1e-9
        assert again[name].error == pytest.approx(measure.error, rel=close), name
    # To fewer inputs no measure of one time is alike.
    assert math.isnan(prevalence(BEFORE[:1] * 5)["prevalence"].error)


def test_similarity_of_changed_outputs():
    found = similarity(AFTER, BEFORE)
    assert found["exact_match"].value == 25
    assert found["exact_match_clean"].value == 50  # one of the two that had nothing unwanted
    # Longest common subsequences: 3 of 4 and 5 words, 6 of 8 and 7, 5 of 5, 3 of 5 and 3.
    f = [2 * 3 / (4 + 5), 2 * 6 / (8 + 7), 1, 2 * 3 / (5 + 3)]
    assert found["rouge_l"].value == pytest.approx(100 * np.mean(f))
    assert 40 < found["bleu"].value < 90
    assert found["bleu"].error > 0


SCRIPTS = {
    # A text, one that has half of its words, and one that has none of them.
    "English": ("the mayor's 2nd fire", "the mayor's own car", "in Paris"),
    "Russian": ("Пожар в Париже", "Пожар в Риме уже", "Она спала"),
    "Hindi": ("राम हिन्दी में पढ़ता", "राम हिन्दी था सोता", "रामायण"),
    "Arabic": ("حريق في باريس", "حريق في روما ليلا", "نامت"),
    "Korean": ("파리 박물관 화재", "파리 박물관 홍수 뉴스", "서울"),
    "Japanese": ("火事で閉鎖", "火事で雨", "東京"),
    "Thai": ("ไฟไหม้", "ไฟไป", "ปลา"),
    "one word": ("yes", "yes no", "no"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_similarity_is_by_words_of_any_script(script):
    same, half, other = (saying([text] * 3) for text in SCRIPTS[script])
    found = [similarity(new, same) for new in (same, half, other)]
    for name in ("bleu", "rouge_l"):
        whole, part, nothing = (measures[name] for measures in found)
        assert (whole.value, whole.error) == (100, 0)
        assert 10 < part.value < 80
        assert nothing.value == 0


@settings(max_examples=30)
@given(
    st.lists(
        st.text(st.sampled_from("aZ9 .'é\u0301राम火ไ่가🙂\n"), max_size=9), min_size=2, max_size=4
    )
)
def test_equal_texts_are_whole_and_others_are_not_above(texts):
    same = saying(texts)
    for found in (similarity(same, same), quality(same, [["x", text] for text in texts])):
        assert {(m.value, m.error) for name, m in found.items() if name != "exact"} == {(100, 0)}
    turned = similarity(same[::-1], same)
    assert all(0 <= turned[name].value <= 100 + 1e-9 for name in ("bleu", "rouge_l"))


ENGLISH = [
    "The mayor's 2nd \"re-election\" (2019-20) cost $3,400.50; wasn't it?",
    "A U.S. e_mail at 12:30pm -- ‘quoted’, it’s said…\tThree\nlines!",
    "the mayor sold the bridge in New York for £2.5m, she said",
]


def test_words_and_scores_of_english_are_the_libraries_own():
    assert [words(text) for text in ENGLISH] == [*map(DefaultTokenizer().tokenize, ENGLISH)]
    new = [text.replace("the", "a") for text in ENGLISH]
    found = similarity(saying(new), saying(ENGLISH))
    assert found["bleu"].value == BLEU().corpus_score(new, [ENGLISH]).score
    scorer = RougeScorer(["rougeL"])
    overlap = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(new, ENGLISH, strict=True)]
    assert found["rouge_l"].value == pytest.approx(100 * np.mean(overlap))


def test_outputs_must_be_paired():
    with pytest.raises(ValueError, match="got 3 new and 4 original outputs"):
        similarity(AFTER[:3], BEFORE)
    with pytest.raises(ValueError, match="at least one is needed"):
        read_original(tiny_model(), tiny_params(), [])


def test_empty_outputs_score_nothing_and_break_nothing():
    empty = [example("a", " "), example("b", " ")]
    found = similarity(empty, BEFORE[:2])
    assert found["bleu"].value == 0
    assert math.isnan(found["bleu"].error)
    assert found["rouge_l"].value == 0


def test_malformed_outputs_never_end_or_are_empty_or_break_the_form():
    endless = example("x", "a fire")
    endless = type(endless)(**vars(endless) | {"output_ids": endless.output_ids[:-1]})
    outputs = [*BEFORE, endless, example("x", " ")]
    assert malformed(outputs, tokenizer()).value == pytest.approx(100 * 2 / 6)
    found = malformed(outputs, tokenizer(), lambda text: text.startswith("a "))
    assert found.value == pytest.approx(100 * 4 / 6)


def test_quality_is_by_the_best_of_the_references():
    references = [["a fire in Rome"], ["x", "the mayor sold the bridge in Rome"], ["y"], ["London"]]
    found = quality(AFTER, references)
    assert found["reference_exact"].value == 25
    # Longest common subsequences: 3 of 5 and 4, all 7, none, 1 of 3 and 1.
    f = [2 * 3 / (5 + 4), 1, 0, 2 * 1 / (3 + 1)]
    assert found["reference_rouge_l"].value == pytest.approx(100 * np.mean(f))
    assert 20 < found["reference_bleu"].value < 90
    one = quality(AFTER, [[e.outputs] for e in AFTER])
    assert {round(m.value, 9) for m in one.values()} == {100}
    with pytest.raises(ValueError, match=r"1 of 4 inputs have no references.*number 3\)"):
        Measuring(references=[["a"], ["b"], [], ["c"]])
    with pytest.raises(ValueError, match="got 4 outputs and references to 3"):
        quality(AFTER, [["a"]] * 3)


def test_the_meter_takes_the_mean_and_the_worst_of_several():
    meter = Meter(lambda texts: [float(text) for text in texts], samples=3, threshold=0.5)
    outputs = ["0.1", "0.2", "0.5", "0.4", "0.0", "0.3"]
    found = scores_of_several(outputs, meter, [*"aaabbb"])
    assert found["score_mean"].value == pytest.approx(0.25)
    assert found["score_maximum"].value == pytest.approx(0.45)
    assert found["score_maximum"].error == pytest.approx(0.05)
    assert found["score_probability"].value == 50
    for scorer in (lambda texts: [0.5], lambda texts: [math.nan] * len(texts)):
        with pytest.raises(ValueError, match="a finite one for each is needed"):
            scores_of_several(["a", "b"], Meter(scorer, samples=2), ["a", "a"])
    with pytest.raises(ValueError, match="samples is 0"):
        Meter(len, samples=0)


def test_diversity_and_its_error_by_leaving_out_one_output_at_a_time():
    texts = ["a b a b c", "a b", "d", "", "c c c", "a b"]

    def found(texts):
        return diversity([Example("", text, (), (), (), ()) for text in texts])

    all_of_them = found(texts)
    assert all_of_them["distinct_1"].value == pytest.approx(100 * 4 / 13)
    assert all_of_them["distinct_2"].value == pytest.approx(100 * 4 / 8)  # ab ba bc cc
    assert all_of_them["repetition"].value == pytest.approx(100 * 2 / 8)  # ab, cc
    for name in ("distinct_1", "distinct_2"):
        without = [found(texts[:i] + texts[i + 1 :])[name].value for i in range(len(texts))]
        jackknife = math.sqrt(5 / 6 * sum((x - np.mean(without)) ** 2 for x in without))
        assert all_of_them[name].error == pytest.approx(jackknife)
    assert math.isnan(found(["", ""])["distinct_1"].value)
    assert math.isnan(found(["a b"])["distinct_1"].error)


MODELS = {
    "T5": tiny_model(),
    "decoder": small_decoder(vocab_size=336, width=16, layers=1, begin_id=0, end_ids=(1,)),
}


@functools.cache
def params_of(model, seed):
    return jax.jit(model.init)(jax.random.key(seed))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_divergence_is_the_mean_over_kept_tokens(model):
    params, original = params_of(model, 0), params_of(model, 1)
    arrays = to_arrays(BEFORE, pad_id=model.config.pad_id)
    log_probs = jax.jit(lambda tree: jax.nn.log_softmax(logits(model, tree, arrays)))
    log_p, log_q = (np.asarray(log_probs(tree), np.float64) for tree in (params, original))
    kl = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    kept = arrays["weights"] > 0
    read = read_original(model, original, BEFORE, batch_size=3)
    found = kept_divergence(model, params, read)
    assert found.value == pytest.approx(kl[kept].mean(), rel=1e-4)
    assert kept_divergence(model, original, read).value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_said_at_one_reading_is_what_is_said_at_several(model):
    rule, params = pattern(r"\S*[aeo]\S*"), params_of(model, 0)
    inputs = [f"news {i}" for i in range(5)]
    asks = {"max_length": 6, "batch_size": 4, "seed": 2}
    measuring = Measuring(rule, meter=Meter(len, samples=3), samples=2, **asks)
    said = say(model, params, inputs, tokenizer(), measuring)

    def alone(**how):
        return speak(model, params, inputs, rule, tokenizer(), **measuring.asks, **how)

    assert said.greedy == alone()
    assert said.sampled == alone(temperature=1.0, samples=2)
    assert len(
        own_measures(said, dataclasses.replace(measuring, meter=None))["prevalence_sampled"].samples
    ) == len(inputs)
    assert said.scored == alone(temperature=1.0, samples=3)
    assert said.sampled != said.greedy
    without = say(model, params, inputs, tokenizer(), dataclasses.replace(measuring, rule=None))
    assert [e.output_ids for e in without.greedy] == [e.output_ids for e in said.greedy]
    assert without.sampled == []


def test_ratios_and_their_errors():
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    assert ratio(values).value == values.mean()
    assert ratio(values).error == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    # As many tokens in each example: the same as a mean over examples.
    assert ratio(values, np.full(5, 2)).error == pytest.approx(ratio(values / 2).error)
    assert ratio([1.0], [2.0]).value == 0.5
    assert math.isnan(ratio([1.0]).error)
    assert math.isnan(ratio([0.0], [0.0]).value)


def test_the_error_of_a_ratio_is_that_of_repeated_experiments():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, (2000, 100))
    hits = rng.binomial(lengths, rng.beta(2, 5, (2000, 100)))
    found = [ratio(*row) for row in zip(hits, lengths, strict=True)]
    assert np.mean([m.error for m in found]) == pytest.approx(
        np.std([m.value for m in found]), rel=0.05
    )


def test_measures_of_the_same_examples_are_compared_in_pairs():
    rng = np.random.default_rng(0)
    common = rng.normal(size=200)
    a, b = ratio(common), ratio(common + 0.02 * rng.random(200))
    assert differs(a, b) == -1
    assert differs(b, a) == 1
    # Not in pairs, the difference is lost in the scatter.
    assert differs(a, dataclasses.replace(b, samples=None)) == 0
    assert differs(a, a) == 0


def test_a_difference_is_claimed_in_one_case_of_twenty_where_there_is_none():
    rng = np.random.default_rng(1)
    for count in (2, 5, 100):
        claims = [differs(*map(ratio, rng.normal(size=(2, count)))) != 0 for _ in range(4000)]
        assert 0.04 < np.mean(claims) < 0.06
    # Without scatter the sign alone speaks, and it takes six to be right 19 times in 20.
    for count in (1, 2, 5):
        assert differs(ratio([0.0] * count), ratio([1.0] * count)) == 0
    # Nor is rounding scatter.
    assert differs(ratio([0.1, 0.2, 0.3]), ratio([0.2, 0.3, 0.4])) == 0
    assert differs(ratio([1000 / 30, 1100 / 30]), ratio([900 / 30, 1000 / 30])) == 0
    assert differs(ratio([0.0] * 6), ratio([1.0] * 6)) == -1


def test_shares_of_a_ratio_average_to_it():
    found = ratio([1.0, 0.0, 2.0], [3.0, 1.0, 4.0])
    assert found.samples.mean() == pytest.approx(found.value)
    assert found.samples.std(ddof=1) / math.sqrt(3) == pytest.approx(found.error)


def test_seeds_replace_the_error_over_examples():
    assert over_seeds([Measure(3.0, 0.5)]) == Measure(3.0, 0.5)
    assert over_seeds([Measure(3.0, 0.5), Measure(5.0, 0.1)]) == Measure(4.0, 1.0)


def test_evaluation_compares_what_both_models_say():
    rule, model = pattern(r"\S*[aeo]\S*"), tiny_model()
    inputs = [f"news {i}" for i in range(6)]
    before = speak(model, tiny_params(1), inputs, rule, tokenizer(), max_length=6)
    asked = Measuring(rule, max_length=6)
    original = read_original(model, tiny_params(1), before)
    same = evaluate(model, tiny_params(1), original, tokenizer(), asked)
    assert same.outputs == before
    assert same.measures["exact_match"].value == 100
    assert same.measures["kl"].value == pytest.approx(0, abs=1e-6)
    strict = dataclasses.replace(asked, well_formed=lambda text: False)
    other = evaluate(model, tiny_params(0), original, tokenizer(), strict)
    assert other.measures["kl"].value > 0
    assert other.measures["malformed"].value == 100
    assert other.measures["exact_match"].value < 100
    assert [e.inputs for e in other.outputs] == inputs
    plain = Measuring(
        max_length=6,
        references=[[text] for text in inputs],
        meter=Meter(lambda texts: [len(text) for text in texts], samples=2, threshold=1e9),
    )
    plain = evaluate(model, tiny_params(0), original, tokenizer(), plain)
    assert plain.measures["score_probability"].value == 0
    assert plain.measures["score_maximum"].value > 0
    assert set(plain.measures) == {
        "kl",
        "reference_bleu",
        "reference_rouge_l",
        "reference_exact",
        "score_mean",
        "score_maximum",
        "score_probability",
        "bleu",
        "rouge_l",
        "exact_match",
        "malformed",
    }
    assert not any(example.spans for example in plain.outputs)
    assert set(other.measures) == {
        "kl",
        "prevalence",
        "prevalence_tokens",
        "prevalence_sampled",
        "bleu",
        "rouge_l",
        "exact_match",
        "exact_match_clean",
        "malformed",
    }
