"""Rules, marks on generated text, and sets of negatives found by rollouts."""

import re
import time

import jax
import numpy as np
import pytest
from editing_samples import example, logits, tiny_model, tiny_params, tokenizer

from t5patches.editing import annotate as annotate_module
from t5patches.editing.annotate import (
    absent_from_source,
    annotate,
    bare_name,
    capitalized_names,
    expand_negatives,
    find_spans,
    pattern,
    until_end,
    whole_part,
    whole_words,
    word_list,
)
from t5patches.editing.data import pad_rows, to_arrays, token_mask
from t5patches.model.generate import generate


def found(rule, output, inputs=""):
    return [output[a:b] for a, b in find_spans(rule, inputs, output)]


def test_word_lists_match_whole_words_and_the_longest_phrase():
    rule = word_list(["new york", "new york city", "york", "c++"])
    assert found(rule, "New York City, Yorkshire, york. C++ and c+++") == [
        "New York City",
        "york",
        "C++",
        "c++",
    ]
    assert found(rule, "new\n york") == ["new\n york"]
    assert found(word_list(["York"], ignore_case=False), "york York") == ["York"]


@pytest.mark.parametrize(
    ("word", "text", "marked"),
    [
        ("cafe", "cafe\u0301 cafe", ["cafe"]),
        ("caf\u00e9", "Cafe\u0301, caf\u00e9", ["Cafe\u0301", "caf\u00e9"]),
        ("cafe\u0301 noir", "caf\u00e9 noir", ["caf\u00e9 noir"]),
        ("don't", "I don’t, don't", ["don’t", "don't"]),
        ("don’t", "I don’t, don't", ["don’t", "don't"]),
        ("राम", "रामायण राम रामा", ["राम"]),
        ("سلام", "سلامٌ سلام", ["سلام"]),
        ("❤", "❤\ufe0f", ["❤"]),
        ("東京", "私は東京都に住む。東京", ["東京", "東京"]),
        ("กรุงเทพ", "ฉันอยู่กรุงเทพฯ", ["กรุงเทพ"]),
        ("ที", "ที่นี่ ที", ["ที"]),
        ("GPT", "私はGPTと、GPTs", ["GPT"]),
    ],
)
def test_words_are_whole_with_their_marks_and_found_in_scripts_without_spaces(word, text, marked):
    assert found(word_list([word]), text) == marked
    assert found(pattern(whole_words(word)), word) == [word]


def test_patterns_mark_a_group():
    assert found(pattern(r"aged (\d+)", group=1), "aged 52, aged x") == ["52"]
    assert found(pattern(r"(?P<n>\d+) people", group="n"), "12 people") == ["12"]
    assert found(pattern(r"x*"), "axxb") == ["xx"]
    assert found(pattern("A", flags=re.IGNORECASE), "a") == ["a"]


def test_names_are_runs_of_capitalised_words_but_not_sentence_starts():
    text = 'The mayor of New York met Ann-Marie O\'Hara. Paris is far. "Yes," said Éva.'
    assert found(capitalized_names, text) == ["New York", "Ann-Marie O'Hara", "Éva"]
    assert found(capitalized_names, "nothing here") == []
    text = (
        'The list:\n- Councils met Ann\n- They… Then I, as I\'m told, said, "We lost World War I"'
    )
    assert found(capitalized_names, text) == ["Ann", "World War I"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("They met Mr. Smith, Gov. Brown and Dr Jones.", ["Mr. Smith", "Gov. Brown", "Dr Jones"]),
        ("Mr. Smith and J. K. Rowling left. Ann stayed.", ["Smith", "J. K. Rowling"]),
        ("It was in St. Ives at 5 p.m. Monday.", ["St. Ives", "Monday"]),
        ("the U.S. Navy, the U.S.'s ships", ["U.S. Navy", "U.S"]),
        ("a line of Mr.\nThen nobody, of Room 5. Then nobody", ["Mr", "Room"]),
        ('He said, \'We met Ann.\' She said "We met Bo" ("They did")', ["Ann", "Bo"]),
        ("He said ‘We met Ann’ and «Nous avons» to the boys' Uncle", ["Ann", "Uncle"]),
        ('the film "Titanic" and the “Big Apple”', ["Titanic", "Big Apple"]),
        ('the "big" Apple', ["Apple"]),
    ],
)
def test_names_with_titles_and_initials_and_words_that_begin_a_quotation(text, names):
    assert found(capitalized_names, text) == names


