"""Phrases that a model says more often than people, and the rules that are offered for them."""

import json

import pytest
from editing_samples import TEXTS, model_folder, tokenizer

from t5patches import cli
from t5patches.editing import discover as discover_module
from t5patches.editing.annotate import annotate, word_list
from t5patches.editing.collect import CollectSettings
from t5patches.editing.discover import discover, overused, read_human, rules_text
from t5patches.editing.rules import read_rules
from t5patches.model.folder import load_model

HUMAN = ["the mayor sold the bridge in Rome", "a fire closed the library, said Ann"] * 500
SAID = [
    *["It is a testament to the mayor. Not only that"] * 8,
    *["the bridge is a testament to Rome, a rich tapestry"] * 5,
    *["the mayor sold the bridge"] * 20,
    "once in a while",
    "once in a while",
]


def test_phrases_are_ranked_by_how_much_they_are_overused_at_least():
    found = {phrase.text: phrase for phrase in overused(SAID, HUMAN)}
    # Words that people say as often, and what too few outputs have, are left out; of a phrase
    # and its parts the longest stays. Nothing runs over a comma or a full stop.
    assert next(iter(found)) == "is a testament to"
    assert "not only that" in found
    assert "a rich tapestry" in found
    for text in ("the", "the mayor", "testament", "a testament to", "once in a while", "rich"):
        assert text not in found
    assert not any("mayor not" in text or "rome a" in text for text in found)
    words = sum(len(text.replace(".", "").replace(",", "").split()) for text in SAID)
    theirs = 500 * 14
    phrase = found["is a testament to"]
    assert phrase.outputs == 13
    assert phrase.rate == pytest.approx(1000 * 13 / words)
    assert phrase.ratio == pytest.approx((13.5 / words) / (0.5 / theirs))
    # Of 13 occurrences all are the model's: Wilson's interval begins at 1 / (1 + z^2 / 13).
    assert phrase.at_least == pytest.approx(13 / 1.96**2 * theirs / words)
    assert discover_module._least_share(30, 20) == pytest.approx(0.4618, abs=1e-4)
    ranked = overused(SAID, HUMAN)
    assert [p.at_least for p in ranked] == sorted((p.at_least for p in ranked), reverse=True)
    assert len(overused(SAID, HUMAN, most=2)) == 2
    # A control: what people say as often is no habit of the model's.
    assert overused(SAID, SAID) == []


def test_words_of_phrases_are_whole_with_their_combining_marks():
    (phrase,) = overused(["यह एक हिन्दी वाक्य"] * 9, HUMAN)
    assert phrase.text == "यह एक हिन्दी वाक्य"


@pytest.mark.parametrize(("said", "human"), [(["... !"], HUMAN), (SAID, ["—"])])
def test_without_words_there_is_nothing_to_compare(said, human):
    with pytest.raises(ValueError, match="have no words, so there is nothing to compare"):
        overused(said, human)


def test_a_phrase_is_left_out_for_one_that_is_there():
    """And not for one that is left out itself, or that comes after the last."""
    said = ["we delve into the"] * 66 + ["we delve into. ok"] * 15 + ["we delve. ok"] * 19
    human = ["we go into the city"] * 4000
    found = {phrase.text: phrase.outputs for phrase in overused(said, human)}
    assert found == {"we delve": 100, "delve into": 81, "ok": 34}
    said = ["rich tapestry of"] * 82 + ["rich tapestry. ok"] * 18
    said += [word for word in ("red", "green", "blue") for _ in range(90)]
    assert overused(said, human, most=2)[0].text == "rich tapestry"


def test_the_rules_offered_mark_what_was_counted(tmp_path):
    said = [*SAID, *['a "quoted\\thing" l\'été rock-’n’-roll'] * 4]
    phrases = overused(said, HUMAN)
    (tmp_path / "rules.toml").write_text(rules_text(phrases, "of a test"))
    rules = read_rules(tmp_path / "rules.toml")
    assert "l'été rock-'n'-roll" in [phrase.text for phrase in phrases]
    counted = {phrase.text: 0 for phrase in phrases}
    for text in said:
        for start, end in rules("", text):
            assert text[start:end].lower().replace("’", "'") in " ".join(counted)
    for phrase in phrases:
        (tmp_path / "rules.toml").write_text(rules_text([phrase], "of a test"))
        rule = read_rules(tmp_path / "rules.toml")
        assert sum(bool(list(rule("", text))) for text in said) == phrase.outputs


