"""Tokenizers of decoder-only folders: ids as the library has them, and the characters of each."""

import itertools
import json
import time
import unicodedata
import warnings

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_samples import CONTROLS, KINDS, gpt2_files, tokenizer_json, tokenizer_model
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors

from t5patches.editing.data import token_mask
from t5patches.model.decoder.model import small_decoder
from t5patches.model.folder import check_tokenizer, warn_of_few_ids
from t5patches.model.huggingface import read_config, save_checkpoint
from t5patches.model.tokenizer import Message, SentencePieceTokenizer, SpecialIds
from t5patches.model.tokenizer_files import load_tokenizer
from t5patches.model.tokenizer_json import JsonTokenizer

# Their ids say all that was in the text.
LOSSLESS = ("byte-level", "byte-level, NFC", "bytes, prepended", "bytes, as it is", "sentencepiece")
END = CONTROLS.index("</s>")

# "▁" is how pieces spell a space, and is read as one.
texts = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=30) | st.lists(
    st.sampled_from(
        ["a fire", " ", "  ", "é", "👩‍🚀", "日本", "\n", "e\u0301", "</s>", "Paris", "."]
    ),
    max_size=9,
).map("".join)


def tokenizer(kind):
    if kind == "sentencepiece":
        return SentencePieceTokenizer(tokenizer_model(), SpecialIds(-1, (2,), (1,)))
    return JsonTokenizer(tokenizer_json(kind), (END,))


def library(kind):
    """The original, which is to take no control token from a text."""
    found = Tokenizer.from_str(tokenizer_json(kind).decode())
    found.encode_special_tokens = True
    return found


ALL = (*KINDS, "sentencepiece")
loaded = {kind: tokenizer(kind) for kind in ALL}
libraries = {kind: library(kind) for kind in KINDS}


def pieces(found):
    return [found.text[start:end] for start, end in found.spans]


def cover(found):
    """Whether the spans go through the text from its beginning to its end, with no gap."""
    reached = 0
    for start, end in (span for span in found.spans if span[0] < span[1]):
        assert start <= reached <= end
        reached = max(reached, end)
    return reached == len(found.text)


@pytest.mark.parametrize("kind", ALL)
@given(text=texts)
def test_ids_are_the_librarys_and_characters_are_exact(kind, text):
    found = loaded[kind].encode(text)
    if kind in libraries:
        expected = libraries[kind].encode(text, add_special_tokens=False).ids
        assert found.ids == tuple(expected)
    assert found.text == text
    assert len(found.spans) == len(found.ids)
    assert all(0 <= start <= end <= len(text) for start, end in found.spans)
    composed = "NFC" not in kind or unicodedata.is_normalized("NFC", text)
    if kind in LOSSLESS and composed:
        # The library's offsets and the bytes of the tokens say the same of every character.
        assert loaded[kind].decode(found.ids) == found
        assert cover(found)


@pytest.mark.parametrize("kind", ALL)
@given(data=st.data())
def test_any_ids_decode_to_the_librarys_text(kind, data):
    size = loaded[kind].vocab_size
    ids = data.draw(st.lists(st.integers(-1, size + 3) | st.integers(size - 256, size - 1)))
    found = loaded[kind].decode(ids)
    assert found.ids == tuple(ids)
    assert cover(found)
    if kind in libraries:
        known = [i for i in ids if 0 <= i < size]
        assert found.text == libraries[kind].decode(known, skip_special_tokens=True)
        special = range(len(CONTROLS))
        assert all(s == e for i, (s, e) in zip(ids, found.spans, strict=True) if i in special)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("byte-level", "the fire", ["the", " fire"]),
        ("byte-level", " 日.", [" ", "日", "日", "日", "."]),
        ("byte-level", "é\n", ["é", "\n"]),
        ("byte-level with a space in front", "日", ["", "日", "日", "日"]),
        ("byte-level, NFC", "e\u0301", ["e\u0301"]),
        ("bytes, prepended", "日", ["", "日", "日", "日"]),
        ("bytes, first", "日", ["", "日", "日", "日"]),
        ("bytes, as it is", "日 a", ["日", "日", "日", " ", "a"]),
        ("words", "the  fire", ["the", "  fi", "re"]),
        ("sentencepiece", "日", ["", "日", "日", "日"]),
    ],
)
def test_what_a_token_covers(kind, text, expected):
    assert pieces(loaded[kind].encode(text)) == expected


