"""The two files that a T5's tokenizer comes in, and what is beside them."""

import json
import os
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from t5patches.model.huggingface import config_file
from t5patches.model.t5.model import small_t5
from t5patches.model.tokenizer import SentencePieceTokenizer, train_sentencepiece
from t5patches.model.tokenizer_files import load_tokenizer

# Made with the original library: tests/data/make_hf_t5.py.
FOLDER = Path(__file__).parent / "data" / "tokenizer"
MODEL = train_sentencepiece(["a cat sat on a mat"] * 9, 20)
MODEL_TOKENIZER = SentencePieceTokenizer(MODEL)


def test_tokenizer_json_gives_the_original_librarys_ids():
    tokenizer = load_tokenizer(FOLDER)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (27, 0, 1)
    for text, ids in json.loads((FOLDER / "expected.json").read_text()):
        assert [*tokenizer.encode(text).ids, 1] == ids
    found = tokenizer.encode("a cat")
    assert [found.text[start:end] for start, end in found.spans] == ["a", " cat"]
    assert tokenizer.decode(found.ids).text == "a cat"
    assert tokenizer.decode([4, 25]).text == "a<extra_id_1>"


def folder_of(tmp_path, spiece=MODEL, **files):
    """A `spiece.model` of 20 pieces, and JSON beside it."""
    (tmp_path / "spiece.model").write_bytes(spiece)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def config_of(rows):
    """Of a model whose embedding has so many rows."""
    return config_file(small_t5(vocab_size=rows, width=4, layers=1))


def sentinels(folder):
    """The numbers of those that a text may have, in the order of their ids, from piece 20 on."""
    found = load_tokenizer(folder)
    assert found.encode("cat").ids == MODEL_TOKENIZER.encode("cat").ids
    texts = [found.decode([i]).text for i in range(20, found.vocab_size)]
    for i, text in enumerate(texts, 20):
        assert found.encode(f"a{text}").ids[-1] == i
    return [int(text.removeprefix("<extra_id_")[:-1]) for text in texts]


def test_spiece_model_goes_first_and_gets_its_sentinels(tmp_path):
    whole = [*reversed(range(100))]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert sentinels(folder_of(tmp_path)) == whole
    assert sentinels(folder_of(tmp_path, tokenizer_config={"extra_ids": 3})) == [2, 1, 0]
    assert sentinels(folder_of(tmp_path, tokenizer_config={"extra_ids": 0})) == []
    folder = folder_of(tmp_path, tokenizer_config={})
    assert sentinels(folder) == whole
    # No more than the embedding has rows for.
    for rows in (20, 30, 128):
        (folder / "config.json").write_text(config_of(rows))
        assert sentinels(folder) == whole[: rows - 20]
    listed = [{"id": 20, "content": "<extra_id_1>"}, {"id": 21, "content": "<extra_id_0>"}]
    assert sentinels(folder_of(folder, tokenizer={"added_tokens": listed})) == [1, 0]


def test_a_spiece_model_may_have_sentinels_of_its_own(tmp_path):
    model = sentencepiece_model_pb2.ModelProto.FromString(MODEL)
    model.pieces.add(piece="▁<extra_id_0>", score=-9.0, type=1)  # as mT5's
    assert load_tokenizer(folder_of(tmp_path, model.SerializeToString())).vocab_size == 21


ADDED = {"<pad>": 0, "{": 120, "}": 121}
TOKENS = [{"id": i, "content": text} for text, i in ADDED.items()]


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": ADDED},
        {"tokenizer_config": {"added_tokens_decoder": {str(x["id"]): x for x in TOKENS}}},
        {"tokenizer_config": {"extra_ids": 100}, "tokenizer": {"added_tokens": TOKENS}},
        None,
    ],
)
def test_a_text_is_split_at_added_tokens(files, tmp_path):
    if files is None:  # tokenizer.json alone
        tokens = [{"id": 27, "content": "{"}, {"id": 28, "content": "}"}]
        original = json.loads((FOLDER / "tokenizer.json").read_text())["added_tokens"]
        found = load_tokenizer(changed(tmp_path, added_tokens=[*original, *tokens]))
    else:
        found = load_tokenizer(folder_of(tmp_path, **files))
    begin, end = found.vocab_size - 2, found.vocab_size - 1
    a, cat = found.encode("a").ids, found.encode("cat").ids
    # As transformers has it: what is between two is a text of its own.
    for text, ids, pieces in (
        ("{ a cat }", (begin, *a, *cat, end), "{|a| cat|}"),
        ("{cat", (begin, *cat), "{|cat"),
        ("a{ cat{}", (*a, begin, *cat, begin, end), "a|{|cat|{|}"),
    ):
        got = found.encode(text)
        assert got.ids == ids
        words, at = [text[i:j] for i, j in got.spans], 0
        assert "".join(words) == pieces.replace("|", "")
        for start, stop in got.spans:
            assert at <= start <= stop
            at = stop
    assert found.decode(found.encode("{ a cat }").ids).text == "{ a cat}"


