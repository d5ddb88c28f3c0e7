"""The table, the sentences and the HTML file: what they say follows from the numbers."""

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from editing_samples import example
from rich.console import Console

from t5patches.editing import report
from t5patches.editing.display import visible
from t5patches.editing.evaluate import Measure
from t5patches.editing.report import (
    COLUMNS,
    Results,
    Row,
    findings,
    is_report,
    show,
    side_by_side,
    terminal_table,
    to_json,
    write_html,
)

HISTORY = {"loss": [2.0, 1.0, 0.5] * 4, "marked": [3.0] * 12, "said": [3.0, 2.0, 0.0] * 4}
NAUGHTY = "<script>alert('x')</script> & \"Paris\""


def measures(
    kl=0.01, prevalence=5.0, bleu=90.0, exact=60.0, malformed=0.0, sampled=10.0, error=1.0
):
    values = {
        "prevalence": prevalence,
        "prevalence_sampled": sampled,
        "bleu": bleu,
        "rouge_l": 95.0,
        "exact_match": exact,
        "exact_match_clean": 97.0,
        "malformed": malformed,
    }
    return {"kl": Measure(kl, error / 1000)} | {k: Measure(v, error) for k, v in values.items()}


def row(objective="tnff", alpha=1.0, negatives=0, history=HISTORY, outputs=(), **values):
    return Row(objective, alpha, negatives, measures(**values), history, outputs)


def results(*rows, outputs=(), settings=None):
    return Results(
        "An edit",
        NAUGHTY,
        "over 9 inputs",
        measures(prevalence=36.0),
        outputs,
        rows,
        settings or {},
    )


def outcome(name, *rows):
    """The sentence that speaks of an edit, up to the list of edits."""
    (sentence,) = [s for s in findings(results(*rows)) if f"{name} (KL" in s]
    return sentence.split(": ")[0].split("removes no less, ")[-1]


def test_a_baseline_that_is_as_good_is_said_to_be():
    assert outcome("TNFF, alpha 1", row(kl=0.010), row("ul", kl=0.011)) == (
        "not told apart in KL, BLEU and exact match"
    )


def test_a_baseline_that_is_better_is_said_to_be():
    rows = row("tnrr", kl=0.020, bleu=80.0), row("ul", kl=0.004)
    assert outcome("TNRR, alpha 1", *rows) == (
        "further from the original in KL and BLEU; not told apart in exact match"
    )


def test_a_targeted_edit_is_compared_with_the_best_baseline_in_each_measure():
    rows = [
        row(kl=0.004, negatives=8, bleu=85.0, exact=70.0),
        row("nl", kl=0.06, bleu=90.0),
        row("ul", kl=0.03, bleu=70.0),
    ]
    assert outcome("TNFF, sets of 8, alpha 1", *rows) == (
        "closer to the original in KL and exact match; further from the original in BLEU"
    )


def test_edits_with_the_same_outcome_share_a_sentence():
    rows = row(kl=0.004), row("tnrr", kl=0.005), row("tnrf", kl=0.006), row("ul", kl=0.1)
    (sentence,) = [s for s in findings(results(*rows)) if "TNFF, alpha 1 (KL" in s]
    assert sentence.endswith(
        ": TNFF, alpha 1 (KL 0.0040, 5.0% left), TNRR, alpha 1 (KL 0.0050, 5.0% left) and TNRF, "
        "alpha 1 (KL 0.0060, 5.0% left)."
    )


def test_baselines_that_remove_less_are_no_rivals():
    rows = row(prevalence=5.0), row("ul", prevalence=12.0, kl=0.0001)
    assert outcome("TNFF, alpha 1", *rows) == "They remove more than every baseline"
    rows = row(prevalence=15.0), row("ce", None, prevalence=2.0)
    assert "not told apart in KL" in outcome("TNFF, alpha 1", *rows)


