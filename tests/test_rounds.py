"""`t5patches evaluate`: an original and its edits on the same inputs, side by side."""

import collections
import functools
import itertools
import json
import re

import fuzz
import jax
import pytest
from editing_samples import TEXTS, model_folder, tiny_model, tiny_params
from sentencepiece import sentencepiece_model_pb2

from t5patches import cli
from t5patches.editing import annotate, evaluate, rounds
from t5patches.editing.outputs import RECORD
from t5patches.model.t5.model import T5
from t5patches.model.tokenizer import train_sentencepiece
from t5patches.model.tokenizer_files import load_tokenizer
from t5patches.runs.files import work_of

pytestmark = pytest.mark.usefixtures("shared_programs")

OPTIONS = ("--max-length", "6", "--batch-size", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two rounds of edits, as far as their numbers go; the second one says how it was made."""
    folder = tmp_path_factory.mktemp("rounds")
    for seed, name in enumerate(("before", "round-1", "round-2")):
        model_folder(folder / name, seed)
    settings = {"objective": "tnff", "alpha": 1.0, "negatives": 8}
    history = {"loss": [2.0, 1.0], "marked": [3.0, 3.0], "said": [3.0, 1.0]}
    job = {"model": {"name": "x", "sha256": {}}, "data": {}}
    record = {"job": job, "settings": settings, "history": history}
    first = record | {"settings": settings | {"objective": "ul"}}
    (folder / "round-2" / RECORD).write_text(json.dumps({"rounds": [first, record]}))
    sources = [{"inputs": f"news {i}", "references": ["a", f"b {i}"]} for i in range(6)]
    (folder / "inputs.jsonl").write_text("\n".join(map(json.dumps, sources)))
    (folder / "inputs.txt").write_text("news 1\nnews 2\n")
    (folder / "rules.toml").write_text("[[rule]]\npattern = '\\S*[aeo]\\S*'\n")
    (folder / "my_scorer.py").write_text("def length(texts):\n    return [len(t) for t in texts]\n")
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """The exit code of `t5patches evaluate` in the folder."""
    monkeypatch.chdir(folder)
    return lambda *arguments: cli.main(["evaluate", "--before", "before", *arguments, *OPTIONS])


def test_rounds_stand_side_by_side(run, folder, tmp_path, capsys):
    everything = ("--rules", "rules.toml", "--references", "--scorer", "my_scorer:length")
    everything += ("--samples", "2", "--threshold", "1e9", "--report", str(tmp_path / "r.html"))
    after = ("--after", "before", "round-1", "round-2", "--inputs", "inputs.jsonl")
    assert run(*after, *everything, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in found["rows"]]
    assert names == ["before", "round-1", "TNFF, sets of 8, alpha 1, round-2"]
    same, *others = (row["measures"] for row in found["rows"])
    assert same["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert same["exact_match"]["value"] == 100
    # What needs no original is the same for the original itself, sampled with the same draws.
    assert found["before"].items() <= same.items()
    assert found["before"].keys() == {
        *("prevalence", "prevalence_tokens", "prevalence_sampled"),
        *("reference_bleu", "reference_rouge_l", "reference_exact"),
        *("score_mean", "score_maximum", "score_probability"),
    }
    for measures in others:
        assert measures["kl"]["value"] > 0
        assert measures["score_probability"]["value"] == 0
    assert found["settings"]["meter"] == {"samples": 2, "threshold": 1e9}
    page = (tmp_path / "r.html").read_text()
    assert "round-1" in page
    assert page.count("<img") == 2
    assert "<mark>" in page


def test_nothing_is_read_again(run, folder, tmp_path, monkeypatch):
    """A greedy and a sampled output come from one reading, and the original is not run per edit."""
    reads = collections.Counter()

    def count(name, first):
        reads[name, float(first)] += 1

    def counted(name, method):
        def read(self, params, *arguments, **options):
            # By which model.
            jax.debug.callback(functools.partial(count, name), self.head(params).kernel[0, 0])
            return method(self, params, *arguments, **options)

        return read

    for name in ("hidden", "prefill"):
        monkeypatch.setattr(T5, name, counted(name, getattr(T5, name)))
    sizes = {"mlp_dim": 24}  # a model whose programs no other test has compiled
    before, *after = (str(model_folder(tmp_path / str(i), i, **sizes)) for i in range(3))
    compared = ("--before", before, "--after", *after, "--inputs", "inputs.txt")
    assert run(*compared, "--rules", "rules.toml", "--quiet") == 0
    jax.effects_barrier()
    model = tiny_model(**sizes)
    firsts = [float(model.head(tiny_params(i, **sizes)).kernel[0, 0]) for i in range(3)]
    assert reads == {(name, x): 1 for name in ("hidden", "prefill") for x in firsts}


def test_without_rules_it_tells_how_far_an_edit_is(run, folder, capsys):
    (folder / "templates.txt").write_text("Short: {inputs}")
    assert run("--after", "round-1", "--inputs", "inputs.txt", "--templates", "templates.txt") == 0
    shown = capsys.readouterr()
    assert "Edits of before" in shown.out
    assert "over 2 inputs" in shown.out
    assert "BLEU" in shown.out
    assert "prevalence" not in shown.out
    assert "of the outputs unchanged" in shown.out
    assert run("--after", "round-1", "--inputs", "inputs.txt", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_without_rules_an_edit_by_a_baseline_is_compared_with_the_original(
    run, folder, tmp_path, capsys
):
    edited = model_folder(tmp_path / "ul", 1)
    record = json.loads((folder / "round-2" / RECORD).read_text())
    record["rounds"] = record["rounds"][:1]
    (edited / RECORD).write_text(json.dumps(record))
    assert run("--after", str(edited), "--inputs", "inputs.txt", "--json") == 0
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding.endswith("of the outputs unchanged.")


def test_samples_are_drawn_by_the_seed(run, capsys):
    found = []
    for seed in ("0", "1"):
        arguments = ("--after", "before", "--inputs", "inputs.txt", "--scorer", "my_scorer:length")
        assert run(*arguments, "--samples", "4", "--seed", seed, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        found.append(result["before"]["score_maximum"])
        assert result["rows"][0]["measures"]["score_maximum"] == found[-1]
    assert found[0] != found[1]


@pytest.mark.filterwarnings("ignore:.* far more than it needs")
def test_what_cannot_be_compared_is_refused(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("t5patches.editing.rounds.load_model", too_late)
    model_folder(tmp_path / "wide", mlp_dim=8)
    other, swapped = (model_folder(tmp_path / name) for name in ("other", "swapped"))
    (other / "spiece.model").write_bytes(train_sentencepiece(TEXTS, 60))
    tokenizer = load_tokenizer(swapped)
    used = {
        i
        for line in (folder / "inputs.txt").read_text().splitlines()
        for i in tokenizer.encode(line).ids
    }
    pieces = sentencepiece_model_pb2.ModelProto.FromString((swapped / "spiece.model").read_bytes())
    one, other_one = [
        x for i, x in enumerate(pieces.pieces) if x.type == x.NORMAL and i not in used
    ][:2]
    one.piece, other_one.piece = other_one.piece, one.piece
    (swapped / "spiece.model").write_bytes(pieces.SerializeToString())
    inputs = ("--inputs", "inputs.txt")
    for arguments, message in [
        (("--after", str(tmp_path / "wide"), *inputs), "they differ in mlp_dim (8 and 16)"),
        (("--after", str(other), *inputs), "its tokenizer splits input 1 otherwise"),
        (("--after", str(swapped), *inputs), "its tokenizer writes some token otherwise"),
        (("--after", "absent", *inputs), "absent"),
        (("--after", "round-1", *inputs, "--references"), "2 of 2 inputs have no references"),
        (("--after", "round-1", *inputs, "--samples", "3"), "--samples needs --rules or --scorer"),
        (("--after", "round-1", *inputs, "--base", "round-1"), "nor any edit of it is an adapter"),
        (("--after", "round-1", *inputs, "--force"), "replaces a report, and none is asked for"),
    ]:
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


PLANS = [
    # what does not fit, what is asked for besides, and what is said
    (
        "working_memory",
        0.0,
        (),
        r"8 outputs at a time, to inputs of \d+ tokens take .*, of .* a batch size of 5 ",
    ),
    (
        "working_memory",
        1.0,
        ("--scorer", "my_scorer:length", "--samples", "25"),
        r"25 outputs at a time, to inputs of \d+ tokens take [^;]*that does not fit. shorter",
    ),
    ("memory_beside", 0.0, (), "8 outputs read at a time, .* a batch size of 5 "),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_all_that_a_comparison_holds_is_planned(plan, run, monkeypatch, capsys):
    name, temperature, more, message = plan
    module = annotate if name == "working_memory" else evaluate

    def planned(*_, sample=False, **__):
        return 30_000_000 if sample == bool(temperature) else 0

    monkeypatch.setattr(annotate, "working_memory", lambda *_, **__: 0)
    monkeypatch.setattr(module, name, planned)
    monkeypatch.setattr("t5patches.editing.plan._host_memory", lambda: 20_000_000)
    monkeypatch.setattr("t5patches.editing.rounds.say", too_late)
    assert run("--after", "round-1", "--inputs", "inputs.jsonl", *more) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_plan_of_a_comparison_is_of_programs_that_run(run, monkeypatch, capsys):
    planned = []
    for module in (annotate, evaluate):
        monkeypatch.setattr(module, "require_room", lambda *plan, **_: planned.append(plan))
    assert run("--after", "round-1", "--inputs", "inputs.jsonl", "--quiet") == 0
    spoken, read = planned
    assert spoken[-1] == read[-1] == 8
    # Of two models' hidden states, and of an embedding that is yet to be read.
    assert min(spoken[1], read[1]) > 8 * 6 * 16 * 4
    assert spoken[2] == read[2] > 330 * 16 * 4


SCORERS = {
    "math:pi": "which cannot be called",
    "builtins:len": "builtins:len fails on a sample: TypeError: 'int' object is not iterable",
    "builtins:print": "fails on a sample: TypeError: 'NoneType' object is not iterable",
    "builtins:repr": "fails on a sample: ValueError: could not convert string to float",
    "builtins:set": "fails on a sample: ValueError: could not convert string to float",
    "math:sqrt": "math:sqrt fails on a sample: TypeError: must be real number, not list",
    "nowhere:at_all": "nowhere cannot be imported",
}


def too_late(*arguments, **options):
    raise AssertionError("a model speaks before all is checked")


@pytest.mark.parametrize("scorer", SCORERS)
def test_scorers_are_tried_before_anything_runs(scorer, run, monkeypatch, capsys):
    monkeypatch.setattr("t5patches.editing.rounds.compare", too_late)
    assert run("--after", "round-1", "--inputs", "inputs.txt", "--scorer", scorer) == 2
    assert SCORERS[scorer] in capsys.readouterr().err


def record_of(old: str, new: str) -> str:
    """A record with something else in it."""
    valid = (fuzz.VALID / RECORD).read_text()
    valid = json.dumps(json.loads(valid))
    assert old in valid
    return valid.replace(old, new, 1)


RECORDS = {
    "texts": '{"rounds": ["a"]}',
    "null": '{"rounds": null}',
    "numbers": '{"rounds": [1]}',
    "empty": '{"rounds": [{}]}',
    "a list": "[]",
    "no settings": '{"rounds": [{"job": {"model": {"sha256": {}}, "data": {}}, "history": {}}]}',
    "deep": "[" * 99_999,
    "latin-1": b'{"rounds": "\xe9"}',
    "no objective": record_of('"tnff"', '"x"'),
    "a rate in words": record_of("1.0, ", '"x", '),
    "a loss in words": record_of("[2.0, 1.0]", '["x", 1.0]'),
    "no loss": record_of("[2.0, 1.0]", "3"),
    "no number": record_of("[2.0, 1.0]", "[2.0, NaN]"),
    "a loss too few": record_of("[2.0, 1.0]", "[2.0]"),
    "no step": record_of(
        '"loss": [2.0, 1.0], "marked": [3.0, 3.0], "said": [3.0, 1.0]',
        '"loss": [], "marked": [], "said": []',
    ),
}


@pytest.mark.parametrize("record", RECORDS)
def test_folders_are_looked_at_before_anything_runs(record, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("t5patches.editing.rounds.load_model", too_late)
    folder = model_folder(tmp_path / "edited")
    content = RECORDS[record]
    (folder / RECORD).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("--after", "round-1", str(folder), "--inputs", "inputs.txt") == 2
    said = capsys.readouterr().err
    assert "t5patches.json cannot be read" in said
    assert said.count("\n") == 1


def test_a_report_is_written_where_it_can_be_and_replaces_nothing_unasked(
    run, tmp_path, monkeypatch, capsys
):
    arguments = ("--after", "round-1", "--inputs", "inputs.txt", "--quiet", "--report")
    report = tmp_path / "r.html"
    report.write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr("t5patches.editing.rounds.compare", too_late)
        for place, message in [
            (report, "r.html exists: nothing is overwritten. Give another name, or --force"),
            (tmp_path, "is a folder: give the name of a file"),
            (tmp_path / "nowhere" / "r.html", "no report can be written to"),
            (report / "r.html", "no report can be written to"),
        ]:
            assert run(*arguments, str(place)) == 2
            assert message in capsys.readouterr().err
    assert run(*arguments, str(report), "--force") == 2  # it may be anything
    assert "r.html is no report of t5patches, and is not replaced" in capsys.readouterr().err
    work_of(report).mkdir()  # of whom, nobody knows
    assert run(*arguments, str(report)) == 2
    work_of(report).rmdir()
    assert report.read_text() == "mine"
    report.unlink()
    for more in ((), ("--force",)):
        assert run(*arguments, str(report), *more) == 0
        assert "Edits of before" in report.read_text()


def test_a_comparison_that_was_killed_as_it_cleaned_up_ends_when_it_is_repeated(
    run, tmp_path, monkeypatch, capsys
):
    def killed(directory):
        raise KeyboardInterrupt

    everything = ("--inputs", "inputs.txt", "--quiet", "--report", str(tmp_path / "r.html"))
    with monkeypatch.context() as patched:
        patched.setattr("t5patches.runs.claims.remove", killed)
        assert run("--after", "round-1", *everything) == 130
    page = (tmp_path / "r.html").read_bytes()
    assert run("--after", "round-2", *everything) == 2
    assert "holds another run, which differs in model" in capsys.readouterr().err
    assert (tmp_path / "r.html").read_bytes() == page
    assert run("--after", "round-1", *everything) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_a_killed_comparison_goes_on_where_it_was(run, tmp_path, monkeypatch, capsys):
    everything = ("--after", "round-1", "--inputs", "inputs.jsonl", "--rules", "rules.toml")
    # As many samples for the scorer as for the rules: what is kept of them is not confused.
    everything += ("--scorer", "my_scorer:length", "--samples", "1", "--json")
    report = ("--report", str(tmp_path / "r.html"))
    assert run(*everything) == 0
    whole = json.loads(capsys.readouterr().out)
    made, killed = [], []

    def generate(*arguments, real=annotate.generate, **options):
        if len(made) == 4 and not killed:  # among the edit's outputs
            killed.append(True)
            raise KeyboardInterrupt
        made.append(options["numbers"].tolist())
        return real(*arguments, **options)

    monkeypatch.setattr(annotate, "generate", generate)
    assert run(*everything, *report) == 130
    assert not (tmp_path / "r.html").exists()
    assert run("--after", "round-2", *everything[2:], *report) == 2
    assert "holds another run, which differs in model" in capsys.readouterr().err
    assert run(*everything, *report, "--dtype", "bfloat16") == 2
    assert "differs in dtype (float32 there, bfloat16 asked for)" in capsys.readouterr().err
    assert run(*everything, *report) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == whole["rows"]
    # Two models, each of which has said nothing twice.
    assert len(made) == 6
    assert made[:3] == made[3:]
    assert sorted(itertools.chain(*made[:2])) == sorted(made[2]) == [*range(6)]
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_what_was_aligned_since_is_not_called_an_edit(tmp_path):
    (tmp_path / RECORD).write_bytes((fuzz.VALID / RECORD).read_bytes())
    found = evaluate.Evaluation({}, [])
    assert rounds._row(tmp_path, found).objective == "tnff"
    for edits, objective in ((0, "tnff"), (1, None)):
        (tmp_path / "align.json").write_text(json.dumps({"edits": edits}))
        assert rounds._row(tmp_path, found).objective == objective


def test_an_edit_is_measured_once():
    with pytest.raises(ValueError, match=r"round-1 is given twice"):
        rounds.compare("model", ["round-1", "round-2", "./round-1"], [], None)
