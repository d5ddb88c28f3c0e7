"""`t5patches annotate`: from a model, inputs and rules to the file that an edit takes."""

import io
import json
import re

import jax
import numpy as np
import pytest
from editing_samples import model_folder, tokenizer
from rich.console import Console

from t5patches import cli
from t5patches.commands.annotate import _result
from t5patches.editing import annotate as annotate_module
from t5patches.editing.annotate import pattern, speak
from t5patches.editing.collect import CollectSettings, collect
from t5patches.editing.data import Example, only_where_marked, read_examples
from t5patches.editing.rules import Rules, read_rules
from t5patches.editing.train import training_progress
from t5patches.model.folder import load_model

pytestmark = pytest.mark.usefixtures("shared_programs")

INPUTS = [f"news {i}" for i in range(7)]
SETTINGS = CollectSettings(max_length=8, batch_size=4, negatives=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, inputs, and rules that its gibberish breaks often enough."""
    folder = tmp_path_factory.mktemp("collect")
    model_folder(folder / "model")
    (folder / "inputs.txt").write_text("\n".join(INPUTS))
    (folder / "rules.toml").write_text(
        "[[rule]]\nname = 'letters'\npattern = '\\S*[aeo]\\S*'\n[[rule]]\nwords = ['zzz']\n"
        '[[rule]]\nname = "x\\u001b[31m"\nwords = ["zzz"]\n'
    )
    return folder


@pytest.fixture
def given(folder):
    return load_model(folder / "model"), INPUTS, read_rules(folder / "rules.toml")


def arguments(folder, output, *more):
    options = {
        "model": folder / "model",
        "inputs": folder / "inputs.txt",
        "rules": folder / "rules.toml",
        "output": output,
        "max-length": 8,
        "batch-size": 4,
    }
    return ["annotate", *(str(x) for k, v in options.items() for x in (f"--{k}", v)), *more]


def test_outputs_are_marked_and_written_with_their_negatives(folder, given, tmp_path):
    out = io.StringIO()
    with training_progress(Console(file=out, width=100)) as progress:
        examples = collect(*given, tmp_path / "edits.jsonl", SETTINGS, progress)
    assert read_examples(tmp_path / "edits.jsonl", tokenizer()) == examples
    assert [e.inputs for e in examples] == INPUTS
    assert not (tmp_path / "edits.jsonl.work").exists()
    marked = sum(sum(e.marked) for e in examples)
    assert 0 < marked < sum(len(e.marked) for e in examples)
    assert (
        f"{marked} marked tokens, 3 alternatives to each: {3 * marked} rollouts" in out.getvalue()
    )
    assert any(e.negatives for e in examples)


def test_a_killed_run_goes_on_where_it_was(given, tmp_path, monkeypatch):
    whole = collect(*given, tmp_path / "whole.jsonl", SETTINGS)
    made, limits = [], [1, 2]  # killed among the outputs, then before the rollouts

    def generate(*arguments, real=annotate_module.generate, **options):
        if limits and len(made) == limits[0]:
            del limits[0]
            raise KeyboardInterrupt
        made.append(options["numbers"].tolist() if "numbers" in options else "rollouts")
        return real(*arguments, **options)

    monkeypatch.setattr(annotate_module, "generate", generate)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collect(*given, tmp_path / "edits.jsonl", SETTINGS)
        assert not (tmp_path / "edits.jsonl").exists()
    assert collect(*given, tmp_path / "edits.jsonl", SETTINGS) == whole
    assert (tmp_path / "edits.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    # What an earlier run made was not made again.
    assert made[:3] == [[0, 1, 2, 3], [4, 5, 6], "rollouts"]
    assert made[2:] == ["rollouts"] * len(made[2:])


def test_a_run_that_was_killed_as_it_cleaned_up_ends_when_it_is_repeated(
    given, tmp_path, monkeypatch
):
    def killed(self):
        raise KeyboardInterrupt

    output = tmp_path / "edits.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr("t5patches.runs.claims.Parts.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(*given, output, SETTINGS)
    made = output.read_bytes()
    model, _, rules = given
    for changed in (CollectSettings(max_length=8), SETTINGS):
        inputs = INPUTS if changed != SETTINGS else ["other"]
        with pytest.raises(ValueError, match="exists: nothing is overwritten"):
            collect(model, inputs, rules, output, changed)
    collect(*given, output, SETTINGS)
    assert output.read_bytes() == made
    assert list(tmp_path.iterdir()) == [output]


def test_outputs_are_kept_for_other_rules_and_their_marks_are_not(given, tmp_path, monkeypatch):
    model, inputs, rules = given
    gap = Rules({**rules.rules, "gap": pattern(r"\s(?=\S)")}, "gap")
    edits = tmp_path / "edits.jsonl"
    with pytest.raises(ValueError, match=r"^output \d, '.*': rule 'gap' marks .* covers no tok"):
        collect(model, inputs, gap, edits, SETTINGS)
    # Rollouts by these rules are made, and the run is killed.
    with monkeypatch.context() as patched:
        patched.setattr("t5patches.editing.collect.examples_text", None)
        with pytest.raises(TypeError, match="'NoneType' object"):
            collect(*given, edits, SETTINGS)
    other = Rules({"other": pattern(r"\S*[aeiou]\S*")}, "other")
    whole = collect(model, inputs, other, tmp_path / "whole.jsonl", SETTINGS)

    def generate(*arguments, real=annotate_module.generate, **options):
        assert "numbers" not in options, "outputs are made again"
        return real(*arguments, **options)

    monkeypatch.setattr(annotate_module, "generate", generate)
    assert collect(model, inputs, other, edits, SETTINGS) == whole
    assert list(tmp_path.iterdir()) == [edits, tmp_path / "whole.jsonl"]


def test_another_run_does_not_go_on_there(folder, given, tmp_path, monkeypatch):
    model, inputs, rules = given
    output = tmp_path / "edits.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(annotate_module, "generate", None)
        with pytest.raises(TypeError, match="'NoneType' object"):
            collect(*given, output, SETTINGS)
    other_config = model.model.replace(layer_norm_epsilon=0.1)
    for other, difference in [
        ((model, inputs[1:], rules), "inputs"),
        ((model._replace(params={"x": np.ones(2)}), inputs, rules), "model"),
        ((load_model(folder / "model", dtype="bfloat16"), inputs, rules), "dtype"),
        ((model._replace(model=other_config), inputs, rules), "layer_norm_epsilon"),
    ]:
        with pytest.raises(ValueError, match=f"holds another run, which differs in {difference}"):
            collect(*other, output, SETTINGS)
    with pytest.raises(ValueError, match="differs in max_length"):
        collect(*given, output, CollectSettings(max_length=9, batch_size=4, negatives=3))
    output.write_text("x")
    with pytest.raises(ValueError, match="exists: nothing is overwritten"):
        collect(*given, output, SETTINGS)


def test_a_batch_that_does_not_fit_is_refused_before_it_runs(folder, tmp_path, capsys, monkeypatch):
    room = [2**20]
    monkeypatch.setattr("t5patches.editing.plan._host_memory", lambda: room[0])
    monkeypatch.setattr(annotate_module, "generate", None)
    monkeypatch.setattr(annotate_module, "working_memory", lambda model, **sizes: 100_000)
    output = tmp_path / "edits.jsonl"
    for room[0], fits in (
        (80_000, r"a batch size of 3 should fit \(--batch-size\); "),
        (9, ""),
    ):
        assert cli.main(arguments(folder, output)) == 2
        said = capsys.readouterr().err
        assert re.search(
            rf"annotate: 4 outputs at a time, to inputs of \d+ tokens take .* KiB, of .* KiB: that "
            rf"does not fit. {fits}shorter inputs .*--truncate-inputs",
            said,
        )
        assert not list(tmp_path.iterdir())  # nothing that a smaller batch would not fit to


def test_the_plan_is_of_the_program_that_runs(given, tmp_path, caplog, monkeypatch):
    planned = []
    monkeypatch.setattr(annotate_module, "require_room", lambda *plan, **_: planned.append(plan))
    with jax.log_compiles():
        collect(*given, tmp_path / "edits.jsonl", CollectSettings(max_length=7, batch_size=4))
    assert caplog.text.count("Compiling jit(_decode)") == 1
    ((_, working, beside, rows),) = planned
    assert working > 4 * rows * tokenizer().vocab_size  # logits at least
    assert (beside, rows) == (0, 4)


def test_rollouts_that_do_not_fit_are_refused_before_anything_is_said(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("t5patches.editing.plan._host_memory", lambda: 80_000)
    monkeypatch.setattr(annotate_module, "generate", None)
    logits = [0]
    monkeypatch.setattr(annotate_module, "memory_beside", lambda *_: logits[0])
    monkeypatch.setattr(
        annotate_module, "working_memory", lambda _, forced=0, **__: 100_000 * bool(forced)
    )
    output = tmp_path / "edits.jsonl"
    for k, logits[0], message in (
        ("3", 0, r"3 rollouts at a time, to inputs of \d+ tokens, take .* not fit. shorter .*"),
        ("2", 0, r"4 rollouts at a time, to .* a batch size of 3 should fit \(--batch-size\).*"),
        ("2", 10**5, r"4 outputs with their logits at a time, .* a batch size of 3 should fit.*"),
    ):
        assert cli.main([*arguments(folder, output), "--expand", k]) == 2
        assert re.search(f"{message}a smaller --expand", capsys.readouterr().err)
        assert not list(tmp_path.iterdir())


def test_the_plan_of_rollouts_is_of_the_program_that_runs(given, tmp_path, caplog, monkeypatch):
    planned = []
    monkeypatch.setattr(annotate_module, "require_room", lambda *plan, **_: planned.append(plan))
    settings = CollectSettings(max_length=5, batch_size=4, negatives=2)
    with jax.log_compiles():
        collect(*given, tmp_path / "edits.jsonl", settings)
    assert caplog.text.count("Compiling jit(_decode)") == 2  # outputs and rollouts
    _, logits, rollouts = planned
    assert logits[1] > 4 * 4 * 5 * tokenizer().vocab_size
    assert rollouts[1] > 4 * 4 * tokenizer().vocab_size
    assert [plan[-1] for plan in planned] == [4, 4, 4]


def test_several_samples_do_not_depend_on_the_batches(given):
    model, inputs, rules = given

    def said(batch_size, **options):
        options = {"max_length": 6, "temperature": 1.0, "samples": 3, **options}
        return speak(*model[:2], inputs, rules, model.tokenizer, batch_size=batch_size, **options)

    drawn = said(21)
    assert drawn == said(6)
    assert drawn != said(21, seed=1)
    assert [e.inputs for e in drawn] == [text for text in INPUTS for _ in range(3)]
    assert len({e.output_ids for e in drawn[:3]}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0: at least 1"),
        ({"max_length": 0}, "max_length is 0"),
        ({"negatives": -1}, "negatives is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rollout_length": 4}, r"\(--expand-length\) is 4 and negatives \(--expand\) 0"),
        ({"everywhere": True}, r"\(--expand-everywhere\) needs alternatives to try"),
        ({"rollout_length": 0, "negatives": 2}, r"--expand-length\) is 0"),
        ({"temperature": -1.0}, "the temperature is -1.0"),
        ({"temperature": float("nan")}, "the temperature is nan"),
        ({"temperature": float("inf")}, "the temperature is inf"),
        ({"temperature": 1e-38}, "the temperature is 1e-38: 0 .greedy., or a number of 1e-30"),
        ({"samples": 2}, "at temperature 0 all of them are the same: give a temperature"),
    ],
)
def test_settings_that_give_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CollectSettings(**settings)


def test_the_command_tells_prevalence_rules_and_examples(folder, tmp_path, capsys):
    output = tmp_path / "edits.jsonl"
    assert cli.main(arguments(folder, output, "--expand", "2", "--examples", "1")) == 0
    shown = capsys.readouterr()
    examples = read_examples(output, tokenizer())
    unwanted = sum(bool(e.spans) for e in examples)
    assert (
        f"{unwanted} of 7 outputs have something unwanted: {100 * unwanted / 7:.1f}%" in shown.out
    )
    assert f"letters: {unwanted} outputs\n  rule 2: 0 outputs\n" in shown.out
    assert "\n  x\\x1b[31m: 0 outputs\n" in shown.out
    assert "alternatives are unwanted too" in shown.out
    assert "7 outputs did not end within 8 tokens" in shown.out
    first = next(e for e in examples if e.spans)
    start, end = first.spans[0]
    assert f"{first.outputs[:start]}[{first.outputs[start:end]}]" in shown.out
    assert "rollouts to make" in shown.err
    assert cli.main(arguments(folder, output)) == 2
    assert "exists: nothing is overwritten" in capsys.readouterr().err


def test_the_command_expands_everywhere(folder, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("marked.jsonl", "everywhere.jsonl")}
    for (name, output), more in zip(files.items(), ([], ["--expand-everywhere"]), strict=True):
        assert cli.main(arguments(folder, output, "--expand", "2", *more)) == 0
        shown = capsys.readouterr()
        assert ("marked or uncertain tokens, 2 alt" in shown.err) == (name == "everywhere.jsonl")
    marked, everywhere = (read_examples(output, tokenizer()) for output in files.values())
    found = sum(len(ids) for e in everywhere for ids in e.negatives.values())
    assert f"\n{found} alternatives are unwanted too" in shown.out
    assert [only_where_marked(e) for e in everywhere] == marked
    assert everywhere != marked


def test_the_error_of_prevalence_is_over_inputs():
    """A hundred outputs that are alike tell no more of other inputs than one of them."""
    said = [Example(text, "x", (), (), (5, 1), (text == "bad", False)) for text in ("bad", "good")]
    for samples in (1, 100):
        outputs = [example for example in said for _ in range(samples)]
        found = _result(outputs, Rules({}), tokenizer())
        assert (found["prevalence"], found["prevalence_error"]) == (50, 50)
    assert _result(said[:1] * 9, Rules({}), tokenizer())["prevalence_error"] is None


def test_the_command_answers_scripts(folder, tmp_path, capsys):
    (tmp_path / "templates.txt").write_text("Short: {inputs}\n{inputs} TL;DR")
    more = ("--temperature", "1", "--samples", "2", "--templates", str(tmp_path / "templates.txt"))
    output = tmp_path / "edits.jsonl"
    assert cli.main(arguments(folder, output, *more, "--json", "--quiet")) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    result = json.loads(shown.out)
    examples = read_examples(output, tokenizer())
    assert result["outputs"] == len(examples) == 14
    assert result["marked_tokens"] == sum(sum(e.marked) for e in examples)
    assert result["rules"]["letters"] == result["unwanted"] == sum(bool(e.spans) for e in examples)
    assert {e.inputs.replace("news", "") for e in examples[:2]} <= {"Short:  0", " 0 TL;DR"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--inputs": "empty.txt"}, "empty.txt has no inputs: write one a line"),
        ({"--inputs": "absent.txt"}, "absent.txt"),
        ({"--rules": "bad.toml"}, "bad.toml: 1 bad rule\n  line 2, word: there is no such key"),
        ({"--model": "absent"}, "absent"),
        ({"--templates": "inputs.txt"}, "line 1: 'news 0' has no {inputs}"),
        ({"--samples": "3"}, "at temperature 0 all of them are the same"),
        ({"--expand": "9999"}, "count is 9999"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    folder, tmp_path, capsys, monkeypatch, changed, message
):
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_text(" \n\n")
    (folder / "bad.toml").write_text('[[rule]]\nword = ["x"]')
    given = arguments(folder, tmp_path / "edits.jsonl")
    for name, value in changed.items():
        given += [name, value]
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "edits.jsonl").exists()
