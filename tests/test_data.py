"""Files of marked outputs, spans to tokens, and the arrays that training takes."""

import dataclasses
import json
import re

import numpy as np
import pytest
from editing_samples import TEXTS, example, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from t5patches.editing import data
from t5patches.editing.data import (
    MOST_CHARACTERS,
    Example,
    Limits,
    Source,
    batch_indices,
    corrected_examples,
    largest_set,
    make_example,
    only_where_marked,
    pad_rows,
    read_examples,
    read_inputs,
    read_kept,
    said_is_pushed_down,
    to_arrays,
    token_mask,
    training_arrays,
    with_end,
    within,
    write_examples,
)
from t5patches.editing.other_text import read_other_text
from t5patches.editing.templates import read_templates
from t5patches.model.tokenizer import SentencePieceTokenizer
from t5patches.runs.files import write_file


def pieces(ids):
    return [tokenizer()._processor.id_to_piece(i) for i in ids]


def marked_pieces(e: Example):
    return [p for p, m in zip(pieces(e.output_ids), e.marked, strict=True) if m]


def mask_of(text: str, *spans):
    tokenized = tokenizer().encode(text)
    marks = token_mask(tokenized, spans)
    return [p for p, m in zip(pieces(tokenized.ids), marks, strict=True) if m]


# Spans to tokens.


def test_the_space_in_front_of_a_word_is_not_its_character():
    text = "fire in Paris was"
    space = text.index(" Paris")
    assert mask_of(text, (space, space + 1)) == []
    assert "".join(mask_of(text, (space, space + 2))).startswith("▁")
    assert "".join(mask_of(text, (0, space + 1))) == "▁fire▁in"


def test_a_space_that_is_a_token_is_its_own_character():
    text = "a € b"
    assert pieces(tokenizer().encode(text).ids)[:3] == ["▁a", "▁", "<0xE2>"]
    assert mask_of(text, (1, 2)) == ["▁"]
    assert mask_of(text, (2, 3)) == ["<0xE2>", "<0x82>", "<0xAC>"]


def test_every_byte_of_a_character_is_marked_and_no_neighbour():
    text = "日本 Paris 日"
    assert mask_of(text, (1, 2)) == ["<0xE6>", "<0x9C>", "<0xAC>"]
    assert mask_of(text, (0, 1)) == ["<0xE6>", "<0x97>", "<0xA5>"]
    assert mask_of(text, (len(text) - 1, len(text))) == ["<0xE6>", "<0x97>", "<0xA5>"]


def test_bytes_that_spell_nothing_are_marked_one_by_one():
    byte = tokenizer()._processor.piece_to_id
    said = tokenizer().decode([byte("<0xE2>"), byte("<0x82>"), byte("▁the")])
    assert said.text == "\ufffd\ufffd the"
    assert token_mask(said, [(0, 1)]) == (True, False, False)


def test_a_part_of_a_word_marks_the_tokens_that_it_touches_only():
    text = "in New York"
    start = text.index("York")
    tokenized = tokenizer().encode(text)
    for end in range(start + 1, len(text) + 1):
        marks = token_mask(tokenized, [(start, end)])
        for (a, b), mark in zip(tokenized.spans, marks, strict=True):
            assert mark == (max(a + (text[a:b][:1] == " "), start) < min(b, end))


def test_end_padding_and_ids_beyond_the_vocabulary_have_no_characters():
    ids = (*tokenizer().encode("the fire").ids, 1, 0, tokenizer().vocab_size + 7)
    said = tokenizer().decode(ids)
    assert said.text == "the fire"
    assert said.ids == ids
    assert token_mask(said, [(0, len(said.text))])[-3:] == (False, False, False)
    assert tokenizer().decode([]).text == ""
    assert tokenizer().decode([10**6]).spans == ((0, 0),)


