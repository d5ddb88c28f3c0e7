"""Fill-in-the-middle: both orders, by characters, with sentinels that no text can hold."""

import numpy as np
import pytest
import tokenizer_samples

from t5patches.editing.fim import FillInTheMiddle
from t5patches.editing.other_text import read_other_text
from t5patches.model.tokenizer_json import JsonTokenizer

TEXT = "a fire closed the library in Paris"
NAMES = ("<s>", "<|im_start|>", "<|im_end|>")  # any special tokens will do


@pytest.fixture(scope="module")
def tokenizer():
    return JsonTokenizer(tokenizer_samples.tokenizer_json("byte-level"), ends=(1,))


def parts_of(ids, tokenizer, names=NAMES):
    """The order, and prefix, middle and suffix; in the second order prefix and middle are one."""
    before, behind, between = (tokenizer.controls[name] for name in names)
    assert ids[0] == before
    assert ids[-1] == tokenizer.eos_id
    ids = ids[1:-1]
    at, last = ids.index(behind), ids.index(between)
    prefix, suffix, rest = (
        tokenizer.decode(x).text for x in (ids[:at], ids[at + 1 : last], ids[last + 1 :])
    )
    return prefix, rest, suffix


def test_both_orders_hold_the_whole_text(tokenizer):
    fim, rng = FillInTheMiddle(1.0, NAMES, spm=0.3), np.random.default_rng(0)
    found = [parts_of(fim.tokens(TEXT, tokenizer, 99, rng), tokenizer) for _ in range(400)]
    assert all("".join(parts) == TEXT for parts in found)
    suffix_first = np.mean([prefix == "" for prefix, _, _ in found])
    assert 0.25 < suffix_first < 0.4  # and a prefix of the other order is empty now and then
    # Cut anywhere, within words too.
    starts = {len(TEXT) - len(suffix) for _, _, suffix in found}
    assert len(starts) > 30
    only = FillInTheMiddle(1.0, NAMES, spm=0.0)
    found = [parts_of(only.tokens(TEXT, tokenizer, 99, rng), tokenizer) for _ in range(100)]
    assert np.mean([prefix == "" for prefix, _, _ in found]) < 0.15


def test_a_rate_is_the_share_of_texts(tokenizer):
    rng = np.random.default_rng(0)
    fim = FillInTheMiddle(0.25, NAMES)
    told = [fim.tokens(TEXT, tokenizer, 99, rng) is not None for _ in range(600)]
    assert 0.2 < np.mean(told) < 0.3
    assert FillInTheMiddle(0.0, NAMES).tokens(TEXT, tokenizer, 99, rng) is None


def test_long_texts_are_cut_first_and_short_ones_stay(tokenizer):
    fim, rng = FillInTheMiddle(1.0, NAMES, spm=0.0), np.random.default_rng(1)
    for _ in range(50):
        ids = fim.tokens(TEXT, tokenizer, 12, rng)
        assert len(ids) <= 12
        text = "".join(parts_of(ids, tokenizer))
        assert text
        assert TEXT.startswith(text)
    assert fim.tokens(TEXT, tokenizer, 4, rng) is None


def test_a_text_cannot_spell_a_sentinel(tokenizer):
    fim, rng = FillInTheMiddle(1.0, NAMES), np.random.default_rng(0)
    for _ in range(20):
        ids = fim.tokens("a <|im_start|> b <s>", tokenizer, 99, rng)
        for name in NAMES:
            assert ids.count(tokenizer.controls[name]) == 1


def test_sentinels_and_shares_are_checked(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no special token '<fim>' to tell the parts"):
        FillInTheMiddle(1.0, ("<s>", "<fim>", "<|im_end|>")).ids(tokenizer)
    with pytest.raises(ValueError, match="'</s>' ends an output"):
        FillInTheMiddle(1.0, ("<s>", "</s>", "<|im_end|>")).ids(tokenizer)
    # What puts a space in front of every part would tell "li" and "brary" as two words.
    for kind in ("byte-level with a space in front", "bytes, prepended", "unigram"):
        spaced = JsonTokenizer(tokenizer_samples.tokenizer_json(kind), ends=(1,))
        with pytest.raises(NotImplementedError, match="a middle that begins within a word would"):
            FillInTheMiddle(1.0, NAMES).ids(spaced)
    with pytest.raises(ValueError, match="three different sentinels are needed"):
        FillInTheMiddle(1.0, ("<s>", "<s>", "<|im_end|>"))
    with pytest.raises(ValueError, match=r"fim rate is 1\.5"):
        FillInTheMiddle(1.5, NAMES)
    (tmp_path / "text.jsonl").write_text('{"inputs": "a", "outputs": "b"}')
    with pytest.raises(ValueError, match="answers have no middle"):
        read_other_text(
            tmp_path / "text.jsonl", tokenizer, tokenizer, 9, FillInTheMiddle(1.0, NAMES)
        )


def test_a_file_is_told_in_the_same_way_each_time(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(f"{TEXT}\n" * 24)
    fim = FillInTheMiddle(0.5, NAMES)

    def told(seed):
        return [
            example.output_ids
            for example in read_other_text(
                tmp_path / "text.txt", tokenizer, tokenizer, 99, fim, seed
            )
        ]

    assert told(0) == told(0) != told(1)
    assert len(set(told(0))) > 3
    plain = tokenizer.encode(TEXT).ids
    assert (*plain, tokenizer.eos_id) in told(0)