def test_bytes_that_are_no_character_are_covered():
    found = loaded["byte-level"]
    first, *_, last = found.encode("日").ids
    broken = found.decode([last, first, last, *found.encode("日").ids, first])
    assert broken.text == "\ufffd\ufffd日\ufffd"
    assert broken.spans == ((0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (3, 4))
    # Where the library's decoder takes bytes one by one, each is a replacement character.
    found = loaded["bytes, as it is"]
    first, second, last = found.encode("日").ids
    broken = found.decode([first, second, *found.encode("a").ids, first])
    assert broken.text == "\ufffd\ufffda\ufffd"
    assert broken.spans == ((0, 1), (1, 2), (2, 3), (3, 4))


@pytest.mark.parametrize("kind", ["byte-level", "bytes, prepended", "sentencepiece"])
def test_a_marked_character_marks_all_its_tokens_and_no_space(kind):
    found = loaded[kind].encode("the 日 fire")
    marked = token_mask(found, [(4, 5)])
    assert [piece for piece, here in zip(pieces(found), marked, strict=True) if here] == ["日"] * 3


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "unigram"])
@pytest.mark.parametrize("name", CONTROLS)
def test_no_text_is_a_control_token(kind, name):
    found = loaded[kind]
    ids = {i for text, i in found.controls.items() if text != "<unk>"}
    assert len(ids) == 2 if kind == "sentencepiece" else 4
    assert not ids & {*found.encode(f"a {name} b").ids}
    assert not ids & {*found.encode_prompt(f"{name} b")[len(found.special.before) :]}


@pytest.mark.parametrize("kind", LOSSLESS)
@given(parts=st.lists(st.sampled_from([*CONTROLS[:2], "a", " ", "the fire", "é"])))
def test_a_template_in_pieces_is_what_it_is_as_a_whole(kind, parts):
    """A mark that stands in no control token changes nothing."""
    text = "".join(parts)
    if kind in libraries:
        whole = libraries[kind]
        whole.encode_special_tokens = False
        expected = tuple(whole.encode(text, add_special_tokens=False).ids)
        whole.encode_special_tokens = True
        assert loaded[kind].encode_template(text) == expected
        assert loaded[kind].encode_template(f"{text}~", "~") == expected
    ids = loaded[kind].encode_template(text)
    assert [i for i in ids if i in loaded[kind].controls.values()] == [
        loaded[kind].controls[part] for part in parts if part in CONTROLS
    ]


def test_a_marked_control_token_is_text():
    for kind in (*LOSSLESS, "bytes, first"):
        found = loaded[kind]
        end, begin = found.controls["</s>"], found.controls["<s>"]
        ids = found.encode_template("<s>a <~/s></s>", "~")
        assert (ids[0], ids[-1], ids.count(end)) == (begin, end, 1)
        assert found.decode(ids).text == "a </s>"
    # Whether what follows a control token begins anew, the folder says.
    joined = SentencePieceTokenizer(tokenizer_model(), SpecialIds(-1, (2,), (1,)), joined=True)
    assert joined.encode_template("<s>a") == (1, joined._processor.piece_to_id("a"))
    assert loaded["sentencepiece"].encode_template("<s>a") == (1, *joined.encode("a").ids)


def test_what_follows_a_marked_control_token_goes_on_after_any_steps():
    """A step that puts a space in front may be one of several."""
    found = json.loads(tokenizer_json("bytes, first"))
    steps = [found["pre_tokenizer"], {"type": "Sequence", "pretokenizers": []}]
    found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    nested = JsonTokenizer(json.dumps(found).encode(), (END,))
    text = "<|im_start|>a fire<|im_end|>b "
    want = loaded["bytes, first"].encode_template(f"{text}<~s>", "~")
    assert nested.encode_template(f"{text}<~s>", "~") == want
    assert nested.encode_template(text) == loaded["bytes, first"].encode_template(text)


@pytest.mark.parametrize("sides", [("lstrip",), ("rstrip",), ("lstrip", "rstrip")])
def test_special_tokens_take_the_spaces_beside_them_in_pieces_too(sides):
    found = json.loads(tokenizer_json("byte-level"))
    for token in found["added_tokens"][2:]:
        token |= dict.fromkeys(sides, True)
    spaced = JsonTokenizer(json.dumps(found).encode(), (END,))
    text = "<s> <|im_start|>\n a </s>  the <|im_end|> \n<|im_start|><|im_end|>  b"
    assert spaced.encode_template(f"{text}~", "~") == spaced.encode_template(text)
    assert spaced.encode_template(text) != loaded["byte-level"].encode_template(text)