words = st.sampled_from(
    [w for text in TEXTS for w in text.split()] + ["é", "日本", "ﬁre", "a\u0301"]
)
sentences = st.lists(st.tuples(words, st.sampled_from([" ", "  ", "-"])), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(sentences, st.data(), st.booleans())
def test_marked_are_the_tokens_with_a_character_in_the_span(parts, draw, generated):
    text = "".join(word + gap for word, gap in parts).strip()
    tokenized = tokenizer().encode(text)
    if generated:
        tokenized = tokenizer().decode(tokenized.ids)
    text = tokenized.text
    start = draw.draw(st.integers(0, len(text) - 1))
    end = draw.draw(st.integers(start + 1, len(text)))
    marks = token_mask(tokenized, [(start, end)])
    visible = {i for i in range(start, end) if not text[i].isspace()}
    covered = set()
    for (a, b), mark in zip(tokenized.spans, marks, strict=True):
        own = {i for i in range(a, b) if not text[i].isspace()} or set(range(a, b))
        assert mark == bool(own & set(range(start, end)))
        if mark:
            covered |= own
    assert visible <= covered


# Files.


def write_lines(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_examples_come_back_as_they_were_written(tmp_path):
    marked = example("news", "a fire in Paris", "Paris")
    position = marked.marked.index(True)
    said = make_example(
        "éü",
        # Generated tokens need not be those that the tokenizer would choose for the text.
        tokenizer().decode([*tokenizer().encode("in ").ids, *tokenizer().encode("日").ids[1:]]),
        [],
        tokenizer(),
    )
    examples = [
        marked,
        example("news", "in New York and Rome", "New York", "Rome"),
        make_example(
            "news",
            with_end(tokenizer().encode("a fire in Paris"), tokenizer()),
            [(10, 15)],
            tokenizer(),
            negatives={position: (7, 5)},
            corrected="a fire in the city",
        ),
        said,
        make_example("nothing said", tokenizer().decode([1]), [], tokenizer()),
    ]
    write_examples(tmp_path / "x.jsonl", examples)
    assert read_examples(tmp_path / "x.jsonl", tokenizer()) == examples
    assert list(tmp_path.iterdir()) == [tmp_path / "x.jsonl"]


def test_three_fields_mark_what_the_correction_does_not_repeat(tmp_path):
    def read(negative, corrected):
        fields = {"inputs": "x", "negative_targets": negative, "corrected_targets": corrected}
        return read_examples(write_lines(tmp_path / "x", fields), tokenizer())[0]

    def said(example):
        return "".join(marked_pieces(example)).replace("▁", "")

    replaced = read("a fire closed Paris in the library", "a fire closed London in the library")
    assert said(replaced) == "Paris"
    assert replaced.corrected == "a fire closed London in the library"
    # One word more or less does not mark all that follows.
    longer = read("the mayor of Rome sold the bridge", "the mayor of New York sold the bridge")
    assert said(longer) == "Rome"
    dropped = read("the mayor of Rome sold the bridge", "the mayor sold the bridge")
    assert said(dropped) == "ofRome"
    assert marked_pieces(read("the mayor of Rome", "the mayor of Rome")) == []
    assert replaced.marked[-1] is False  # the end token


def test_of_a_character_in_bytes_three_fields_mark_what_the_correction_does_not_repeat(tmp_path):
    """To forbid a byte that both have would forbid the correction."""
    fields = {"inputs": "x", "negative_targets": "a € b", "corrected_targets": "a ₤ b"}
    (read,) = read_examples(write_lines(tmp_path / "x", fields), tokenizer())
    assert marked_pieces(read) == ["<0xAC>"]


@pytest.mark.parametrize("outputs", ["in  Paris", "in Paris ", "ﬁre in Paris"])
def test_what_its_tokens_spell_otherwise_comes_back_as_it_was(outputs, tmp_path):
    line = {"inputs": "x", "outputs": outputs, "spans": [[len(outputs) - 5, len(outputs) - 1]]}
    read = read_examples(write_lines(tmp_path / "x", line), tokenizer())
    assert tokenizer().decode(read[0].output_ids).text != outputs
    write_examples(tmp_path / "y", read)
    assert read_examples(tmp_path / "y", tokenizer()) == read


SAID = tokenizer().encode("in Paris").ids[0]
GOOD = {"inputs": "x", "outputs": "in Paris", "spans": [[3, 8]]}
BAD_LINES = {
    "{": "not JSON (Expecting property name enclosed in double quotes at column 2)",
    "[1]": "a JSON object is needed, got list",
    "[" * 99_999: "not JSON that can be read: brackets within brackets too deep",
    '{"inputs": "x", "outputs": "in Rome", "spans": [], "inputs": "y"}': "'inputs' is there twice",
    '{"inputs": "x", "outputs": "in Paris", "spans": [[3, 8]], "edits": [{"position": 1, '
    '"ids": [5], "ids": [6]}]}': "'ids' is there twice: which of the two is meant?",
    json.dumps({"inputs": "x"}): "got the fields ['inputs']; needed are",
    json.dumps(GOOD | {"span": []}): "got the fields ['inputs', 'outputs', 'span', 'spans']",
    json.dumps(GOOD | {"inputs": " "}): "'inputs' must be a text that is not empty, got ' '",
    json.dumps(GOOD | {"outputs": ""}): "'outputs' must be a text that is not empty, got ''",
    json.dumps(GOOD | {"outputs": 3}): "'outputs' must be a text that is not empty, got 3",
    json.dumps(GOOD | {"inputs": "\ud800"}): "'inputs' holds half a character",
    json.dumps(GOOD | {"spans": 3}): "'spans' must be a list of [start, end], got 3",
    json.dumps(GOOD | {"spans": [[1]]}): "a span must be [start, end], two characters' numbers",
    json.dumps(GOOD | {"spans": [[True, 2]]}): "a span must be [start, end]",
    json.dumps(GOOD | {"spans": [[3, 9]]}): "span [3, 9] is not inside the output, which has 8",
    json.dumps(GOOD | {"spans": [[3, 3]]}): "give 0 <= start < end <= length",
    json.dumps(GOOD | {"spans": [[2, 3]]}): "span [2, 3] (' ') covers no token",
    json.dumps(GOOD | {"tokens": []}): "'tokens' must be a list of token ids, got []",
    json.dumps(GOOD | {"tokens": [3]}): "was the file made with another tokenizer?",
    json.dumps(GOOD | {"edits": {}}): "'edits' must be a list, got {}",
    json.dumps(GOOD | {"edits": [3]}): "an edit must be {'position': 3, 'ids': [17, 5]}, got 3",
    json.dumps(GOOD | {"edits": [{"position": 1, "ids": [-1]}]}): "must be whole numbers",
    json.dumps(GOOD | {"edits": [{"position": 0, "ids": [SAID]}]}): (
        f"position 0 push down {SAID}, which was said there, and no span covers it"
    ),
    json.dumps(GOOD | {"edits": [{"position": 99, "ids": [5]}]}): "position 99: the output has",
    json.dumps(GOOD | {"edits": [{"position": 1, "ids": [330]}]}): "the tokenizer has 330 ids",
    json.dumps(GOOD | {"edits": [{"position": 1, "ids": [5]}] * 2}): "two edits at position 1",
    json.dumps({"inputs": "x", "negative_targets": "in Rome", "corrected_targets": "in a Rome"}): (
        "there is nothing to push down"
    ),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=BAD_LINES.values())
def test_a_bad_line_is_named_by_number_and_reason(tmp_path, line):
    path = write_lines(tmp_path / "x.jsonl", GOOD, "", line)
    with pytest.raises(ValueError, match=re.escape(BAD_LINES[line])) as error:
        read_examples(path, tokenizer())
    assert "x.jsonl: 1 bad line\n" in str(error.value)
    assert "line 3:" in str(error.value)


def test_the_first_bad_lines_are_named_and_all_of_them_counted(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *BAD_LINES, GOOD)
    with pytest.raises(ValueError, match=f"{len(BAD_LINES)} bad lines") as error:
        read_examples(path, tokenizer())
    named = dict(enumerate(list(BAD_LINES.values())[:20], start=1))
    for number, reason in named.items():
        assert f"line {number}: " in str(error.value)
        assert reason in str(error.value)
    assert str(error.value).endswith(f"\n  and {len(BAD_LINES) - 20} more")


def test_what_a_bad_line_holds_is_told_shortly(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"inputs": "a", "outputs": "b", "spans": "c" * 10_000}))
    with pytest.raises(ValueError, match=r"line 1: 'spans' must be a list of") as error:
        read_examples(path, tokenizer())
    assert len(str(error.value)) < 1000


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "x.txt").write_bytes(mark + b"a fire\n" + mark + b"a flood\n")  # two files, joined
    assert read_inputs(tmp_path / "x.txt") == [Source("a fire"), Source("a flood")]
    (tmp_path / "x.jsonl").write_bytes(mark + b'{"inputs": "a fire"}\n')
    assert read_inputs(tmp_path / "x.jsonl") == [Source("a fire")]
    (tmp_path / "t.txt").write_bytes(mark + b"{inputs} TL;DR")
    assert read_templates(tmp_path / "t.txt") == ("{inputs} TL;DR",)


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.Jsonl", "x.ndjson"])
def test_json_lines_are_known_by_the_name_of_their_file(tmp_path, name):
    path = write_lines(tmp_path / name, {"inputs": "a fire"})
    assert read_inputs(path) == [Source("a fire")]
    assert read_kept(path, tokenizer()) == [Source("a fire")]
    path = write_lines(tmp_path / name, {"inputs": "a fire", "outputs": "in Paris"})
    (other,) = read_other_text(path, tokenizer(), tokenizer(), 99)
    assert (other.inputs, other.outputs) == ("a fire", "in Paris")


