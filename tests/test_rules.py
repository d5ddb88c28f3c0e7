"""Rules from a TOML file: what they mark, and what is said of bad ones."""

import signal
import sys
import types

import numpy as np
import pytest
from editing_samples import example, tokenizer

from t5patches.editing.annotate import (
    absent_from_source,
    annotate,
    capitalized_names,
    find_spans,
    word_list,
)
from t5patches.editing.rules import Rules, load_callable, read_rules


@pytest.fixture
def rules(tmp_path):
    """Reads rules from a text."""

    def read(text):
        path = tmp_path / "rules.toml"
        path.write_text(text)
        return read_rules(path)

    return read


def found(rule, output, inputs=""):
    return [output[a:b] for a, b in find_spans(rule, inputs, output)]


def test_words_are_whole_and_case_is_ignored_unless_it_matters(rules, tmp_path):
    assert found(rules('[[rule]]\nwords = ["new york", "Rome"]'), "New York, rome, Romes") == [
        "New York",
        "rome",
    ]
    strict = rules('[[rule]]\nwords = ["Rome"]\nignore_case = false')
    assert found(strict, "rome Rome") == ["Rome"]
    (tmp_path / "bad.txt").write_text("damn\n\nblast it\n")
    assert found(rules('[[rule]]\nwords_file = "bad.txt"'), "Damn! Blast it all") == [
        "Damn",
        "Blast it",
    ]


@pytest.mark.parametrize("name", ["words.txt", "WORDS.TXT"])
def test_a_list_of_words_is_a_rule(name, rules, tmp_path):
    """As `words_file` reads it: whole words, case ignored, with or without a byte-order mark."""
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbfdamn\r\n\r\nblast it\r\n# 1 = x\n")
    alone = read_rules(path)
    beside = rules(f'[[rule]]\nwords_file = "{name}"')
    for output in ("Damn! Blast  it all", "damned", "nothing", "# 1 = x"):
        assert found(alone, output) == found(beside, output)
    assert found(alone, "Damn! Blast  it all") == ["Damn", "Blast  it"]
    (counted,) = alone.counts([example("a", "damn it", "damn")], tokenizer())
    assert counted == name
    before = alone.fingerprint
    path.write_text("damn\n")
    assert len(before) == 64
    assert read_rules(path).fingerprint != before


def test_signs_may_stand_beside_words():
    def found_of(words, text):
        return [text[start:end] for start, end in word_list(words)("", text)]

    assert found_of(["—"], "fast—and cheap — good") == ["—", "—"]
    assert found_of(["!", "...", ":)"], "Great! Wow ! well... ok:)") == ["!", "!", "...", ":)"]
    assert found_of(["C++"], "C++, C++11 and C") == ["C++", "C++"]
    assert found_of(["Paris"], "in _Paris_, *Paris*, Parisian") == ["Paris", "Paris"]
    assert list(absent_from_source(word_list(["Paris"]))("see _Paris_ here", "Paris is")) == []
    said = "he said _Paris_ and **Rome**"
    assert [said[start:end] for start, end in capitalized_names("", said)] == ["Paris", "Rome"]


def test_files_of_rules_are_told_apart_by_where_a_line_stands(rules, tmp_path):
    text = "[[rule]]\nwords_file = 'a.txt'\n[[rule]]\nwords_file = 'b.txt'\nignore_case = false\n"
    seen = set()
    for one, other in (("Oslo\nRome\n", "Bern\n"), ("Oslo\n", "Rome\nBern\n")):
        (tmp_path / "a.txt").write_text(one)
        (tmp_path / "b.txt").write_text(other)
        seen.add(rules(text).fingerprint)
    assert len(seen) == 2


def test_a_rule_is_counted_on_what_was_judged(rules):
    """A word that the length has cut off is none."""
    last = rules("[[rule]]\npattern = '(\\w+)\\W*$'\ngroup = 1")
    (judged,) = annotate(["x"], [tokenizer().encode("the mayor sold the").ids], tokenizer(), last)
    assert any(judged.marked)
    assert [*last.counts([judged], tokenizer()).values()] == [1]