def test_a_file_neither_cuts_nor_fills_up():
    original = Tokenizer.from_str(tokenizer_json("byte-level").decode())
    original.enable_truncation(3)
    original.enable_padding(length=9)
    found = JsonTokenizer(original.to_str().encode(), (END,))
    assert found.encode("a fire in Paris") == loaded["byte-level"].encode("a fire in Paris")


# Folders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model without a tokenizer: ends are 3 and 1, the first token is 0."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    model = small_decoder(vocab_size=400, width=8, layers=1, end_ids=(3, 1), begin_id=0)
    save_checkpoint(folder, model, model.init(jax.random.key(0)))
    return folder


@pytest.fixture
def folder(weights, tmp_path):
    """Its `config.json` beside a byte-level `tokenizer.json`."""
    (tmp_path / "config.json").write_bytes((weights / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json("byte-level"))
    return tmp_path


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def with_template(single):
    original = Tokenizer.from_str(tokenizer_json("byte-level").decode())
    names = [(name, i) for i, name in enumerate(CONTROLS)]
    original.post_processor = processors.TemplateProcessing(single=single, special_tokens=names)
    return original.to_str().encode()


@pytest.mark.parametrize(
    ("post_processor", "config", "before"),
    [
        (None, {}, ()),
        (None, {"bos_token": "<s>"}, ()),
        (None, {"bos_token": "<s>", "add_bos_token": True}, (0,)),
        (None, {"bos_token": {"content": "<s>"}, "add_bos_token": True}, (0,)),
        ("<s> $A", {}, (0,)),
        ("<s> $A </s>", {"bos_token": "<s>"}, (0,)),
        # It goes before `add_bos_token`, which the library does not read beside this file.
        ("<s> $A", {"bos_token": "<s>", "add_bos_token": False}, (0,)),
        ("$A </s>", {"bos_token": "<s>", "add_bos_token": True}, ()),
    ],
)
def test_what_stands_in_front_of_a_prompt(post_processor, config, before, folder):
    if post_processor:
        (folder / "tokenizer.json").write_bytes(with_template(post_processor))
    found = load_tokenizer(write(folder, tokenizer_config=config))
    assert found.encode_prompt("a fire") == (*before, *found.encode("a fire").ids)
    assert (found.pad_id, found.eos_id, found.end_ids, found.chat) == (-1, 3, (3, 1), None)
    with pytest.raises(ValueError, match="'messages' are for a model's chat template, and the mod"):
        found.encode_prompt((Message("user", "a fire"),))


SPACED = "byte-level with a space in front"


@pytest.mark.parametrize(
    ("kind", "class_", "said", "put"),
    [
        ("byte-level", "GPT2TokenizerFast", True, 1),
        ("byte-level", "Qwen2Tokenizer", True, 1),
        (SPACED, "GPTNeoXTokenizer", False, 0),
        (SPACED, "GPTNeoXTokenizer", None, 1),
        ("bytes, first", "LlamaTokenizerFast", False, 0),
        ("bytes, prepended", "LlamaTokenizer", False, 0),
        ("bytes, prepended", "LlamaTokenizer", True, 1),
        ("bytes, as it is", "LlamaTokenizer", True, 1),
        # The library does what the file says.
        ("byte-level", "LlamaTokenizer", True, 0),
        ("byte-level", "PreTrainedTokenizerFast", True, 0),
        ("bytes, first", "PreTrainedTokenizerFast", False, 1),
        ("bytes, as it is", "GemmaTokenizer", True, 0),
        (SPACED, None, False, 1),
        ("sentencepiece", "LlamaTokenizer", False, 0),
        ("sentencepiece", "GemmaTokenizer", False, 1),
    ],
)
def test_whether_a_text_gets_a_space_in_front(kind, class_, said, put, folder, request):
    if kind == "sentencepiece":
        folder = request.getfixturevalue("llama")
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_bytes(tokenizer_json(kind))
    write(folder, tokenizer_config={"tokenizer_class": class_, "add_prefix_space": said})
    found = load_tokenizer(folder)
    assert len(found.encode("日").ids) == 3 + put
    assert found.decode(found.encode("日 the").ids).text.lstrip() == "日 the"


def test_end_ids_come_from_both_files(folder):
    config = json.loads((folder / "config.json").read_text())
    write(folder, config=config | {"eos_token_id": 1}, generation_config={"eos_token_id": [3, 1]})
    found = load_tokenizer(folder)
    assert (found.eos_id, found.end_ids) == (1, (1, 3))
    assert found.decode([*found.encode("a fire").ids, 3]).text == "a fire"


@pytest.mark.parametrize("file", ["added_tokens", "tokenizer_config"])
def test_added_tokens_that_only_the_files_beside_it_have(file, folder):
    """As the library adds them: template's markers, for one."""
    markers = {"<|user|>": 330, "<|assistant|>": 331}
    said = {"eos_token": "</s>", "additional_special_tokens": [*markers]}
    if file == "tokenizer_config":
        listed = {str(i): {"content": text, "special": True} for text, i in markers.items()}
        listed["400"] = {"content": "<|image|>", "special": True}  # of no row
        write(folder, tokenizer_config=said | {"added_tokens_decoder": listed})
    else:
        write(folder, added_tokens=markers, tokenizer_config=said)
    found = load_tokenizer(folder)
    assert markers.items() <= found.controls.items()
    assert found.encode_template("<|user|>a<|assistant|>")[::2] == (330, 331)
    assert not {330, 331} & {*found.encode("<|user|>a").ids}


def test_an_added_token_with_another_id_is_told(folder):
    write(folder, added_tokens={"<|user|>": 335})
    with pytest.raises(
        ValueError, match=r"no added token '<\|user\|>', .* id 335, where 330 is next"
    ):
        load_tokenizer(folder)


def test_special_tokens_beyond_the_embedding_are_no_ids_of_a_text(folder):
    """Gemma 3's text models have one for images."""
    original = Tokenizer.from_str(tokenizer_json("byte-level").decode())
    original.add_special_tokens([f"<image {i}>" for i in range(100)])
    (folder / "tokenizer.json").write_text(original.to_str())
    config = json.loads((folder / "config.json").read_text())
    write(folder, config=config | {"vocab_size": 360})
    found = load_tokenizer(folder)
    check_tokenizer(found, read_config(folder).config, folder)
    assert found.vocab_size == 330
    assert found.decode([329, 399, 421]).text == found.decode([329]).text


@pytest.mark.parametrize("rows", [366, 367, 32000])
def test_far_fewer_ids_than_rows_are_told_once(rows, folder):
    """A tokenizer of another model may have this one's special ids."""
    config = json.loads((folder / "config.json").read_text())
    write(folder, config=config | {"vocab_size": rows})
    found, config = load_tokenizer(folder), read_config(folder).config
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            warn_of_few_ids(found, config, folder)
    said = [str(warning.message) for warning in told]
    more = f"{folder}: the tokenizer has 330 ids and the model's embedding {rows} rows, far more "
    so = "than it needs: make sure that the tokenizer is this model's"
    assert said == [more + so] * (rows > 366)


# A `tokenizer.model`


@pytest.fixture
def llama(weights, tmp_path):
    """A sentencepiece model of 330 pieces; it ends with 2."""
    config = json.loads((weights / "config.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    ids = {"eos_token_id": 2, "bos_token_id": 1}
    said = {"bos_token": "<s>", "eos_token": "</s>"}
    return write(tmp_path, config=config | ids, tokenizer_config=said)


def test_a_tokenizer_model_is_read(llama):
    found = load_tokenizer(llama)
    assert (found.pad_id, found.eos_id, found.end_ids, found.vocab_size) == (-1, 2, (2,), 330)
    assert found.encode_prompt("a fire") == (1, *found.encode("a fire").ids)
    assert found.decode([1, *found.encode("a fire").ids, 0, 2, 329]).text.startswith("a fire")
    write(llama, tokenizer_config={"add_bos_token": False, "eos_token": "</s>"})
    assert load_tokenizer(llama).encode_prompt("a fire") == found.encode("a fire").ids


def test_added_tokens_join_a_tokenizer_model(llama):
    config = json.loads((llama / "config.json").read_text())
    write(
        llama,
        config=config | {"eos_token_id": [331, 2]},
        added_tokens={"<|im_start|>": 330, "<|im_end|>": 331, "<tool>": 333},
        special_tokens_map={"additional_special_tokens": ["<|im_start|>"]},
        tokenizer_config={
            "eos_token": "<|im_end|>",
            "legacy": False,
            "added_tokens_decoder": {
                "1": {"content": "<s>", "special": True},
                "331": {"content": "<|im_end|>", "special": True},
                "9999": {"content": "<image>", "special": True},
            },
        },
    )
    found = load_tokenizer(llama)
    assert (found.vocab_size, found.eos_id) == (334, 331)
    assert {"<|im_start|>": 330, "<|im_end|>": 331}.items() <= found.controls.items()
    assert not {330, 331} & {*found.encode("a <|im_start|> b <|im_end|>").ids}
    assert 333 in found.encode("a<tool>b").ids  # no special token: a piece of text
    assert found.decode([330, 333, 331]).text == "<tool>"
    assert found.encode_template("<|im_start|>a<|im_end|>")[::2] == (330, 331)


def test_an_added_token_begins_no_text_anew(llama):
    """No space is put in front of it, nor, unless the folder is of the old kind, behind it."""
    for legacy in (False, True):
        write(
            llama,
            added_tokens={"<tool>": 330},
            tokenizer_config={"eos_token": "</s>", "legacy": legacy},
        )
        found = load_tokenizer(llama)
        rest = found.encode("a fire").ids
        joined = SentencePieceTokenizer(tokenizer_model(), SpecialIds(-1, (2,), (1,)), joined=True)
        behind = rest if legacy else joined.encode_template("<s>a fire")[1:]
        assert found.encode("<tool>a fire").ids == (330, *behind)
        assert found.encode("a fire<tool>").ids == (*rest, 330)
        assert found.encode("a<tool>").spans == ((0, 1), (1, 7))


def test_an_added_token_that_takes_spaces_wants_a_tokenizer_json(llama):
    token = {"content": "<tool>", "special": True, "rstrip": True}
    said = {"eos_token": "</s>", "added_tokens_decoder": {"330": token}}
    with pytest.raises(NotImplementedError, match="'<tool>' takes the white space beside it"):
        load_tokenizer(write(llama, tokenizer_config=said))


@pytest.mark.parametrize(("said", "anew"), [({}, True), ({"legacy": False}, False)])
def test_a_mistrals_files_are_taken_as_they_are(said, anew, llama):
    """The library does not go by the class that they name, and its default for `legacy` is true."""
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "mistral"}
    said = said | {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    found = load_tokenizer(write(llama, config=config, tokenizer_config=said))
    assert found.encode("a").ids == loaded["sentencepiece"].encode("a").ids
    assert (found.encode_template("<s>a") == (1, *found.encode("a").ids)) == anew
    (llama / "tokenizer.json").write_bytes(tokenizer_json("bytes, prepended"))
    write(llama, config=config | {"eos_token_id": 1})
    assert load_tokenizer(llama).encode("a").ids == loaded["bytes, prepended"].encode("a").ids


# What is refused


def changed(kind="byte-level", **changes):
    return json.dumps(json.loads(tokenizer_json(kind)) | changes)


def splits(expression):
    original = Tokenizer.from_str(tokenizer_json("byte-level").decode())
    steps = [pre_tokenizers.Split(Regex(expression), "isolated"), original.pre_tokenizer]
    original.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return original.to_str()


# tokenizer.json, tokenizer_config.json, config.json (changes), what is said
REFUSED = {
    "empty": ("", {}, {}, "tokenizer.json cannot be read"),
    "half": (tokenizer_json("byte-level")[:-9].decode(), {}, {}, "tokenizer.json cannot be read"),
    "a list": ("[]", {}, {}, "tokenizer.json cannot be read"),
    "deep": ("[" * 99_999, {}, {}, "tokenizer.json cannot be read"),
    "kind": (changed(model={"type": "Nope"}), {}, {}, "tokenizer.json cannot be read"),
    "no piece": (
        changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
        {},
        {},
        "out of vocabulary",
    ),
    "a large id": (
        changed(model={"type": "WordLevel", "vocab": {"a": 4294967295, "b": 0}, "unk_token": "b"}),
        {},
        {},
        "it has an id 4294967295: no model has so many",
    ),
    "no words": (
        changed(model={"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "c"}),
        {},
        {},
        "the tokenizers library says: WordLevel error: Missing",
    ),
    "an expression that does not end": (splits("(a|a)*$"), {}, {}, "tokenizer.json cannot be read"),
    "config": (None, [3], {}, r"tokenizer_config.json must hold an object, got '\[3\]'"),
    "no such token": (
        None,
        {"bos_token": "<bos>", "add_bos_token": True},
        {},
        "it lacks '<bos>', which is to stand in front of a prompt",
    ),
    "of another model: its end": (
        None,
        {"eos_token": "<s>"},
        {},
        r"the tokenizer's end token is '<s>' \(id 0\), and the end ids .* are \[3, 1\]",
    ),
    "of another model: no such end": (
        None,
        {"eos_token": "<|eot_id|>"},
        {},
        r"the tokenizer's end token is '<|eot_id|>' \(id None\)",
    ),
    "of another model: a word": (
        None,
        {},
        {"eos_token_id": 100},
        "the model's end id 100 is no special token of the tokenizer: the tokenizer is of another",
    ),
    "of another model: the first token": (
        None,
        {"bos_token": "<s>", "add_bos_token": True},
        {"bos_token_id": 2},
        r"the tokenizer puts \(0,\) in front of a prompt, and bos_token_id in config.json is 2",
    ),
    "of another model: its size": (
        None,
        {},
        {"vocab_size": 200},
        "the tokenizer has 330 ids and the model's embedding 200 rows: the tokenizer is of another",
    ),
    "no end": (None, {}, {"eos_token_id": None}, "eos_token_id is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_is_refused_in_a_line(case, folder):
    content, said, config, message = REFUSED[case]
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    whole = json.loads((folder / "config.json").read_text()) | config
    write(folder, config=whole, tokenizer_config=said)
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        check_tokenizer(load_tokenizer(folder), read_config(folder).config, folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("content", "said", "message"),
    [
        (b"\xff" * 30, {}, "tokenizer.model cannot be read"),
        (b"", {}, "it has no pieces"),
        (
            None,
            {"added_tokens_decoder": {"5": {"content": "<x>"}}},
            "its piece 5 is '<0x02>', and the files beside it have '<x>' there",
        ),
        (None, {"added_tokens_decoder": {"x": {"content": "<x>"}}}, "tokenizer.model cannot be re"),
        (None, {"bos_token": "<bos>", "add_bos_token": True}, "KeyError: '<bos>'"),
        (None, {"eos_token": "<s>"}, r"the tokenizer's end token is '<s>' \(id 1\)"),
    ],
)
def test_a_tokenizer_model_is_refused_in_a_line(content, said, message, llama):
    if content is not None:
        (llama / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(write(llama, tokenizer_config=said))
    assert "\n" not in str(error.value)


# GPT-2's own two files


@pytest.fixture
def gpt2(folder):
    (folder / "tokenizer.json").unlink()
    for name, content in gpt2_files().items():
        (folder / name).write_text(content)
    chat = {"additional_special_tokens": CONTROLS[2:]}
    return write(
        folder,
        tokenizer_config={"eos_token": "</s>"},
        special_tokens_map=chat | {"bos_token": "<s>"},
    )


def test_vocab_json_and_merges_are_the_tokenizer_json_that_they_would_be(gpt2):
    found = load_tokenizer(gpt2)
    assert found.vocab_size == 330
    for text in ("a fire", " the  fire café 👩‍🚀</s>\n", "Paris"):
        assert found.encode(text) == loaded["byte-level"].encode(text)
        assert found.encode_prompt(text) == found.encode(text).ids
    assert found.controls == loaded["byte-level"].controls
    with_space = {"eos_token": "</s>", "add_prefix_space": True}
    spaced = load_tokenizer(write(gpt2, tokenizer_config=with_space))
    assert spaced.encode("a fire").ids == found.encode(" a fire").ids


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("merges.txt", None, ValueError, "vocab.json cannot be read .FileNotFoundError"),
        ("merges.txt", "#version: 0.2\nx yz w\n", ValueError, "vocab.json cannot be read"),
        ("vocab.json", "[1]", ValueError, "vocab.json cannot be read"),
        ("vocab.json", '{"a": "b"}', ValueError, "vocab.json cannot be read"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "CTRLTokenizer"}',
            NotImplementedError,
            "it is a CTRLTokenizer's",
        ),
    ],
)
def test_vocab_json_and_merges_are_refused_in_a_line(file, content, error, message, gpt2):
    (gpt2 / file).unlink() if content is None else (gpt2 / file).write_text(content)
    with pytest.raises(error, match=message) as found:
        load_tokenizer(gpt2)
    assert "\n" not in str(found.value)


def test_a_folder_without_a_tokenizer_says_which_it_needs(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(folder)


def test_control_the_cover_of_a_text_is_seen():
    found = loaded["byte-level"].encode("the fire")
    assert cover(found)
    assert not cover(found._replace(spans=found.spans[:1]))
    with pytest.raises(AssertionError):
        cover(found._replace(spans=((0, 2), (4, 8))))
    assert len({*itertools.chain(*found.spans)}) == 3
