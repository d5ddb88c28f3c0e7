"""The chat template of a model folder: from a conversation to the prompt that the model knows.

A template is a program from a stranger. It runs in a process of its own
(`t5patches.model.chat_process`), in Jinja's sandbox, with so much time, memory and output.

Inputs pass through the template, outputs do not: they follow the prompt as the ids that they are,
so that no template cuts or trims them.
"""

from __future__ import annotations

import bisect
import contextlib
import contextvars
import datetime
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5patches.model import chat_process
from t5patches.model.tokenizer import Inputs, Message, control_pattern, messages_of
from t5patches.runs.files import read_object, read_regular

CHATS = ("auto", "on", "off")
SECONDS = 20.0  # to render one prompt
_HARMLESS = "Question"  # a message that is no control token, whatever stands beside it
_CHARACTERS = 4_000_000  # of a prompt
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
COPY_AGAIN = "copy the model's own again"  # what to do where such a file cannot be read


_NOW: contextvars.ContextVar[datetime.datetime | None] = contextvars.ContextVar("now", default=None)


@contextlib.contextmanager
def at_time(now: datetime.datetime) -> Iterator[None]:
    """Templates that ask for the time, as Llama 3's do for the day, are told this one.

    So a run that goes on another day gives the model the prompts with which it began.

    Args:
        now: the time.
    """
    token = _NOW.set(now)
    try:
        yield
    finally:
        _NOW.reset(token)


class ChatSource(NamedTuple):
    """A chat template as a folder has it.

    Attributes:
        text: of the template.
        path: of the file that it is in.
    """

    text: str
    path: Path


def read_template(folder: str | os.PathLike[str], *, used: bool = True) -> ChatSource | None:
    """The chat template of a folder.

    Args:
        folder: with `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`: a text,
            or a list of named ones, of which "default" is taken.
        used: whether it is to be rendered. Else any one of a list is as good.

    Returns:
        The template; None where there is none.

    Raises:
        ValueError: it cannot be read, or is to be used and none of a list is "default".
    """
    path = Path(folder) / _FILE
    if path.exists():
        try:
            return ChatSource(read_regular(path).decode(), path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
    path = Path(folder) / _CONFIG
    found = read_object(path, COPY_AGAIN).get("chat_template") if path.exists() else None
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict)]
        default = [t for t in named if t.get("name") == "default"]
        if named and not default and used:
            names = [t.get("name") for t in named]
            raise ValueError(
                f"{path} has chat templates of the names {str(names)[:200]}, and the one that is "
                "taken is 'default': give one of them that name, or leave them out (--chat off)"
            )
        found = (default or named)[0].get("template") if named else found or None
    if found is not None and not isinstance(found, str):
        raise ValueError(
            f"{path} has {str(found)[:80]!r} as chat_template: a text, or a list of "
            '{"name": ..., "template": ...}, is needed'
        )
    return ChatSource(found, path) if found else None


