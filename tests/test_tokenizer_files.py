"""The two files that a T5's tokenizer comes in."""

import json
import os
import shutil
from pathlib import Path

import pytest

from t5patches.model.tokenizer import train_sentencepiece
from t5patches.model.tokenizer_files import load_tokenizer

# Made with the original library: tests/data/make_hf_t5.py.
FOLDER = Path(__file__).parent / "data" / "tokenizer"
MODEL = train_sentencepiece(["a cat sat on a mat"] * 9, 20)


def test_tokenizer_json_gives_the_original_librarys_ids():
    tokenizer = load_tokenizer(FOLDER)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (27, 0, 1)
    for text, ids in json.loads((FOLDER / "expected.json").read_text()):
        assert [*tokenizer.encode(text).ids, 1] == ids
    found = tokenizer.encode("a cat")
    assert [found.text[start:end] for start, end in found.spans] == ["a", " cat"]
    assert tokenizer.decode(found.ids).text == "a cat"
    assert tokenizer.decode([4, 25]).text == "a<extra_id_1>"


def test_spiece_model_goes_first_and_gets_its_sentinels(tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "spiece.model").write_bytes(MODEL)
    tokenizer = load_tokenizer(tmp_path)  # tokenizer_config.json: "extra_ids": 3
    assert tokenizer.vocab_size == 23
    assert tokenizer.encode("a<extra_id_0>").ids[-1] == 22
    assert tokenizer.encode("a<extra_id_2>").ids[-1] == 20
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).vocab_size == 20


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


def model_of(**changes):
    found = json.loads((FOLDER / "tokenizer.json").read_text())["model"] | changes
    return json.dumps({"model": found})


SPOILT = {
    # file, content, what is said
    "null": ("tokenizer_config.json", "null", "beside it must hold an object, got None"),
    "list": ("tokenizer_config.json", "[3]", r"beside it must hold an object, got \[3\]"),
    "many": (
        "tokenizer_config.json",
        '{"extra_ids": 100000000}',
        "has 100000000 extra_ids: a number from 0",
    ),
    "fewer": ("tokenizer_config.json", '{"extra_ids": -1}', "has -1 extra_ids"),
    "text": ("tokenizer_config.json", '{"extra_ids": "3"}', "has '3' extra_ids"),
    "deep": ("tokenizer_config.json", "[" * 99_999, "spiece.model cannot be read .RecursionError"),
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