def test_lines_end_as_on_any_system(tmp_path):
    path = tmp_path / "x.txt"
    for text in (b"a fire\ra flood\r", b"a fire\r\n\r\na flood", b"a fire\n\ra flood\r\n"):
        path.write_bytes(text)
        assert read_inputs(path) == [Source("a fire"), Source("a flood")]
    path.write_bytes(b"a fire\r\n\xff\r")
    with pytest.raises(ValueError, match=r"1 bad line\n  line 2: not UTF-8"):
        read_inputs(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_text_in_utf16_is_refused_by_its_nul_bytes(tmp_path, encoding):
    (tmp_path / "x.txt").write_bytes("a fire\na flood".encode(encoding))
    with pytest.raises(ValueError, match=r"line 1: it holds a NUL byte, as text in UTF-16 does"):
        read_inputs(tmp_path / "x.txt")


def test_what_is_kept_has_no_correction(tmp_path):
    """Corrective fine-tuning would train on it, and not on the output that is to stay."""
    line = {"inputs": "a fire", "outputs": "in Paris", "corrected_targets": "in Rome"}
    path = write_lines(tmp_path / "x.jsonl", line)
    with pytest.raises(ValueError, match=r"line 1: 'corrected_targets' .* is kept: leave it out"):
        read_kept(path, tokenizer())


def test_lines_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "x").write_bytes(b'{"inputs": "\xff"}')
    with pytest.raises(ValueError, match=r"line 1: not UTF-8 \(invalid start byte at byte 12\)"):
        read_examples(tmp_path / "x", tokenizer())


