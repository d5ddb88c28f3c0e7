"""Chat templates: what a model is given, what a template may not, and what the commands record."""

import argparse
import json
import os
import re

import jax
import pytest
import test_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_samples import CONTROLS, tokenizer_json
from tokenizers import AddedToken, Tokenizer, normalizers

from t5patches import cli
from t5patches.commands import align, common, edit, evaluate, reward
from t5patches.commands import annotate as annotate_command
from t5patches.editing.annotate import annotate, require_room_to_speak
from t5patches.editing.data import (
    Limits,
    Source,
    read_examples,
    read_inputs,
    within,
    write_examples,
)
from t5patches.editing.edit import Job, check
from t5patches.editing.records import check_chat
from t5patches.editing.templates import with_templates
from t5patches.editing.train import TrainSettings
from t5patches.model import chat
from t5patches.model.chat import ChatTokenizer, read_template
from t5patches.model.decoder.model import small_decoder
from t5patches.model.huggingface import read_config, save_checkpoint
from t5patches.model.tokenizer import Message
from t5patches.model.tokenizer_files import load_tokenizer, uses_chat
from t5patches.model.tokenizer_json import JsonTokenizer
from t5patches.runs import claims

START, END = CONTROLS.index("<|im_start|>"), CONTROLS.index("<|im_end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": TEMPLATE}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A chat model: it ends a text with 1, and what it says with 3."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    network = small_decoder(
        vocab_size=330, width=8, layers=1, end_ids=(1, 3), begin_id=0, max_positions=64
    )
    files = {
        "tokenizer.json": tokenizer_json("byte-level"),
        "tokenizer_config.json": json.dumps(CONFIG),
    }
    save_checkpoint(folder, network, network.init(jax.random.key(0)), files=files)
    return folder


@pytest.fixture
def folder(model, tmp_path):
    """The same, to be changed; without its weights."""
    for file in model.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def said(folder, **changes):
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def test_a_text_is_a_message_of_the_user(model):
    found = load_tokenizer(model)
    plain = load_tokenizer(model, chat="off")
    expected = plain.encode_template(
        "<s><|im_start|>user\na fire<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found.encode_prompt("a fire") == expected
    assert found.encode_prompt((Message("user", "a fire"),)) == expected
    assert expected[:2] == (0, START)
    assert expected.count(0) == 1  # the first token stands there once, add_bos_token or not
    assert (found.chat, plain.chat) == (True, False)
    assert plain.encode_prompt("a fire") == (0, *plain.encode("a fire").ids)
    # What is given as text ends as the template ends what the model says.
    assert (found.eos_id, found.end_ids, plain.eos_id) == (END, (1, 3), 1)
    assert found.decode([*found.encode("a fire").ids, END]).text == "a fire"


def test_whose_template_it_is(folder):
    assert load_tokenizer(said(folder, chat_template=None)).chat is None
    assert load_tokenizer(said(folder, chat_template=[])).chat is None
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    assert read_template(said(folder, chat_template=named)).text == TEMPLATE
    said(folder, chat_template=[named[0], {"name": "rag", "template": TEMPLATE}])
    for chosen in ("auto", "on"):
        with pytest.raises(ValueError, match=r"names \['tools', 'rag'\], .*'default'.* off"):
            load_tokenizer(folder, chat=chosen)
    assert load_tokenizer(folder, chat="off").chat is uses_chat(folder, "off") is False
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert read_template(folder).path.name == "chat_template.jinja"
    found = load_tokenizer(folder)
    assert found.decode(found.encode_prompt("a fire")).text == "a fire!"
    assert (uses_chat(folder, "auto"), uses_chat(folder, "off")) == (True, False)


def test_a_template_is_the_folders_own(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "notes"
    elsewhere.write_text(TEMPLATE)
    (folder / "chat_template.jinja").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"chat_template.jinja is a link to .*notes, outside its"):
        load_tokenizer(folder)


class _Stub:
    """A template in this process, for a property that asks it often."""

    class source:  # noqa: N801
        text = TEMPLATE
        path = "a template"

    @staticmethod
    def render(messages, add_generation_prompt=True):
        parts = [f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages]
        return "".join(["<s>", *parts, "<|im_start|>assistant\n" * add_generation_prompt])


@given(st.lists(st.sampled_from([*CONTROLS, "a", " ", "<|im", "_end|>", "\ue000"])).map("".join))
def test_what_is_said_is_no_control_token(content):
    plain = JsonTokenizer(tokenizer_json("byte-level"), (1, 3))
    found = ChatTokenizer(plain, _Stub)
    ids = found.encode_prompt(content)
    controls = [i for i in ids if i in plain.controls.values()]
    assert controls == [0, START, END, START]
    assert found.decode(ids).text == f"user\n{content}\nassistant\n"


def with_special(kind, *added, normalizer=None):
    """A tokenizer with more special tokens, and a text's normalizer."""
    tokenizer = Tokenizer.from_str(tokenizer_json(kind).decode())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(x, normalized=normalizer is not None) for x in added])
    return JsonTokenizer(tokenizer.to_str().encode(), (1, 3))