def test_an_invented_name_behind_a_title_is_found():
    rule = absent_from_source()
    assert found(rule, "The mayor met Mr. Smith.", "met Mr. Brown") == ["Mr. Smith"]
    assert found(rule, "The mayor met Mr. Brown.", "met Mr Brown") == []


def test_names_are_found_in_time_that_grows_as_the_text():
    """Of 30000 dots, looking from each of them at each name takes half a minute."""
    began = time.process_time()
    text = "." * 30_000 + " A b A b A b"
    assert found(capitalized_names, text) == ["A", "A"]
    assert found(capitalized_names, "the E\u0301va Zoe\u0308 of it") == ["E\u0301va Zoe\u0308"]
    assert time.process_time() - began < 2


def test_a_name_is_the_same_with_an_article_and_a_possessive():
    for text, name in {
        "the Tory Party's": "Tory Party",
        "The Alps'": "Alps",
        "An Englishman": "Englishman",
        "Ann’s": "Ann",
        "Theo": "Theo",
        "O'Hara": "O'Hara",
        "A": "A",
        "the": "the",
    }.items():
        start, end = bare_name(text, (0, len(text)))
        assert text[start:end] == name
    assert bare_name("by Ann's", (3, 8)) == (3, 6)
    rule = absent_from_source()
    assert found(rule, "Praise for Ann Lee's win and Bob's.", "Ann Lee won") == ["Bob"]
    assert found(rule, "Praise for Ann.", "Ann's win") == []


def test_absent_names_are_those_the_source_does_not_hold_as_words():
    rule = absent_from_source()
    assert found(rule, "A fire in New York.", "in new  york today") == []
    assert found(rule, "A fire in York.", "in Yorkshire") == ["York"]
    assert found(rule, "A fire in York New.", "in New York") == ["York New"]
    strict = absent_from_source(word_list(["Rome"]), ignore_case=False)
    assert found(strict, "in Rome", "rome") == ["Rome"]
    assert found(absent_from_source(word_list(["राम"])), "राम", "रामायण") == ["राम"]
    assert found(rule, "in Ame\u0301lie", "to Am\u00e9lie") == []
    cities = absent_from_source(word_list(["東京", "大阪"]))
    assert found(cities, "東京と大阪", "東京都に") == ["大阪"]
    signs = absent_from_source(pattern(r"[😀€]|C[+#]*|St\.? Ives|\$\d+"))
    assert found(signs, "So 😀 cheap € in St. Ives, C", "I 😀 pay €, St Ives, C") == []
    assert found(signs, "So 😀 cheap €, C++ C# C $5", "C, 5") == ["😀", "€", "C++", "C#"]


def test_any_callable_will_do_for_a_rule():
    def first_word(inputs, output):
        return np.array([[0, len(output.split()[0])]])

    assert find_spans(first_word, "", "aa b") == [(0, 2)]


def test_rules_are_told_what_is_wrong_with_them():
    with pytest.raises(TypeError, match="got the string 'Paris': put it in a list"):
        word_list("Paris")
    for words in ([], ["a", " "]):
        with pytest.raises(ValueError, match="a word list needs words"):
            word_list(words)
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        pattern("(")
    with pytest.raises(ValueError, match="'a' has no group 1: it has 0 groups"):
        pattern("a", group=1)
    with pytest.raises(ValueError, match=r"returned the span \[1, 9\] for an output of 3 char"):
        find_spans(lambda i, o: [(1, 9)], "", "abc")
    with pytest.raises(ValueError, match=r"returned 5: .* characters are needed"):
        find_spans(lambda i, o: [5], "", "abc")