def test_long_texts_and_empty_files_are_refused(tmp_path):
    path = write_lines(tmp_path / "x", GOOD, GOOD | {"meta": {"id": 7}})
    assert len(read_examples(path, tokenizer(), max_input_length=3, max_output_length=9)) == 2
    with pytest.raises(ValueError, match=r"line 2: 'outputs' has .* tokens and the limit is 2"):
        read_examples(path, tokenizer(), max_output_length=2)
    with pytest.raises(ValueError, match=r"line 1: 'inputs' has .* tokens and the limit is 1"):
        read_examples(path, tokenizer(), max_input_length=1)
    with pytest.raises(ValueError, match="has no examples"):
        read_examples(write_lines(tmp_path / "y", ""), tokenizer())


LONG = "a fire closed the library in Paris"
LIMITS = {
    # What limits leave of inputs of 18 and 5 tokens: their lengths, and what is told.
    (None, None): ([18, 5], "nothing is longer"),
    (18, 18): ([18, 5], "nothing is longer"),
    (9, None): ([9, 5], "1 inputs truncated to 9 tokens"),
    (None, 17): ([5], "1 of more than 17 tokens left out"),
    (4, 17): ([4], "1 inputs truncated to 4 tokens, 1 of more than 17 tokens left out"),
}


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_what_is_too_long_is_cut_or_left_out(limits):
    (lengths, said), limits = LIMITS[limits], Limits(*limits)
    texts = [LONG, "a fire"]
    sources = within([Source(text, ("x",)) for text in texts], limits, tokenizer())
    examples = within([example(text, "in Paris", "Paris") for text in texts], limits, tokenizer())
    assert [len(e.input_ids) for e in examples.kept] == lengths
    for source, e in zip(sources.kept, examples.kept, strict=True):
        assert source == Source(e.inputs, ("x",))
        assert e.input_ids == (*tokenizer().encode(e.inputs).ids, tokenizer().eos_id)
        assert any(text.startswith(e.inputs) for text in texts)
        assert any(e.marked)
    assert said in sources.text(limits) == examples.text(limits)