def test_what_sets_and_alpha_change_is_said():
    rows = [
        row(prevalence=15.0),
        row(prevalence=2.0, negatives=8),
        row("tnrr", prevalence=5.0),
        row("tnrr", prevalence=4.0, negatives=8),
        row("tnrf", prevalence=2.0),
        row("tnrf", prevalence=9.0, negatives=8),
        row("nl", alpha=100.0, kl=0.5, malformed=48.0, sampled=1.0),
        row("nl", alpha=0.3),
        # Not only in its sets is it another edit.
        dataclasses.replace(row("tnrr", sampled=5.0, negatives=8), note="900 updates"),
    ]
    said = findings(results(*rows))
    assert said[0].startswith("Before, 36.0% of the outputs have something unwanted")
    assert (
        "What is left when sets are pushed down instead of the emitted token only: TNFF less "
        "(15.0% to 2.0%, KL 0.0100 to 0.0100); TNRR not told apart (5.0% to 4.0%, KL 0.0100 to "
        "0.0100); TNRF more (2.0% to 9.0%, KL 0.0100 to 0.0100)."
    ) in said
    assert (
        "What a larger alpha does: NL from 0.3 to 100: KL 0.0100 to 0.5000, BLEU 90.0 to 90.0, "
        "malformed 0.0% to 48.0%."
    ) in said
    assert said[-1] == (
        "When outputs are sampled, NL, alpha 100 leaves the least (1.0%) and NL, alpha 0.3 the "
        "most (10.0%), from 10.0%."
    )


def test_a_few_edits_stand_side_by_side():
    out = io.StringIO()
    few = results(row(kl=0.0123), row("ce", None))
    show(few, Console(file=out, width=100))
    shown = out.getvalue()
    assert re.search(r"before +┃ +TNFF, alpha 1 +┃ +corrective", shown)
    assert re.search(r"KL +│ +0.0100 ±0.0010 │ +0.0123 ±0.0010 │ +0.0100 ±0.0010 │", shown)
    assert "• Before, 36.0%" in shown
    for name, (heading, _) in COLUMNS.items():
        assert (f"│ {heading} " in shown) == (name in measures())
    show(results(*few.rows * 3), Console(file=(many := io.StringIO()), width=160))
    assert re.search(r"TNFF, alpha 1 +│ +10.0 ±1.0 │ +0.0123 ±0.0010", many.getvalue())


def of_its_own(**values):
    return {name: Measure(value, 1.0) for name, value in values.items()}


def test_rounds_are_compared_with_the_original():
    own = {"reference_rouge_l": 70.0, "score_maximum": 0.5}
    before = of_its_own(prevalence=40.0, prevalence_sampled=40.0, **own)
    after = measures(prevalence=10.0) | of_its_own(**own | {"reference_rouge_l": 70.5})
    rounds = [
        Row(None, None, 0, after, note="first"),
        Row("tnff", 1.0, 8, after, HISTORY, note="second"),
    ]
    shown = Results("x", "y", "over 9 inputs", before, (), rounds, {})
    said = findings(shown)
    assert said[1] == (
        "first: unwanted 40.0 ±1.0 to 10.0 ±1.0 (less); unwanted when sampled 40.0 ±1.0 to 10.0 "
        "±1.0 (less); ROUGE-L with the references 70.0 ±1.0 to 70.5 ±1.0 (not told apart); largest "
        "score 0.500 ±1.000 to 0.500 ±1.000 (not told apart); KL 0.0100 ±0.0010; 97.0% of the "
        "clean outputs unchanged."
    )
    assert said[2].startswith("TNFF, sets of 8, alpha 1, second: unwanted 40.0")
    assert not any("baseline" in sentence for sentence in said)


def test_an_edit_without_a_partner_is_compared_with_the_original():
    baseline, aligned, targeted = row("ul"), row(None, None), row(alpha=3.0)
    (first, sentence) = findings(results(baseline))
    assert first.startswith("Before, ")
    assert sentence.startswith("UL, alpha 1: unwanted 36.0 ±1.0 to 5.0 ±1.0 (less); ")
    aligned = dataclasses.replace(aligned, note="aligned")
    said = findings(results(baseline, aligned, targeted))
    assert [s.partition(": ")[0] for s in said if ": unwanted" in s] == ["aligned"]
    none_clean = measures() | {"exact_match_clean": Measure(math.nan, math.nan)}
    shown = results(dataclasses.replace(baseline, measures=none_clean))
    assert findings(shown)[1].endswith("; KL 0.0100 ±0.0010.")


def test_without_rules_there_is_no_prevalence_to_tell_of(tmp_path):
    plain = {k: Measure(v, 1.0) for k, v in {"kl": 0.01, "bleu": 90.0, "exact_match": 60.0}.items()}
    shown = Results("x", "y", "over 9", {}, (), [Row(None, None, 0, plain, note="a")], {})
    assert findings(shown) == ["a: KL 0.0100 ±1.0000; 60.0% of the outputs unchanged."]
    write_html(tmp_path / "x.html", shown)
    page = (tmp_path / "x.html").read_text()
    assert "<img" not in page
    assert "prevalence" not in page