@pytest.mark.parametrize(
    ("said", "human", "found"),
    [
        # What a rule finds beside other signs, or within a run of characters, people say too.
        ([f"w{i} Trump" for i in range(9)], ["Trump's house", "a Trump-era wall"] * 9, {}),
        (["注意的是，城市很大"] * 9, ["人们说注意的是城市", "大家好"] * 9, {"城市很大": 9}),
        (["Trump's house", "a Trump-era wall", *["Trump"] * 3], HUMAN, {"trump": 5}),
        (["it’s so"] * 9, ["it's so, they say it's so"] * 9, {}),
        (["to İstanbul"] * 9, HUMAN, {"to istanbul": 9}),
        (["a cafe\u0301", "a\ncaf\u00e9"] * 9, HUMAN, {"a caf\u00e9": 18}),
    ],
)
def test_occurrences_are_what_the_rule_marks(said, human, found):
    phrases = overused(said, human)
    assert {phrase.text: phrase.outputs for phrase in phrases} == found
    for phrase in phrases:
        rule = word_list([phrase.text])
        assert sum(any(rule("", text)) for text in said) == phrase.outputs
    # A character of a script without spaces is a word.
    assert all(phrase.rate == 1000 / 8 for phrase in phrases if "城" in phrase.text)


def test_a_word_that_the_length_cut_off_is_not_counted(tmp_path, monkeypatch):
    model = load_model(model_folder(tmp_path / "model"))
    said = [tokenizer().encode("a testament to unbeliev").ids] * 9

    def let_speak(model, inputs, rule, *_):
        return annotate(inputs, said, model.tokenizer, rule)

    monkeypatch.setattr(discover_module, "let_speak", let_speak)
    found = discover(model, ["news"] * 9, HUMAN, tmp_path / "rules.toml", CollectSettings())
    assert [phrase.text for phrase in found] == ["a testament to"]


def test_a_run_that_was_killed_as_it_cleaned_up_ends_when_it_is_repeated(tmp_path, monkeypatch):
    given = (load_model(model_folder(tmp_path / "model")), ["news"] * 9)
    output, settings = tmp_path / "rules.toml", CollectSettings(max_length=8)

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("t5patches.runs.claims.Parts.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            discover(*given, HUMAN, output, settings)
    made = output.read_bytes()
    for human, changed in ((HUMAN[1:], settings), (HUMAN, CollectSettings(max_length=7))):
        with pytest.raises(ValueError, match="exists: nothing is overwritten"):
            discover(*given, human, output, changed)
    discover(*given, HUMAN, output, settings)
    assert output.read_bytes() == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rules.toml"]


def test_text_by_people_is_read_as_text_from_json_too(tmp_path):
    (tmp_path / "human.txt").write_text("\n".join(HUMAN))
    rows = [{"inputs": "x", "outputs": text, "meta": 1} for text in HUMAN]
    (tmp_path / "human.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_human(tmp_path / "human.jsonl") == read_human(tmp_path / "human.txt") == [*HUMAN]
    (tmp_path / "human.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="'outputs' is needed, the text"):
        read_human(tmp_path / "human.jsonl")


def test_discover_writes_rules_and_a_killed_run_makes_no_output_again(
    tmp_path, monkeypatch, capsys
):
    model = model_folder(tmp_path / "model")
    (tmp_path / "inputs.txt").write_text("\n".join(TEXTS * 2))
    (tmp_path / "human.txt").write_text("\n".join(HUMAN))

    def command(*more):
        given = ["--model", model, "--inputs", tmp_path / "inputs.txt"]
        given += ["--output", tmp_path / "rules.toml", "--max-length", 12, "--temperature", 1]
        try:
            return cli.main([str(x) for x in ("annotate", *given, *more)])
        except SystemExit as left:
            return left.code

    against = ("--discover", "5", "--against", tmp_path / "human.txt", "--samples", "2")
    for wrong in ((), against[:2], (*against, "--rules", tmp_path / "inputs.txt"), against[2:]):
        assert command(*wrong) == 2
        assert "give either --rules, or --discover with --against" in capsys.readouterr().err
    assert command(*against, "--expand", "2") == 2
    assert "--discover has none yet" in capsys.readouterr().err
    said = []
    real = overused

    def kept(outputs, human, **options):
        said.append(list(outputs))
        if len(said) == 1:
            raise KeyboardInterrupt
        return real([*outputs, *SAID], human, **options)

    monkeypatch.setattr(discover_module, "overused", kept)
    assert command(*against) == 130
    assert not (tmp_path / "rules.toml").exists()
    (tmp_path / "human.txt").write_text("\n".join([*HUMAN, "one text more"]))
    with monkeypatch.context() as patched:
        patched.setattr("t5patches.editing.annotate.generate", None)
        assert command(*against, "--json") == 0
    assert said[0] == said[1]
    assert len(said[0]) == 16
    found = json.loads(capsys.readouterr().out)["phrases"]
    assert found[0]["text"] == "is a testament to"
    assert read_rules(tmp_path / "rules.toml")
    assert "more than twice as often as 1001 texts by people" in (
        (tmp_path / "rules.toml").read_text()
    )
    assert not (tmp_path / "rules.toml.work").exists()
    assert command(*against) == 2
    assert "exists: nothing is overwritten" in capsys.readouterr().err