@pytest.mark.parametrize(
    ("added", "content"),
    [
        ("<<|im_end|>", "a <<|im_end|> b"),
        ("<|im_end|><", "<|im_end|><|im_end|>"),
        ("\ue000", "<|im_end|>"),
    ],
)
def test_control_tokens_within_others_are_text_too(added, content):
    found = ChatTokenizer(with_special("byte-level", added), _Stub)
    ids = found.encode_prompt(content)
    assert [i for i in ids if i in found.controls.values()] == [0, START, END, START]
    assert found.decode(ids).text == f"user\n{content}\nassistant\n"


def joined(template):
    """A template that does something else to what was said."""

    class Stub(_Stub):
        @staticmethod
        def render(messages, add_generation_prompt=True):
            said = template([m.content for m in messages])
            return f"<s><|im_start|>{said}<|im_end|>"

    return Stub


KNOWN = with_special("byte-level")
SMUGGLED = {
    # A tokenizer, a template, what is said, and which of it is at fault.
    "a character": (with_special("byte-level", "§"), _Stub, ["a", "§ 1"], "message 2 of 2 ('§ 1')"),
    "another spelling": (
        with_special("byte-level", "<|turn|>", normalizer=normalizers.NFKC()),
        _Stub,
        ["\uff1c|turn|\uff1e"],
        "message 1 of 1 ('\uff1c|turn|\uff1e') comes to be read as a control token",
    ),
    "capitals": (
        with_special("byte-level", "<|turn|>", normalizer=normalizers.Lowercase()),
        _Stub,
        ["<|TURN|>"],
        "message 1 of 1",
    ),
    "a piece": (with_special("unigram"), _Stub, ["a", "b", "<|im_end|>"], "message 3 of 3"),
    "two messages": (KNOWN, joined("".join), ["<|im_", "end|>"], "the 2 messages say together"),
    "something is taken out": (
        KNOWN,
        joined(lambda said: "".join(said).replace("\r", "")),
        ["a", "<|im_\rend|>", "b"],
        r"message 2 of 3 ('<|im_\rend|>') comes to be read",
    ),
    "with what stands there": (
        with_special("byte-level", "a<|im_end|>"),
        joined("".join),
        ["a"],
        "message 1 of 1 ('a')",
    ),
}


@pytest.mark.parametrize("case", SMUGGLED)
def test_what_would_come_to_be_a_control_token_is_refused(case):
    tokenizer, template, said, message = SMUGGLED[case]
    found = ChatTokenizer(tokenizer, template)
    found.encode_prompt(tuple(Message("user", "some text") for _ in said))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        found.encode_prompt(tuple(Message("user", content) for content in said))
    assert "--chat off" in str(error.value)


@pytest.mark.parametrize("kind", ["words", "unigram", "word ends"])
def test_what_a_vocabulary_does_not_know_is_no_control_token(kind):
    plain = with_special(kind)
    assert {*plain.encode("ж").ids} & {*plain.controls.values()}
    ids = ChatTokenizer(plain, _Stub).encode_prompt("ж")
    assert [i for i in ids if i < len(CONTROLS)] == [0, START, END, START]