def test_what_is_no_list_of_words_is_told(tmp_path):
    path = tmp_path / "words.txt"
    for content, message in (
        (b"\n \n", r"words.txt has no words: write one a line"),
        (b"damn\n\xff\n", r"words.txt:.*\n.*line 2: .*UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_rules(path)
    # Rules by any name, and lists by none.
    path.write_text('[[rule]]\nwords = ["damn"]\n')
    assert found(read_rules(path), "damn") == ["damn"]
    path = path.rename(tmp_path / "words")
    path.write_text("damn\nblast\n")
    with pytest.raises(ValueError, match=r"is not TOML: .*a list of words.* ends in \.txt"):
        read_rules(path)


def test_patterns_take_groups_case_and_word_boundaries(rules):
    ages = rules("[[rule]]\npattern = 'aged (\\d+)'\ngroup = 1")
    assert found(ages, "aged 52, Aged 53") == ["52"]
    named = rules("[[rule]]\npattern = 'aged (?P<n>\\d+)'\ngroup = 'n'\nignore_case = true")
    assert found(named, "aged 52, Aged 53") == ["52", "53"]
    assert found(rules("[[rule]]\npattern = 'cat|at'"), "cat at catch") == ["cat", "at", "cat"]
    whole = rules("[[rule]]\npattern = 'cat|at'\nwhole_words = true")
    assert found(whole, "cat at catch") == ["cat", "at"]


def test_only_what_the_source_lacks(rules):
    invented = rules('[[rule]]\nnames = "capitalized"\nabsent_from_source = true')
    assert found(invented, "A fire in New York, said Ann", "in NEW YORK") == ["Ann"]
    strict = rules('[[rule]]\nwords=["Rome"]\nabsent_from_source = true\nignore_case = false')
    assert found(strict, "in Rome", "rome") == ["Rome"]
    anywhere = rules('[[rule]]\nnames = "capitalized"')
    assert found(anywhere, "A fire in Rome", "in Rome") == ["Rome"]


def test_any_callable_beside_the_file_will_do(rules, tmp_path):
    (tmp_path / "my_classifier.py").write_text(
        "def last_word(inputs, output):\n    return [(output.rindex(' ') + 1, len(output))]\n"
    )
    assert found(rules('[[rule]]\ncall = "my_classifier:last_word"'), "a fire in Rome") == ["Rome"]


def test_rules_are_counted_by_name_and_tell_their_files_apart(rules, tmp_path):
    (tmp_path / "w.txt").write_text("Rome")
    text = '[[rule]]\nname = "cities"\nwords_file = "w.txt"\n[[rule]]\npattern = "[0-9]+"\n'
    both = rules(text)
    outputs = [example("", "12 in Rome", "12", "Rome"), example("", "Rome", "Rome")]
    outputs += [example("", "a fire"), example("", "cut off in Rome")]
    assert both.counts(outputs, tokenizer()) == {"cities": 2, "rule 2": 1}
    assert both.fingerprint == rules(text).fingerprint
    assert both.fingerprint != rules(text + "\n").fingerprint
    (tmp_path / "w.txt").write_text("Paris")
    assert both.fingerprint != rules(text).fingerprint
    (tmp_path / "my_rules.py").write_text("def f(inputs, output):\n    return []\n")
    called = "[[rule]]\ncall = 'my_rules:f'"
    earlier = rules(called)
    (tmp_path / "my_rules.py").write_text("def f(inputs, output):\n    return [(0, 1)]\n")
    assert earlier.fingerprint != rules(called).fingerprint


@pytest.mark.parametrize(
    "returned",
    [
        [(0.2, 1.9)],
        [(0.0, 1.0)],
        ["01"],
        [("0", "1")],
        [(False, True)],
        [(np.False_, np.True_)],
        [(0, 1, 2)],
        [(0,)],
        [3],
        [None],
        None,
        3,
    ],
    ids=repr,
)
def test_only_whole_numbers_are_spans(returned):
    rules = Rules({"mine": lambda inputs, output: returned})
    with pytest.raises(ValueError, match=r"rule 'mine': the rule .* returned .* needed"):
        rules("", "a b")


def test_whole_numbers_of_numpy_are_spans():
    assert Rules({"mine": lambda i, o: np.array([[0, 1]])})("", "a b") == [(0, 1)]


def test_byte_order_marks_are_no_part_of_rules_and_words(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfdamn\nblast\n")
    (tmp_path / "rules.toml").write_bytes(b"\xef\xbb\xbf[[rule]]\nwords_file = 'bad.txt'\n")
    assert found(read_rules(tmp_path / "rules.toml"), "damn and blast") == ["damn", "blast"]


def test_a_rule_that_returns_nonsense_is_named():
    bad = Rules({"good": word_list(["a"]), "bad": lambda i, o: [(0, 99)]})
    with pytest.raises(ValueError, match=r"rule 'bad': .* the span \[0, 99\]"):
        bad("", "a b")


TWO = '[[rule]]\nwords = ["x"]\n\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"holds nothing: rules are needed, each under a line \[\[rule\]\]"),
        ('[rule]\nwords = ["x"]', "holds .*rule.*: rules are needed"),
        ("rule = [1]", "rules are needed"),
        ("rule = []", "rules are needed"),
        (TWO + "[other]", r"holds \['other', 'rule'\]"),
        ("[[rule]]\nwords = x", "is not TOML: .*line 2"),
        (
            TWO + '[[rule]]\nword = ["x"]',
            "line 5, word: there is no such key; did you mean 'words'",
        ),
        (TWO + "[[rule]]\nzzzz = 1", "line 5, zzzz: there is no such key; known are words, "),
        (TWO + '[[rule]]\nwords = "x"', "line 5, words: a list of texts is needed, got 'x'"),
        (TWO + "[[rule]]\nwords = []", r"line 5, words: a list of texts is needed, got \[\]"),
        (TWO + '[[rule]]\nname = "x"', r"line 4, \[\[rule\]\]: a rule has one of .* has none"),
        (TWO + '[[rule]]\npattern = "x"\nwords = ["x"]', "line 6, words: .*has pattern and words"),
        (TWO + "[[rule]]\npattern = '('", r"line 5, pattern: '\(' is not a regular expression"),
        (
            TWO + "[[rule]]\npattern = 'a{99999999999}'",
            r"line 5, pattern: 'a\{99999999999}' is not a regular expression: the repetition",
        ),
        (
            f"{TWO}[[rule]]\npattern = '{'(' * 3000}a{')' * 3000}'",
            r"line 5, pattern: '\({79} is not a regular expression: maximum recursion depth",
        ),
        (TWO + "[[rule]]\ngroup = 2\npattern = 'x'", "line 6, pattern: 'x' has no group 2"),
        (TWO + "[[rule]]\npattern = '\\s+'", r"line 5, pattern: '.*' matches white space alone"),
        (TWO + "[[rule]]\npattern = '[^a-z]+'", "line 5, pattern: .* matches white space alone"),
        (
            TWO + "[[rule]]\npattern = '(?i)cat'\nwhole_words = true",
            r"line 5, pattern: '\(\?i\)cat' cannot be kept to whole words .global flags not at the "
            r"start of the expression.: put it",
        ),
        (TWO + '[[rule]]\nwords = ["x"]\ngroup = 1', "line 6, group: it does not go with words"),
        (TWO + "[[rule]]\nnames = 'all'", 'line 5, names: "capitalized" or "spacy" is needed'),
        (TWO + "[[rule]]\nnames = 'spacy'", "line 5, names: a model is needed beside it"),
        (
            TWO + "[[rule]]\nnames = 'capitalized'\nlabels = ['GPE']",
            'line 6, labels: it goes with names = "spacy" only',
        ),
        (
            TWO + "[[rule]]\nnames = 'capitalized'\nignore_case = true",
            "line 6, ignore_case: it needs absent_from_source = true beside names",
        ),
        (TWO + "[[rule]]\ncall = 'nowhere'", "line 5, call: 'nowhere' must be of the form"),
        (TWO + "[[rule]]\ncall = 'nowhere_x:f'", "nowhere_x cannot be imported"),
        (TWO + "[[rule]]\ncall = 'math:nothing'", "math has no nothing"),
        (TWO + "[[rule]]\ncall = 'math:pi'", "is 3.14.*, which cannot be called"),
        (TWO + "[[rule]]\nwords_file = 'absent.txt'", "line 5, words_file: .*absent.txt"),
        (
            '[[rule]]\nname = "a"\nwords = ["x"]\n[[rule]]\nwords = ["y"]\nname = "a"',
            "line 6, name: 'a' is the name of an earlier rule too",
        ),
        # A text of several lines that looks like rules is none.
        (
            '[[rule]]\nwords = ["""\n[[rule]]\nword = 1\n"""]\n[[rule]]\n"word" = 2',
            "line 7, word",
        ),
        ('rule = [{words = ["x"]}, {zzzz = 1}]', "line 1, zzzz"),
    ],
)
def test_bad_rules_are_told_with_line_key_and_reason(rules, text, message):
    with pytest.raises(ValueError, match=message):
        rules(text)


MODULES = {
    # what stands in a module of the user's, and what is said of `call = "its_name:f"`
    "syntax": ("def f(inputs, output:\n", r"cannot be imported: .* \(.*syntax.py, line 1\)"),
    "import": ("import nowhere_x\n", "cannot be imported .No module named 'nowhere_x'"),
    "raising": ("1 / 0\n", r"ZeroDivisionError: division by zero \(.*raising.py, line 1\)"),
    "fails": (
        "def f(inputs, output):\n    return {}['x']\n",
        r"failed: KeyError: 'x' \(.*fails.py, line 2\)",
    ),
    "generates": (
        "def f(inputs, output):\n    yield {}['x']\n",
        r"failed: KeyError: 'x' \(.*generates.py, line 2\)",
    ),
    "ends": (
        "import sys\ndef f(inputs, output):\n    sys.exit(0)\n",
        r"failed: RuntimeError: it calls sys.exit\(0\)",
    ),
    "ends_at_once": ("import sys; sys.exit()\n", r"RuntimeError: it calls sys.exit\(None\)"),
    "other_arguments": ("def f(text):\n    return []\n", "failed: TypeError: f.. takes 1"),
    "nothing": ("def f(inputs, output):\n    pass\n", "returned None: a list of spans"),
    "texts": ("def f(inputs, output):\n    return ['x']\n", "returned 'x': whole numbers"),
}


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_tried_when_they_are_read(name, rules, tmp_path):
    content, message = MODULES[name]
    module = f"module_{name}"
    (tmp_path / f"{module}.py").write_text(content)
    with pytest.raises(ValueError, match=f"line 2, call: .*{message}"):
        rules(f"[[rule]]\ncall = '{module}:f'")


def test_a_pattern_that_goes_on_without_end_is_stopped_and_named(rules, monkeypatch):
    monkeypatch.setattr("t5patches.editing.rules._SECONDS", 0.1)
    before = signal.getsignal(signal.SIGALRM)
    endless = rules("[[rule]]\nname = 'endless'\npattern = '(a+)+b'")
    with pytest.raises(ValueError, match=r"rule 'endless': '\(a\+\)\+b' took longer than 0.1 s"):
        endless("", "a" * 40)
    assert found(endless, "aab") == ["aab"]
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_all_bad_rules_are_told_at_once(rules):
    with pytest.raises(ValueError, match=r"2 bad rules\n  line 2, word: .*\n  line 4, pattern: "):
        rules("[[rule]]\nword = 1\n[[rule]]\npattern = '('")


def test_callables_are_found_by_name():
    assert load_callable("os.path:join")("a", "b") == "a/b"
    assert load_callable("collections:OrderedDict.fromkeys")("a") == {"a": None}


def test_without_spacy_its_rule_says_what_to_install(rules, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=r"line 2, names: spaCy is not installed: pip install"):
        rules('[[rule]]\nnames = "spacy"\nmodel = "en_core_web_sm"')


def test_spacy_marks_the_entities_that_are_asked_for(rules, monkeypatch):
    """With a stand-in; `test_spacy_itself` has the real one where it is installed."""

    class Pipeline:
        pipe_names = ("ner",)
        pipe_labels = {"ner": ["PERSON", "GPE"]}  # noqa: RUF012

        def __call__(self, text):
            kinds = {"Ann": "PERSON", "Ann's": "PERSON", "Rome": "GPE", "the Alps": "GPE"}
            entities = [
                types.SimpleNamespace(
                    start_char=text.index(w), end_char=text.index(w) + len(w), label_=kind
                )
                for w, kind in kinds.items()
                if w in text
            ]
            return types.SimpleNamespace(ents=entities)

    def load(name):
        if name != "known":
            raise OSError(name)
        return Pipeline()

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    head = '[[rule]]\nnames = "spacy"\nabsent_from_source = true\n'
    assert found(rules(head + 'model = "known"'), "Ann in Rome", "Rome") == ["Ann"]
    assert found(rules(head + 'model = "known"'), "Ann's in the Alps", "Alps") == ["Ann"]
    places = rules(head + 'model = "known"\nlabels = ["GPE"]')
    assert found(places, "Ann in Rome") == ["Rome"]
    with pytest.raises(ValueError, match=r"has no labels \['X'\]; it has \['GPE', 'PERSON'\]"):
        rules(head + 'model = "known"\nlabels = ["GPE", "X"]')
    with pytest.raises(ValueError, match="no pipeline 'other', and nothing is downloaded here"):
        rules(head + 'model = "other"')


def test_spacy_itself(rules, tmp_path):
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "GPE", "pattern": "Rome"}, {"label": "PERSON", "pattern": "Ann"}])
    pipeline.to_disk(tmp_path / "pipeline")
    places = rules('[[rule]]\nnames = "spacy"\nmodel = "pipeline"\nlabels = ["GPE"]')
    assert found(places, "Ann went to Rome.") == ["Rome"]