class ChatTemplate:
    """A chat template, ready to be used.

    Example:
        >>> source = ChatSource(
        ...     "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ end }}{% endfor %}"
        ...     "{% if add_generation_prompt %}<assistant>{% endif %}", Path("a template"))
        >>> ChatTemplate(source, {"end": "</s>"}).render([Message("user", "Hello")])
        '<user>Hello</s><assistant>'
    """

    def __init__(self, source: ChatSource, names: Mapping[str, Any]):
        """Starts the template's process.

        Args:
            source: of the template.
            names: what it is given beside the conversation: `bos_token` and the like.

        Raises:
            ValueError: it is no template.
        """
        self.source = source
        self._names: dict[str, Any] = {"tools": None, "documents": None, **names}
        self._process: Any = subprocess.Popen(
            # -P: the modules beside the file are none of this process's.
            [sys.executable, "-P", chat_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end = weakref.finalize(self, _end, self._process)
        self._ask({"template": source.text, "seconds": SECONDS, "characters": _CHARACTERS})

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: of the conversation.
            add_generation_prompt: whether the text goes on to where the model begins to speak.

        Returns:
            The text.

        Raises:
            ValueError: the template refuses the conversation, fails, or does not come to an end.
        """
        said = [message._asdict() for message in messages]
        now = (_NOW.get() or datetime.datetime.now()).isoformat()
        names = {"messages": said, "add_generation_prompt": add_generation_prompt}
        return self._ask({"now": now, "names": self._names | names})

    def _ask(self, request: Mapping[str, Any]) -> str:
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or "{}")
        except BrokenPipeError:
            answer = {}
        if "text" in answer:
            return answer["text"]
        error = answer.get("error")
        if error is None:
            self._end()
            late = self._process.returncode == -signal.SIGALRM
            error = (
                f"it takes longer than {SECONDS:g} s"
                if late
                else f"its process has ended ({self._process.returncode})"
            )
        raise ValueError(
            f"the chat template in {self.source.path} cannot be used here: {error}. Correct it, or "
            "leave it out (--chat off)"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


class ChatTokenizer:
    """A tokenizer whose prompts are conversations, put in the words of a chat template.

    A text is one message of the user. The control tokens that the template spells out become their
    ids; those that a message spells out stay text. What a message cannot be kept from making, with
    what the template and the tokenizer do to it, is refused: a conversation has the control tokens
    that any other of the same roles has. As in the original library, the template says all: no
    token is put in front of it.

    Attributes:
        eos_id: the end token that the template puts behind what the model has said, where there is
            one; else the tokenizer's.
    """

    chat: bool | None = True

    def __init__(self, tokenizer: Any, template: ChatTemplate):
        """Tries the template out.

        Args:
            tokenizer: the folder's; it is to have `controls` and `encode_template` as well.
            template: the folder's.

        Raises:
            ValueError: the template fails at a conversation of one message, or leaves it out.
        """
        self._tokenizer, self._template = tokenizer, template
        self.controls: Mapping[str, int] = tokenizer.controls
        self.vocab_size, self.pad_id = tokenizer.vocab_size, tokenizer.pad_id
        self.end_ids: tuple[int, ...] = tokenizer.end_ids
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        question, answer = Message("user", _HARMLESS), Message("assistant", "Answer")
        if question.content not in template.render([question]):
            raise ValueError(
                f"the chat template in {template.source.path} leaves out what the user says. "
                "Correct it, or leave it out (--chat off)"
            )
        unknown: tuple[int, ...] = ()  # what a vocabulary does not know may be a control token
        with contextlib.suppress(ValueError):
            unknown = tokenizer.encode("\U00013000").ids
        self._control_ids = frozenset(self.controls.values()) - {*unknown}
        self._expected: dict[tuple[str, ...], list[int]] = {}  # control tokens by roles
        self.eos_id: int = tokenizer.eos_id
        try:
            whole = template.render([question, answer], add_generation_prompt=False)
        except ValueError:
            return  # it takes no answers, and so says nothing of their end
        behind = tokenizer.encode_template(whole.rpartition(answer.content)[2])
        self.eos_id = next((i for i in behind if i in self.end_ids), tokenizer.eos_id)

    def encode_prompt(self, inputs: Inputs) -> tuple[int, ...]:
        """What the model is given for a text or a conversation.

        Args:
            inputs: a text, which is a message of the user, or a conversation.

        Returns:
            The ids of the rendered template.

        Raises:
            ValueError: the template refuses it, leaves a part of it out, or a message would come
                to be a control token.
        """
        messages = messages_of(inputs)
        text, mark = self._render(messages)
        ids = self._tokenizer.encode_template(text, mark)
        roles = tuple(message.role for message in messages)
        if roles not in self._expected:
            harmless = [message._replace(content=_HARMLESS) for message in messages]
            self._expected[roles] = self._controls_of(self._encode(harmless))
        if self._controls_of(ids) != self._expected[roles]:
            raise ValueError(
                f"{self._smuggler(messages, self._expected[roles])} comes to be read as a control "
                f"token, by the chat template in {self._template.source.path} or the tokenizer "
                "beside it: say it otherwise, or leave the template out (--chat off)"
            )
        self._require_whole(messages, text.replace(mark, ""))
        return ids

    def _require_whole(self, messages: Sequence[Message], text: str) -> None:
        """Refuses a template that cuts what is said to the model; white space is its own affair.

        What the model has said before may be cut: templates leave out how it thought.
        """
        there = "".join(text.split())
        for number, message in enumerate(messages, start=1):
            places = [i for i, c in enumerate(message.content) if not c.isspace()]
            said = "".join(message.content[i] for i in places)
            if message.role == "assistant" or said in there:
                continue
            least = bisect.bisect(range(len(said)), False, key=lambda n: said[: n + 1] not in there)
            cut = message.content[places[least] :]
            raise ValueError(
                f"the chat template in {self._template.source.path} leaves out or changes what "
                f"message {number} of {len(messages)} says behind its first {places[least]} "
                f"characters: {cut[:80]!r}. Correct it, or leave it out (--chat off)"
            )

    def _encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._tokenizer.encode_template(*self._render(messages))

    def _render(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The text of a conversation, and what keeps its messages from being control tokens."""
        said = "".join(message.content for message in messages)
        mark = ""
        if self.controls:
            pattern = control_pattern(self.controls)
            if pattern.search(said):
                # A character of its own, so that taking it out leaves all else as it was. It stands
                # behind each character, as another control token may begin at any of them.
                taken = {*said, *self._template.source.text, *"".join(self.controls)}
                mark = next(chr(c) for c in range(0xE000, 0x110000) if chr(c) not in taken)
                messages = tuple(
                    m._replace(content=pattern.sub(lambda f: mark.join((*f[0], "")), m.content))
                    for m in messages
                )
        return self._template.render(messages), mark

    def _controls_of(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._control_ids]

    def _smuggler(self, messages: Sequence[Message], expected: Sequence[int]) -> str:
        """Which message makes other control tokens than any other does."""
        for n, message in enumerate(messages):
            alone = [message if m is message else m._replace(content=_HARMLESS) for m in messages]
            if self._controls_of(self._encode(alone)) != expected:
                return f"message {n + 1} of {len(messages)} ({message.content[:80]!r})"
        return f"what the {len(messages)} messages say together"