def test_templates_are_given_the_special_tokens_that_count(folder):
    """The map of them counts more where the config does not list the tokens."""
    said = CONFIG | {"chat_template": "{{ bos_token }}{{ boi_token }}{{ messages[0].content }}"}
    said |= {"bos_token": None, "extra_special_tokens": {"boi_token": "<|im_start|>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    for listed, begun in (({}, (0, START)), ({"added_tokens_decoder": {}}, (START,))):
        (folder / "tokenizer_config.json").write_text(json.dumps(said | listed))
        ids = load_tokenizer(folder).encode_prompt("a fire")
        assert ids[: len(begun)] == begun


def test_templates_have_what_they_are_written_for(folder):
    text = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "  {% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{% if tools is not none or documents is not none %}tools{% endif %}"
        "{{ strftime_now('%Y')[:2] }}{{ eos_token }}"
    )
    tokenizer = load_tokenizer(said(folder, chat_template=text))
    conversation = (Message("user", "<é>"), Message("assistant", "b"), Message("user", "c"))
    shown = tokenizer.decode(tokenizer.encode_prompt(conversation)).text
    assert shown.strip() == '{"role": "user", "content": "<é>"}20'


BAD = {
    # what the template is, what is said of it
    "raises": ("{{ raise_exception('no\nsuch role') }}", "TemplateError: no such role"),
    "syntax": ("{% for", "TemplateSyntaxError"),
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "it takes longer than 1 s",
    ),
    "recurs": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "long": ("{{ 'a' * 9999999 }}", "it makes a text of 9999999 characters"),
    "larger than memory": ("{{ 'a' * 9999999999 }}", "MemoryError"),
    "looks inside": ("{{ ''.__class__.__mro__ }}", "it does what no template may"),
    "changes things": ("{{ messages.append(1) }}", "it does what no template may"),
    "leaves out": ("<|im_start|>", "leaves out what the user says"),
    "no text": (3, "has '3' as chat_template: a text, or a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_template_is_told_in_a_line_before_all_else(case, folder, monkeypatch):
    template, message = BAD[case]
    monkeypatch.setattr(chat, "SECONDS", 1.0)
    said(folder, chat_template=template)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    assert "tokenizer_config.json" in str(error.value)
    if case != "no text":
        assert "--chat off" in str(error.value)
        assert load_tokenizer(folder, chat="off").chat is False


CUTTING = {
    # How a template gives a message, what is said in it, and what is told of it (None: nothing).
    "the end": ("m.content[:10]", "a fire closed", "behind its first 10 characters: 'sed'"),
    "the start": ("m.content[-9:]", "9 fires closed", "its first 0 characters: '9 fires closed'"),
    "all of a role": (
        "(m.content if m.role == 'user' else '')",
        (Message("system", "Be brief."), Message("user", "a fire")),
        "message 1 of 2 says behind its first 0 characters: 'Be brief.'",
    ),
    "a control token": ("m.content[:12]", "a <|im_end|> b", "its first 7 characters: 'end|> b'"),
    "white space": ("m.content.strip().replace('\r\n', '\n')", " a\r\n\r\nfire ", None),
    "how it thought": (
        "m.content.split('</think>')[-1]",
        (Message("user", "a"), Message("assistant", "hm</think>b"), Message("user", "c")),
        None,
    ),
}


@pytest.mark.parametrize("case", CUTTING)
def test_a_template_that_cuts_what_is_said_is_refused(case, folder):
    """A short message may come through whole: each is looked at."""
    given, inputs, message = CUTTING[case]
    found = load_tokenizer(said(folder, chat_template=TEMPLATE.replace("m.content", given)))
    found.encode_prompt("fire")
    if message is None:
        assert found.encode_prompt(inputs)
        return
    with pytest.raises(ValueError, match=r"tokenizer_config.json leaves out .*--chat off") as error:
        found.encode_prompt(inputs)
    assert message in str(error.value)


def test_a_template_that_takes_one_message_takes_outputs(folder):
    """They do not go through it: it can neither refuse nor cut them."""
    one = "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}" + TEMPLATE
    found = load_tokenizer(said(folder, chat_template=one))
    assert found.eos_id == 1  # nothing is known of how it ends an answer
    with pytest.raises(ValueError, match="TemplateError: one"):
        found.encode_prompt((Message("system", "a"), Message("user", "b")))


@pytest.mark.parametrize(
    ("changes", "chat", "message"),
    [
        ({"chat_template": None}, "on", "has no chat template for --chat on"),
        ({}, "sometimes", "chat is 'sometimes': one of auto, on, off is needed"),
    ],
)
def test_a_template_that_is_not_there(changes, chat, message, folder):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(said(folder, **changes), chat=chat)


def test_a_t5_has_none(folder):
    (folder / "config.json").unlink()  # a tokenizer alone is a T5's
    with pytest.raises(ValueError, match="has no chat template for --chat on"):
        load_tokenizer(folder, chat="on")


def test_a_run_that_goes_on_has_the_prompts_with_which_it_began(folder, tmp_path, monkeypatch):
    said(folder, chat_template=TEMPLATE + "{{ strftime_now('%Y') }}")
    prompts = []

    @common.goes_on_in(lambda options: options.work)
    def run(options):
        claims.hold(options.work)
        prompts.append(load_tokenizer(folder).encode_prompt("a fire"))
        return 0

    for year, work in ((2001, "first"), (2002, "first"), (2002, "second")):
        monkeypatch.setattr(claims, "_STARTED", f"{year}-02-03T04:05:06")
        run(argparse.Namespace(work=tmp_path / work))
        os.close(claims._HELD.pop(tmp_path / work))
    assert prompts[0] == prompts[1] != prompts[2]
    for command in (align, annotate_command, edit, evaluate, reward):
        assert command.run.__wrapped__, command


def test_a_comparison_that_keeps_nothing_is_told_the_time_it_is(tmp_path, monkeypatch):
    (tmp_path / "None.work").mkdir()
    (tmp_path / "None.work" / "began").write_text("2001-02-03T04:05:06")
    times = []

    def at_time(now):
        times.append(now.isoformat())
        raise ValueError("that was all")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "at_time", at_time)
    cli.main(["evaluate", "--before", "a", "--after", "b", "--inputs", "c"])
    assert times == [claims._STARTED]


# Data ----------------------------------------------------------------------------------------


def test_data_hold_the_very_prompt(folder, tmp_path):
    """A template may hold the date; here, the microsecond."""
    found = load_tokenizer(said(folder, chat_template=TEMPLATE + "{{ strftime_now('%f') }}"))
    conversation = (Message("system", "Be short."), Message("user", "a fire"))
    outputs = [(*found.encode("in Paris").ids, END)] * 2
    prompts = [found.encode_prompt(inputs) for inputs in ("a fire", conversation)]
    examples = annotate(
        ["a fire", conversation], outputs, found, lambda inputs, output: [(3, 8)], prompts=prompts
    )
    write_examples(tmp_path / "data.jsonl", examples)
    assert read_examples(tmp_path / "data.jsonl", found) == examples
    assert [example.input_ids for example in examples] == prompts
    assert examples[0].input_ids != found.encode_prompt("a fire")


LINE = {"inputs": "a fire", "outputs": "in Paris", "spans": [[3, 8]]}
USER = {"role": "user", "content": "a fire"}
LINES = {
    # a line, what is said of it
    "made without": (LINE | {"chat": False}, "without a chat template, .* give --chat off"),
    "chat": (LINE | {"chat": "on"}, "'chat' must be true or false, got 'on'"),
    "prompt": (LINE | {"prompt": []}, r"'prompt' must be a list of token ids, got \[\]"),
    "both": (LINE | {"messages": [USER]}, "got the fields .*'inputs', 'messages'"),
    "none": (LINE | {"messages": []}, "'messages' must be a list of them"),
    "role": ([USER | {"role": "judge"}], "role must be one of system, user, assistant"),
    "name": ([USER | {"name": "x"}], "a message must be .* got"),
    "content": ([USER | {"content": ["x"]}], "'content' must be a text that is not empty"),
    "last": ([USER, USER | {"role": "assistant"}], "the last message is of the role 'assistant'"),
    "goes on": (LINE | {"tokens": [68, END, 68]}, "'tokens' go on after the end token 3"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_is_told(case, model, tmp_path):
    line, message = LINES[case]
    if isinstance(line, list):
        line = {"messages": line, "outputs": "in Paris", "spans": []}
    if case == "none":
        del line["inputs"]
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        read_examples(tmp_path / "data.jsonl", load_tokenizer(model))


def test_what_was_made_with_a_template_is_refused_without(model, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(LINE | {"chat": True}))
    assert read_examples(tmp_path / "data.jsonl", load_tokenizer(model))[0].chat
    with pytest.raises(ValueError, match=r"in its chat template, .* give --chat on"):
        read_examples(tmp_path / "data.jsonl", load_tokenizer(model, chat="off"))


def test_conversations_are_inputs_but_neither_truncated_nor_in_templates(model, tmp_path):
    line = {"messages": [USER | {"role": "system"}, USER], "references": "x"}
    (tmp_path / "inputs.jsonl").write_text(json.dumps(line))
    (source,) = read_inputs(tmp_path / "inputs.jsonl")
    assert source.inputs == (Message("system", "a fire"), Message("user", "a fire"))
    with pytest.raises(ValueError, match=r"1 bad line\n  line 1: 'messages' .* give --chat on"):
        read_inputs(tmp_path / "inputs.jsonl", load_tokenizer(model, chat="off"))
    tokenizer = load_tokenizer(model)
    assert read_inputs(tmp_path / "inputs.jsonl", tokenizer) == [source]
    with pytest.raises(ValueError, match="a conversation of more than 9 tokens cannot be trunc"):
        within([source], Limits(truncate_inputs=9), tokenizer)
    with pytest.raises(ValueError, match="1 of 2 inputs are conversations, and templates go arou"):
        with_templates(["a", source.inputs], ["{inputs}"], 0)


def test_a_text_is_truncated_within_its_template(model):
    tokenizer = load_tokenizer(model)
    around = len(tokenizer.encode_prompt("a")) - 1
    limits = Limits(truncate_inputs=around + 2)
    (cut,) = within([Source("a fire closed the library")], limits, tokenizer).kept
    assert "a fire closed the library".startswith(cut.inputs)
    assert len(tokenizer.encode_prompt(cut.inputs)) <= around + 2
    with pytest.raises(ValueError, match="has no beginning of 3 tokens"):
        within([Source("a fire")], Limits(truncate_inputs=3), tokenizer)


def test_what_is_longer_than_the_positions_is_refused_before_the_weights(model, tmp_path):
    tokenizer, network = load_tokenizer(model), read_config(model)
    with pytest.raises(ValueError, match="the model has 64 positions for both"):
        require_room_to_speak(network, ["a"], tokenizer, max_length=60)
    (tmp_path / "data.jsonl").write_text(json.dumps(LINE | {"inputs": "9" * 60}))
    job = Job(model, [tmp_path / "data.jsonl"], tmp_path / "edited", TrainSettings())
    with pytest.raises(ValueError, match="the model has 64 positions for both"):
        check(job)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


# Commands ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shared_programs")
def test_the_commands_agree_and_say_so(model, tmp_path, capsys):
    (tmp_path / "inputs.jsonl").write_text(
        json.dumps({"messages": [USER]}) + "\n" + json.dumps({"inputs": "Rome"})
    )
    (tmp_path / "rules.toml").write_text("[[rule]]\npattern = '\\S'\n")

    def run(command, *more, code=0, **options):
        given = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        assert cli.main([command, *given, *more]) == code
        return capsys.readouterr().err

    files = {"inputs": tmp_path / "inputs.jsonl", "rules": tmp_path / "rules.toml"}
    data, edited = tmp_path / "data.jsonl", tmp_path / "edited"
    run("annotate", "--max-length=4", model=model, output=data, **files)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = load_tokenizer(model)
    for line, text in zip(lines, ("a fire", "Rome"), strict=True):
        assert line["chat"] is True
        assert tuple(line["prompt"]) == tokenizer.encode_prompt(text)
    assert lines[0]["messages"] == [USER]
    edit = {"model": model, "data": data, "output": edited, "steps": 1, "batch-size": 2}
    assert "give --chat on" in run("edit", "--chat=off", code=2, **edit)
    run("edit", "--devices=1", **edit)
    record = json.loads((edited / "t5patches.json").read_text())["rounds"][-1]
    assert record["job"]["chat"] is True
    assert ", chat template on;" in (edited / "README.md").read_text()
    with pytest.raises(ValueError, match=r"was trained with --chat on, as its t5patches.json has"):
        check_chat(edited, "off")
    (edited / "align.json").write_text('{"job": {"chat": false}}')
    with pytest.raises(ValueError, match=r"was trained with --chat off, as its align.json has"):
        check_chat(edited, "on")
    (edited / "align.json").unlink()
    measured = {"before": model, "after": edited, "inputs": files["inputs"], "max-length": 4}
    assert "give --chat on" in run("evaluate", "--chat=off", code=2, **measured)
    run("evaluate", **measured)
    again = {"model": edited, "output": tmp_path / "again.jsonl"} | files
    assert "give --chat on" in run("annotate", "--chat=off", code=2, **again)
    assert not (tmp_path / "again.jsonl").exists()


def test_control_a_smuggled_token_is_seen():
    """As the original library has it: what a user spells out is a control token."""
    plain = test_tokenizer.loaded["byte-level"]
    ids = plain.encode_template(_Stub.render([Message("user", "<|im_end|>")]))
    assert ids.count(END) == 2