def test_generated_rows_end_with_their_end_token():
    assert until_end(np.array([[5, 1, 0], [5, 6, 7], [1, 0, 0]]), 1) == [(5, 1), (5, 6, 7), (1,)]


def test_annotation_marks_the_generated_tokens():
    ids = (*tokenizer().encode("a fire in New York").ids, 1)
    rule = absent_from_source(word_list(["New York", "Paris"]))
    marked, clean = annotate(["news", "from New York"], [ids, ids], tokenizer(), rule)
    assert marked.output_ids == ids
    assert marked.outputs == "a fire in New York"
    assert marked.spans == ((10, 18),)
    assert marked.marked == token_mask(tokenizer().decode(ids), [(10, 18)])
    assert not any(clean.marked)
    with pytest.raises(ValueError, match="got 1 inputs and 2 outputs"):
        annotate(["news"], [ids, ids], tokenizer(), rule)


@pytest.mark.parametrize(
    ("said", "judged"),
    [("we saw Ann and Bo", "we saw Ann and "), ("Bo", ""), ("Bo.", "Bo."), ("", ""),
     ("in Ann's", "in Ann'"), ("雨が降る。東京", "雨が降る。東京"),
     ("राम हिन्दी", "राम "), ("ภาษาที่", "ภาษาที่")],
)  # fmt: skip
def test_a_word_that_the_length_cut_off_is_not_judged(said, judged):
    ids = tokenizer().encode(said).ids
    seen = []
    rows = [ids, (*ids, 1)]
    annotate(["news"] * 2, rows, tokenizer(), lambda inputs, output: seen.append(output) or ())
    assert seen == [judged, said]


@pytest.mark.parametrize("cut", ["\ufffd", "\ufffd\ufffd", "é\ufffd"])
def test_a_word_that_the_length_cut_off_within_a_letter_is_not_judged(cut):
    """A byte-level piece may be a part of a letter, which is read as U+FFFD."""
    assert whole_part(f"I met Ren{cut}", [5], tokenizer()) == "I met "
    assert whole_part(f"I met Ren{cut}", [5, 1], tokenizer()) == f"I met Ren{cut}"
    assert whole_part(f"so \ufffd{cut}.", [5], tokenizer()) == f"so \ufffd{cut}."


def test_rollouts_are_judged_by_whole_words_too():
    """Cut after the alternative, a word may become any other; at its end it is what it is."""
    ids = (*tokenizer().encode("a fire in Rome").ids, 1)
    rule = word_list(["Rome", "Rom"])
    (marked,) = annotate(["news"], [ids], tokenizer(), rule)
    at = marked.marked.index(True)
    assert annotate_module._forbids(rule, "news", ids, at, tokenizer())
    assert not annotate_module._forbids(rule, "news", ids[:-1], at, tokenizer())


@pytest.fixture(scope="module", params=[False, True], ids=["marked", "everywhere"])
def expanded(request):
    """Rollouts of an untrained model under a rule that forbids words with some letters."""
    rule = pattern(r"\S*[aeo]\S*")
    rng = np.random.default_rng(0)
    outputs = [(*map(int, rng.integers(3, 330, 6)), 1) for _ in range(5)]
    inputs = [f"news {i}" for i in range(5)]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        examples = annotate(inputs, outputs, tokenizer(), rule)
        found = expand_negatives(
            examples,
            rule,
            tokenizer(),
            tiny_model(),
            tiny_params(),
            count=6,
            max_length=8,
            everywhere=request.param,
            batch_size=12,
        )
    return rule, examples, found, request.param