def test_long_outputs_are_left_out_too_and_something_is_left():
    both = [example("a fire", LONG), example("a fire", "in Paris")]
    assert within(both, Limits(skip_longer=17), tokenizer()).kept == both[1:]
    with pytest.raises(ValueError, match="all of 2 are longer than 2 tokens"):
        within(both, Limits(skip_longer=2), tokenizer())
    with pytest.raises(ValueError, match="truncate_inputs is 1: at least 2 is needed"):
        Limits(truncate_inputs=1)
    with pytest.raises(ValueError, match="has no beginning of 2 tokens"):  # of three bytes
        within([Source("\u20ac" * 9)], Limits(truncate_inputs=2), tokenizer())


@pytest.mark.parametrize(
    ("name", "line", "read"),
    [
        ("x.txt", "a", lambda path: read_inputs(path)),
        ("x.jsonl", json.dumps({"inputs": "a"}), lambda path: read_inputs(path)),
        ("x.jsonl", json.dumps(GOOD), lambda path: read_examples(path, None)),
        ("x.txt", "{inputs} a", read_templates),
    ],
)
def test_a_line_without_end_is_refused_before_it_is_tokenised(tmp_path, name, line, read):
    (tmp_path / name).write_text(line.replace("a", "a" * (MOST_CHARACTERS + 1), 1) + "\n")
    with pytest.raises(ValueError, match=rf"{name}: 1 bad line\n  line 1: it has 1000\d\d\d char"):
        read(tmp_path / name)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_file(path, "good")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, "half")
    assert path.read_text() == "good"


# Arrays.


def test_arrays_hold_what_the_losses_need():
    examples = [example("some news", "in Paris", "Paris"), example("x", "in the library in Rome")]
    arrays = to_arrays(examples, pad_id=0)
    first = examples[0].output_ids
    n = len(first)
    assert arrays["outputs"][0, :n].tolist() == list(first)
    assert arrays["weights"][0, :n].tolist() == [-1 if m else 1 for m in examples[0].marked]
    assert not arrays["weights"][0, n:].any()
    assert arrays["weights"][1].all()
    assert arrays["inputs"][1].tolist()[:2] == [*tokenizer().encode("x").ids][:2]
    assert {a.dtype for a in arrays.values()} == {np.dtype("int32"), np.dtype("float32")}
    assert "edit_ids" not in arrays