def test_added_tokens_of_another_model_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"its piece 9 is '.*', and the files beside it have '{'"):
        load_tokenizer(folder_of(tmp_path, added_tokens={"{": 9}))


def test_an_added_token_beyond_the_embedding_is_told(tmp_path):
    (tmp_path / "config.json").write_text(config_of(121))
    with pytest.raises(ValueError, match=r"add '}' with id 121, .* 121 rows: resize_token_embedd"):
        load_tokenizer(folder_of(tmp_path, added_tokens=ADDED))


def changed(tmp_path, **changes):
    found = json.loads((FOLDER / "tokenizer.json").read_text()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "BPE", "vocab": {}}}, "its model is 'BPE' and T5's are 'Unigram'"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer {'type': 'Lowercase'} is none"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "its pre-tokenizer {'type': 'ByteLevel'}"),
    ],
)
def test_other_kinds_are_refused(changes, message, tmp_path):
    with pytest.raises(NotImplementedError, match=r"tokenizer.json: ") as error:
        load_tokenizer(changed(tmp_path, **changes))
    assert message in str(error.value)


def test_steps_that_sentencepiece_takes_by_itself_are_known(tmp_path):
    joins = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    steps = {"type": "Sequence", "normalizers": [strip, joins]}
    tokenizer = load_tokenizer(changed(tmp_path, normalizer=steps, pre_tokenizer=None))
    assert tokenizer.encode(" a   cat ").ids == load_tokenizer(FOLDER).encode("a cat").ids


def test_files_that_cannot_be_read_are_named(tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)

    refused(r"holds neither spiece.model nor tokenizer.json \(found: \[\]\)")
    (tmp_path / "tokenizer.json").write_text("{")
    refused(r"tokenizer.json cannot be read \(JSONDecodeError")
    changed(tmp_path, model={"type": "Unigram"})
    refused(r"tokenizer.json cannot be read \(KeyError: 'vocab'\)")
    for content in (b"", MODEL[:-9], b"\xff" * 30):
        (tmp_path / "spiece.model").write_bytes(content)
        refused(r"spiece.model cannot be read")
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 3}')
    refused(r"spiece.model cannot be read \(DecodeError")


def test_a_folder_of_another_kind_is_not_told_to_get_a_t5s_file(tmp_path):
    said = tmp_path / "tokenizer_config.json"
    said.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(NotImplementedError, match="its tokenizer is a ByT5Tokenizer, and of T5"):
        load_tokenizer(tmp_path)
    said.write_text('{"tokenizer_class": "T5TokenizerFast"}')
    with pytest.raises(ValueError, match="copy the model's own tokenizer there"):
        load_tokenizer(tmp_path)


def model_of(**changes):
    found = json.loads((FOLDER / "tokenizer.json").read_text())["model"] | changes
    return json.dumps({"model": found})


SPOILT = {
    # file, content, what is said
    "null": ("tokenizer_config.json", "null", "config.json must hold an object, got 'None'"),
    "list": ("tokenizer_config.json", "[3]", r"config.json must hold an object, got '\[3\]'"),
    "many": (
        "tokenizer_config.json",
        '{"extra_ids": 100000000}',
        "has 100000000 extra_ids: a number from 0",
    ),
    "fewer": ("tokenizer_config.json", '{"extra_ids": -1}', "has -1 extra_ids"),
    "text": ("tokenizer_config.json", '{"extra_ids": "3"}', "has '3' extra_ids"),
    "deep": ("tokenizer_config.json", "[" * 99_999, "config.json cannot be read .RecursionError"),
    "pipe": ("tokenizer_config.json", None, "is no file but a pipe or device"),
    "no model": ("tokenizer.json", '{"model": null}', "tokenizer.json cannot be read"),
    "a list": ("tokenizer.json", "[]", "tokenizer.json cannot be read"),
    "nothing": ("tokenizer.json", "null", "tokenizer.json cannot be read"),
    "deep json": ("tokenizer.json", "[" * 99_999, "tokenizer.json cannot be read .RecursionError"),
    "unk_id": ("tokenizer.json", model_of(unk_id=10**6), "tokenizer.json cannot be read"),
    "no unk_id": ("tokenizer.json", model_of(unk_id=None), "tokenizer.json cannot be read"),
    "pieces": ("tokenizer.json", model_of(vocab=[1, 2]), "tokenizer.json cannot be read"),
    "scores": ("tokenizer.json", model_of(vocab=[["a", "b"]]), "tokenizer.json cannot be read"),
    "pipe of json": ("tokenizer.json", None, "is no file but a pipe or device"),
    "a folder": ("tokenizer.json", Path, "is no file but a folder"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files_are_told_in_a_line(case, tmp_path):
    name, content, message = SPOILT[case]
    if name == "tokenizer_config.json":
        (tmp_path / "spiece.model").write_bytes(MODEL)
    if content is None:
        os.mkfifo(tmp_path / name)
    elif content is Path:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