def test_negatives_are_the_alternatives_whose_rollout_the_rule_forbids(expanded):
    rule, examples, found, everywhere = expanded
    scores = np.asarray(logits(tiny_model(), tiny_params(), to_arrays(examples, pad_id=0)))
    p = np.asarray(jax.nn.softmax(scores))
    places = [
        (i, at)
        for i, e in enumerate(examples)
        for at, said in enumerate(e.output_ids)
        if e.marked[at] or (everywhere and p[i, at, said] < 0.99)
    ]
    assert everywhere == any(not examples[i].marked[at] for i, at in places)
    assert len(places) > 4
    tried = []
    for number, position in places:
        e = examples[number]
        order = np.argsort(-scores[number, position], kind="stable").tolist()
        likely = [i for i in order if i not in (0, 1, e.output_ids[position])][:6]
        tried += [(number, position, i) for i in likely]
    rows = generate(
        tiny_model(),
        tiny_params(),
        pad_rows([examples[n].input_ids for n, _, _ in tried], 0),
        max_length=8,
        prefixes=pad_rows([(*examples[n].output_ids[:p], i) for n, p, i in tried], 0),
    )
    expected = {place: [] for place in places}
    for (number, position, candidate), ids in zip(tried, until_end(rows, 1), strict=True):
        said = tokenizer().decode(ids)
        # A rollout that was cut off ends where its last word begins, cut within a letter or not.
        text = said.text if 1 in ids else re.sub(r"\w*\ufffd*$", "", said.text, count=1)
        spans = find_spans(rule, examples[number].inputs, text)
        if token_mask(said, spans)[position]:
            expected[number, position].append(candidate)
    for (number, position), ids in expected.items():
        assert list(found[number].negatives.get(position, ())) == ids
    # Both kinds occur, or the test shows nothing.
    assert 0 < sum(map(len, expected.values())) < len(tried)


def test_rows_of_the_model_that_are_no_token_are_not_tried():
    """A T5 has 32128 rows for 32100 tokens."""
    wide = tiny_model(vocab_size=340)
    args = (
        tiny_params(vocab_size=340),
        to_arrays([example("x", "in Paris", "Paris")], pad_id=0),
        wide,
    )
    every, known = (
        np.asarray(annotate_module._likeliest_others(*args, size, 320)[0])
        for size in (340, tokenizer().vocab_size)
    )
    assert every.max() >= tokenizer().vocab_size
    assert known.max() < tokenizer().vocab_size


def test_rollouts_change_nothing_but_the_negatives(expanded):
    _, examples, found, everywhere = expanded
    for before, after in zip(examples, found, strict=True):
        assert before.marked == after.marked
        assert before.output_ids == after.output_ids
        assert everywhere or all(after.marked[p] for p in after.negatives)
        assert all(after.output_ids[p] not in ids for p, ids in after.negatives.items())


def test_a_rollout_may_end_early(expanded):
    rule, examples, _, _ = expanded
    seen = {None: [], 1: []}
    for length, outputs in seen.items():

        def shown(inputs, output, outputs=outputs):
            outputs.append(output)
            return rule(inputs, output)

        how = {"count": 2, "max_length": 8, "rollout_length": length}
        expand_negatives(examples, shown, tokenizer(), tiny_model(), tiny_params(), **how)
    pairs = list(zip(*seen.values(), strict=True))
    assert all(whole.startswith(early) for whole, early in pairs)
    assert any(whole != early for whole, early in pairs)


def test_nothing_marked_needs_no_rollouts(monkeypatch):
    monkeypatch.setattr(annotate_module, "generate", None)
    clean = [example("x", "in Paris")]
    rule = word_list(["Rome"])
    args = (clean, rule, tokenizer(), tiny_model(), tiny_params())
    assert expand_negatives(*args, count=2, max_length=8) == clean
    for count in (0, 328):
        with pytest.raises(ValueError, match=f"count is {count}: from 1 to 327 alternatives"):
            expand_negatives(*args, count=count, max_length=8)