def test_sets_hold_the_token_that_was_said_then_the_likeliest():
    base = example("x", "in Paris", "Paris")
    position = base.marked.index(True)
    said = base.output_ids[position]
    e = make_example(
        "x",
        tokenizer().decode(base.output_ids),
        base.spans,
        tokenizer(),
        negatives={position: (9, said, 8, 7)},
    )
    arrays = to_arrays([e], pad_id=0, negatives=3)
    assert arrays["edit_ids"][0, position].tolist() == [said, 9, 8]
    assert to_arrays([e], pad_id=0, negatives=6)["edit_ids"][0, position].tolist() == [
        said,
        9,
        8,
        7,
        -1,
        -1,
    ]
    assert (arrays["edit_ids"][0, ~np.array(e.marked)] == -1).all()
    assert not arrays["edit_factors"].any()
    assert arrays["edit_factors"].dtype == np.float32


def test_sets_where_nothing_is_marked_are_without_what_was_said():
    base = example("x", "a fire in Paris", "Paris")
    at = base.marked.index(True)
    e = dataclasses.replace(base, negatives={0: (9, 8, 7), 1: (), at: (6,)})
    for size, first in ((2, [9, 8]), (4, [9, 8, 7, -1])):
        arrays = to_arrays([e], pad_id=0, negatives=size)
        assert arrays["edit_ids"][0, 0].tolist() == first
        assert arrays["edit_ids"][0, at, :2].tolist() == [base.output_ids[at], 6]
        assert (arrays["edit_ids"][0, 1] == -1).all()
        pushed = [-1 if i == 0 or m else 1 for i, m in enumerate(base.marked)]
        assert arrays["weights"][0].tolist() == pushed
        assert said_is_pushed_down(arrays)[0].tolist() == [*base.marked]
    # They are for sets: the token that was said is to be kept, and so is everything for a margin
    # against it.
    plain = to_arrays([base], pad_id=0)["weights"]
    np.testing.assert_array_equal(said_is_pushed_down(to_arrays([e], pad_id=0)), plain < 0)
    assert [largest_set([e]), largest_set([base]), largest_set([only_where_marked(e)])] == [3, 0, 2]
    np.testing.assert_array_equal(to_arrays([e], pad_id=0)["weights"], plain)
    assert only_where_marked(e) == dataclasses.replace(base, negatives={at: (6,)})
    arrays = training_arrays([e], tokenizer(), "ftpo", pad_id=0, negatives=2)
    np.testing.assert_array_equal(arrays["weights"], plain)
    assert (arrays["edit_ids"][0, 0] == -1).all()


def test_corrections_replace_marked_outputs():
    clean, marked = example("x", "in Rome"), example("x", "in Paris", "Paris")
    with pytest.raises(ValueError, match=r"1 of 2 examples .*\(the first is number 2\)"):
        corrected_examples([clean, marked], tokenizer())
    fixed = make_example(
        "x", tokenizer().decode(marked.output_ids), marked.spans, tokenizer(), corrected="in Rome"
    )
    assert corrected_examples([clean, fixed], tokenizer()) == [clean, clean]
    same = dataclasses.replace(fixed, corrected="in Paris")
    with pytest.raises(ValueError, match=r"example 2 has .* output as it is, 'in"):
        corrected_examples([fixed, same], tokenizer())
    assert corrected_examples([dataclasses.replace(clean, corrected="in Rome")], tokenizer())


def test_array_errors():
    with pytest.raises(ValueError, match="there are no examples"):
        to_arrays([], pad_id=0)
    with pytest.raises(ValueError, match="a text has 3 tokens and the length is 2"):
        pad_rows([[1], [1, 2, 3]], 0, length=2)


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 20), st.integers(0, 3))
def test_batches_are_permutations_one_after_the_other(count, size, steps, seed):
    drawn = [i for s in range(steps + 1) for i in batch_indices(count, size, s, seed)]
    for epoch in range(len(drawn) // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))
    again = batch_indices(count, size, steps, seed)
    assert drawn[steps * size :] == again.tolist()


def test_a_vocabulary_without_padding_is_refused():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="pad id -1 and eos id 2, and both are needed"):
        SentencePieceTokenizer(model.getvalue())