def test_numbers_without_errors_tell_nothing():
    rows = [row(kl=0.01, error=math.nan), row("ul", kl=0.02, error=math.nan)]
    assert "not told apart in KL" in outcome("TNFF, alpha 1", *rows)
    assert findings(results()) == [findings(results(*rows))[0]]


def test_a_table_of_many_edits_has_a_line_each():
    out = io.StringIO()
    Console(file=out, width=100).print(
        terminal_table(results(row(kl=0.0123, malformed=math.nan), row("ce", None)))
    )
    shown = out.getvalue()
    assert re.search(r"edit .*left, % .*KL .*kept, % .*broken, %", shown)
    assert re.search(r"TNFF, alpha 1 .* 0.0123 ±0.0010 .* – │\n", shown)
    assert re.search(r"before .*97.0 ±1.0", shown)
    assert "left, %: % of sampled outputs with something unwanted" in shown
    assert "corrective" in shown
    assert "standard error over 9 inputs" in shown


class Page(HTMLParser):
    """Collects tags and what would make a browser fetch something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.marks, self.images, self.texts = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "action", "data"):
                (self.images if value.startswith("data:") else self.links).append(value)

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data)
        if self.tags and self.tags[-1] == "mark":
            self.marks.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    before = [example(NAUGHTY, "a fire in Paris", "Paris"), example("b", f"clean {NAUGHTY}")]
    after = [example(NAUGHTY, "a fire in <b>"), example("b", "clean")]
    rows = row(outputs=after), row("ul", outputs=after), row("ce", None, history={})
    shown = results(*rows, outputs=before, settings={"note": NAUGHTY})
    write_html(path, shown)
    return path.read_text()


def test_the_report_is_one_file_that_fetches_nothing(page):
    found = Page(page)
    assert found.links == []
    assert "url(" not in page
    assert len(found.images) == 2
    for image in found.images:
        svg = base64.b64decode(image.split(",", 1)[1]).decode()
        assert svg.rstrip().endswith("</svg>")
        assert "<image" not in svg
        assert "prevalence" in svg or "step" in svg or "<path" in svg


def test_texts_and_settings_are_escaped(page):
    found = Page(page)
    assert "script" not in found.tags
    assert "b" not in found.tags
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;Paris&#34;" in page
    assert "a fire in &lt;b&gt;" in page


NAMES = {
    "x/[v1]": "x/[v1]",
    "x/[lr=0.1]": "x/[lr=0.1]",
    "x/[/nope]": "x/[/nope]",
    "[bold]x": "[bold]x",
    "x/:fire:": "x/:fire:",
    r"$\foo{$": r"$\foo{$",
    "$x$": "$x$",
    "x^2_3%": "x^2_3%",
    "_hidden": "_hidden",
    NAUGHTY: NAUGHTY,
    "{{ 7 * 7 }}{% raw %}": "{{ 7 * 7 }}{% raw %}",
    "x\ny": r"x\ny",
    "x\x1b[31m": r"x\x1b[31m",
    "x\udcff": r"x\udcff",
}
"""What a folder may be called, and how it is shown."""


# Persian, Hindi and an emoji, which are written with joiners, and an Arabic sign.
JOINED = "\u0645\u06cc\u200c\u062e \u0915\u094d\u200d\u0937 \U0001f469\u200d\U0001f4bb \u06dd1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb\u2066c\u061c", r"a\u202eb\u2066c\u061c"),
        ("a\u2028b\u2029c\x85", r"a\u2028b\u2029c\x85"),
        ("pass\u200bword\ufeff\xad\U000e0041", r"pass\u200bword\ufeff\xad\U000e0041"),
        (JOINED, JOINED),
    ],
)
def test_what_hides_or_reorders_text_is_spelled(text, shown):
    assert visible(text) == visible(shown) == shown


@pytest.fixture
def drawn(monkeypatch):
    """What is written in each plot: at the curves, or in the legend."""
    texts = []

    def embedded(figure, real=report._embedded):
        found = [*figure.axes[0].texts, *(t for x in figure.legends for t in x.get_texts())]
        texts.append(found)
        return real(figure)

    monkeypatch.setattr(report, "_embedded", embedded)
    return texts


def test_names_are_text_and_no_markup(tmp_path, drawn):
    rows = [Row("tnff", None, 0, measures(), HISTORY, note=name) for name in NAMES]
    names = [f"TNFF, {shown}" for shown in NAMES.values()]
    write_html(tmp_path / "x.html", results(*rows))
    at_curves, legend = ([text.get_text() for text in texts] for texts in drawn)
    assert legend == names
    assert [x.replace("\n", " ") for x in at_curves[:9]] == names[:9]
    for shown, name in zip(at_curves, names, strict=True):
        assert max(map(len, shown.split("\n"))) <= 25
        assert "".join(name.split()).endswith("".join(shown.split()).removeprefix("…"))
    page = Page((tmp_path / "x.html").read_text())
    assert "script" not in page.tags
    for name in names:
        assert name in page.texts


def test_what_hides_in_outputs_is_seen_in_the_page(tmp_path):
    said = example("a\x00\x1b[31m\u202ebc\nd", "in Paris\u202e\x07", "Paris")
    write_html(
        tmp_path / "x.html",
        results(row("tnff", outputs=[said]), outputs=[said]),
    )
    page = (tmp_path / "x.html").read_text()
    assert not {"\x00", "\x1b", "\u202e", "\x07"} & {*page}
    assert r"a\x00\x1b[31m\u202ebc" in page
    assert is_report(tmp_path / "x.html")
    (tmp_path / "y.html").write_text("<html>")
    assert not is_report(tmp_path / "y.html")


@pytest.mark.parametrize("name", NAMES)
def test_titles_and_names_in_the_terminal_are_text_and_no_markup(name, tmp_path):
    edits = results(Row(None, None, 0, measures(), note=name))
    edits = dataclasses.replace(edits, title=f"of {name}")
    for table in (side_by_side(edits), terminal_table(edits)):
        out = io.StringIO()
        Console(file=out, width=400).print(table)
        assert f"of {NAMES[name]}" in out.getvalue()
        assert out.getvalue().count(NAMES[name]) == 2
    out = io.StringIO()
    show(edits, Console(file=out, width=400, color_system=None, force_terminal=True))
    assert f"• {NAMES[name]}: unwanted" in out.getvalue()


def many():
    """Two methods of three strengths and five of one, as the frontier has them."""
    strengths = [(30.0, 0.001), (8.0, 0.004), (1.5, 0.009)]
    curves = [
        dataclasses.replace(
            row(objective, alpha, kl=factor * kl, sampled=sampled), curve=f"{objective} <b>curve"
        )
        for objective, factor in (("tnff", 1.0), ("ul", 2.0))
        for alpha, (sampled, kl) in enumerate(strengths, start=1)
    ]
    alone = [row(name, kl=0.02, sampled=40.0) for name in ("tnrr", "tnrf", "nl", "npo", "dpo")]
    ceiling = measures(kl=0.0, prevalence=0.0, sampled=0.0)
    return dataclasses.replace(results(*curves, *alone), ceiling=ceiling)


def test_a_person_reads_a_sentence_a_line_a_method_and_a_plot(tmp_path, drawn):
    write_html(tmp_path / "x.html", many())
    text = (tmp_path / "x.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    seen, folded = re.split("<details>", text, maxsplit=1)
    # Who wins, by how much, and with what standard error.
    assert "tnff &lt;b&gt;curve is closest to the original: KL 0.0085 ± 0.0013" in seen
    assert "ul &lt;b&gt;curve is 0.0085 ± 0.0025 further away" in seen
    # A line a method, the closest first: what is read off its curve, and of the strength that
    # leaves most nearly 2%.
    lines = re.findall("<tr><td>(.*?)</td>(.*?)</tr>", seen)
    assert [name for name, _ in lines] == [
        "before", "before, constrained", "tnff &lt;b&gt;curve", "ul &lt;b&gt;curve",
        "TNRR, alpha 1", "TNRF, alpha 1", "NL, alpha 1", "NPO, alpha 1", "DPO, alpha 1",
    ]  # fmt: skip
    assert re.findall("<th title=.*?>(.*?)</th>", seen) == [
        "KL, 10% left", "KL, 5% left", "KL, 2% left", "left, %", "kept, %"
    ]  # fmt: skip
    of_ul = re.findall("<td>(.*?) ±.*?</td>", dict(lines)["ul &lt;b&gt;curve"])
    assert of_ul[:4] == ["0.0071", "0.0116", "0.0169", "1.5"]
    assert dict(lines)["DPO, alpha 1"].startswith("<td>–</td><td>–</td><td>–</td><td>40.0")
    # Everything else folds away.
    assert "More findings" in folded
    assert "TNFF, alpha 3" in folded
    assert "TNFF, alpha 3" not in seen
    # The plot in words and numbers, for those who do not see it.
    (alt,) = re.findall('<img alt="(KL.*?)"', text)
    assert "tnff &lt;b&gt;curve: 30.0%: 0.0010 ±0.0010, 8.0%: 0.0040" in alt
    assert "The plot in numbers" in folded
    assert "TNFF, alpha 1: loss 1.3 to 0.75, likeliest 67% to 33%" in text
    # Every curve is named, and no name stands on another.
    (names, _) = drawn
    named = {text.get_text() for text in names}
    assert {"tnff <b>curve", "ul <b>curve", "TNRR, alpha 1", "DPO, alpha 1"} < named
    boxes = [text.get_window_extent() for text in names]
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            assert report._shared(box, other) < 0.1 * min(box.height * box.width for box in boxes)


def test_a_phone_shows_numbers_whole_and_letters_as_large_as_they_are(page):
    """Only texts break inside words; a table that is too wide scrolls, and no plot shrinks."""
    rules = dict(re.findall(r"^(\S.*?) \{ (.*) \}", page, re.MULTILINE))
    assert [of for of, rule in rules.items() if "overflow-wrap: anywhere" in rule] == ["td.text"]
    assert "overflow-x: auto" in rules[".table"]
    assert page.count('<div class="table') == page.count("<table>") - page.count("<h3")
    for image in Page(page).images:
        svg = base64.b64decode(image.split(",", 1)[1]).decode()
        (width,) = re.findall(r'<svg [^>]*width="([\d.]+)pt"', svg)
        assert float(width) * 96 / 72 <= 360


def test_kls_are_told_in_digits_that_show_them(tmp_path):
    small = measures() | {key: Measure(0.00042, 0.00003) for key in ("kl_elsewhere", "kl_needed")}
    write_html(tmp_path / "x.html", results(Row("tnff", 1.0, 0, small)))
    page = (tmp_path / "x.html").read_text()
    assert "<td>0.00042 ±0.00003</td><td>0.0004 ±0.0000</td>" in page


def test_a_few_edits_are_told_of_whole(page):
    seen = page.split("<details>", 1)[0]
    assert "not told apart" in seen
    assert "<details open>" in page
    assert "More findings" not in page


def test_numbers_that_have_no_logarithm_stop_no_plot(tmp_path):
    odd = results(row(kl=0.0), row("ul", kl=math.nan), row("nl", sampled=0.0, error=math.nan))
    write_html(tmp_path / "x.html", odd)
    assert (tmp_path / "x.html").read_text().count("<img") == 2


def test_pushed_down_words_are_marked_before_and_after(page):
    assert "a fire in <mark>Paris</mark>" in page
    assert page.count("<mark>") == 1
    assert page.index("Before and after") < page.index("<mark>")


def test_the_report_holds_table_findings_and_numbers(page):
    for text in ("TNFF, alpha 1", "UL, alpha 1", "corrective", "0.0100 ±0.0010", "not told apart"):
        assert text in page


def test_overlapping_marks_repeat_no_text(tmp_path):
    marked = example("a", "in New York", "New York")
    marked = type(marked)(**vars(marked) | {"spans": ((3, 8), (5, 11))})
    shown = results(row(outputs=[marked]), outputs=[marked])
    write_html(tmp_path / "x.html", shown)
    assert "in <mark>New Y</mark><mark>ork</mark>" in (tmp_path / "x.html").read_text()
    (said,) = json.loads(to_json(shown))["texts"]
    assert said == {
        "inputs": marked.inputs,
        "outputs": dict.fromkeys(said["outputs"], marked.outputs),
    }
    assert list(said["outputs"]) == ["before", shown.rows[0].name]


def test_numbers_for_programs_are_strict_json(tmp_path):
    history = {"loss": [1.0, math.nan, math.inf], "marked": [0.0] * 3, "said": [0.0] * 3}
    shown = results(row(kl=math.nan, history=history), settings={"seeds": 1})

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(to_json(shown), parse_constant=refuse)
    assert content["rows"][0]["measures"]["kl"]["value"] is None
    assert content["rows"][0]["history"]["loss"] == [1.0, None, None]
    assert content["before"]["prevalence"] == {"value": 36.0, "error": 1.0}
    assert content["findings"] == findings(shown)
    assert content["texts"] == []
    # Nor does it stop the plots.
    write_html(tmp_path / "x.html", shown)


def test_a_kl_that_is_small_is_not_0():
    assert report._cell("kl", Measure(3.8e-05, 1.3e-05)) == "3.8e-05 ±1.3e-05"
    assert report._cell("kl", Measure(0.00123, 0.0004)) == "0.0012 ±0.0004"
    assert report._cell("kl", Measure(0.0, 0.0)) == "0.0000 ±0.0000"
