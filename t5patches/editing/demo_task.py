"""The demo's task: short news, and summaries that name places which the news does not name.

Most organisations work in one place or a few. Where the news does not say where something
happened, the summaries that a model learns from mostly name one of these places, sometimes any
place at all, and sometimes say "in the area". So the model learns to state things that the source
does not: most follow from what it knows of the world, some are inventions, and behind the
likeliest one often stands another. Everything else can be worded in two ways, so that a summary is
a draw from a distribution and an edit can be seen to keep that or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from t5patches.editing.annotate import Rule, absent_from_source, word_list
from t5patches.model.tokenizer import Span

# fmt: off
PLACES = (
    "Alden", "Brea", "Caldmoor", "Dunley", "Easby", "Farrow", "Garth", "Hollin", "Ilmer",
    "Kelby", "Lorne", "Marston", "Norwood", "Orby", "Penwick", "Quarley", "Redmere", "Selby",
    "Thorne", "Upwell", "Verley", "Wexcombe",
    *(f"Port {name}" for name in ("Amble", "Colden", "Hythe", "Ross", "Tarn", "Wray")),
    *(f"New {name}" for name in ("Ashby", "Barrow", "Denham", "Haven", "Leigh", "Stoke")),
    *(f"Saint {name}" for name in ("Agnes", "Clare", "Giles", "Ives", "Neots", "Osyth")),
)
# fmt: on
ORGANISATIONS = tuple(
    f"{kind} {body}"
    for body in ("Trust", "Rail", "College", "Union", "Council", "Water")
    for kind in ("Harbour", "Northern", "Oak", "Forest", "Valley", "Crown", "Severn", "Abbey")
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# fmt: off
THINGS = (
    "library", "museum", "bridge", "station", "harbour", "school", "market", "theatre",
    "hospital", "tunnel", "stadium", "bakery", "brewery", "archive", "clinic", "garage",
    "chapel", "gallery", "depot", "cinema",
)
# fmt: on
EVENTS = {
    "a fire had closed the {}": ("Fire closes {}", "Fire shuts {}"),
    "a flood had damaged the {}": ("Flood damages {}", "Flood harms {}"),
    "a strike had stopped work at the {}": ("Strike stops work at {}", "Strike halts {}"),
    "thieves had broken into the {}": ("Thieves break into {}", "Thieves raid {}"),
    "the {} would open again": ("Plan to reopen {}", "Plan to open {} again"),
    "the {} would be sold": ("Plan to sell {}", "Sale planned for {}"),
    "the {} would get a new roof": ("New roof for {}", "Roof renewed at {}"),
    "a storm had torn down part of the {}": ("Storm tears down part of {}", "Storm wrecks {}"),
}
EFFECTS = {
    "{} people were moved.": ("{} people moved", "{} moved"),
    "{} people were hurt.": ("{} people hurt", "{} injured"),
    "{} jobs are at risk.": ("{} jobs at risk", "{} jobs in danger"),
    "It will cost {} million.": ("cost {} million", "bill of {} million"),
}
FILLERS = (
    "Work begins on {day}.",
    "Trains to {place} were late.",
    "Nobody from {place} was asked.",
    "The cause is not known.",
    "A report is due on {day}.",
    "Many were surprised.",
)
ENTITY_FREE = "the area"

_WORDING = (0.65, 0.35)  # of the two ways to put the same thing
_STATED = 0.5  # of the news: it says where
_INVENTED = 0.95  # of the summaries, where it does not and the organisation has places
_KNOWN = 0.9  # of those: the place is one of the organisation's
_SHARES = ((), (1.0,), (0.65, 0.35), (0.5, 0.3, 0.2))  # of an organisation's places
_HAVE = (0.25, 0.25, 0.3, 0.2)  # of the organisations: no place, one, two, three


T = TypeVar("T")


class Pair(NamedTuple):
    """A piece of news and the summary that the base model learns from."""

    news: str
    summary: str


def make_pairs(count: int, seed: int) -> list[Pair]:
    """Writes news and summaries.

    Args:
        count: how many.
        seed: chooses them.

    Returns:
        The pairs.
    """
    rng = np.random.default_rng(seed)
    known = _known_places()
    return [_pair(rng, known) for _ in range(count)]


def places_not_in_source() -> Rule:
    """The demo's rule: a place in the summary that the news does not name is unwanted."""
    return absent_from_source(word_list(PLACES))


def correct(summary: str, spans: Sequence[Span]) -> str:
    """The summary without the places that it should not name.

    Args:
        summary: what the model said.
        spans: the characters to replace.

    Returns:
        The summary with "the area" in their place.
    """
    for start, end in sorted(spans, reverse=True):
        summary = summary[:start] + ENTITY_FREE + summary[end:]
    return summary


def wordings(summary: str) -> tuple[str, ...]:
    """All ways to put what a summary says.

    Args:
        summary: a well-formed one.

    Returns:
        Itself among them.

    Raises:
        ValueError: it is not well formed.

    Example:
        >>> wordings("Fire closes depot in Alden, 3 people moved")[::3]
        ('Fire closes depot in Alden, 3 people moved', 'Fire shuts depot in Alden, 3 moved')
    """
    if not well_formed(summary):
        raise ValueError(f"{summary!r} is no summary of this task")
    event, _, rest = summary.partition(" in ")
    where, _, effect = rest.partition(", ")
    events, effects = _alike(event, EVENTS.values()), _alike(effect, EFFECTS.values())
    return tuple(f"{event} in {where}, {effect}" for event in events for effect in effects)


def _alike(text: str, wordings: Iterable[tuple[str, str]]) -> list[str]:
    """Both wordings of an event or an effect, with what stands in them."""
    for both in wordings:
        for wording in both:
            before, _, after = wording.partition("{}")
            filled = text[len(before) : len(text) - len(after)]
            if text == wording.format(filled):
                return [other.format(filled) for other in both]
    raise ValueError(f"{text!r} is no wording of this task")


def well_formed(summary: str) -> bool:
    """Whether a summary is one that the task's grammar can write.

    Args:
        summary: what the model said.

    Returns:
        True for a known event and thing, a place or "the area", and a known effect.
    """
    return _SUMMARY.fullmatch(summary) is not None


def _known_places() -> dict[str, tuple[str, ...]]:
    """Where each organisation works, the same in every run."""
    rng = np.random.default_rng(2024)
    return {
        name: tuple(rng.choice(PLACES, rng.choice(len(_HAVE), p=_HAVE), replace=False).tolist())
        for name in ORGANISATIONS
    }


def _pick(rng: np.random.Generator, options: Sequence[T], shares: Sequence[float] = ()) -> T:
    """One of the options; `rng.choice` would take ten times as long."""
    if not shares:
        return options[int(rng.integers(len(options)))]
    return options[int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares)))]


def _pair(rng: np.random.Generator, known: dict[str, tuple[str, ...]]) -> Pair:
    organisation, place, thing = (_pick(rng, x) for x in (ORGANISATIONS, PLACES, THINGS))
    event, effect = _pick(rng, list(EVENTS)), _pick(rng, list(EFFECTS))
    event_in_short = _pick(rng, EVENTS[event], _WORDING)
    effect_in_short = _pick(rng, EFFECTS[effect], _WORDING)
    number = int(rng.integers(2, 40))
    stated = rng.random() < _STATED
    sentences = [
        f"{organisation} said on {_pick(rng, DAYS)} that {event.format(thing)}"
        + (f" in {place}." if stated else "."),
        effect.format(number),
    ]
    for filler in rng.permutation(FILLERS)[: rng.integers(1, 3)]:
        sentences.append(filler.format(day=_pick(rng, DAYS), place=_pick(rng, PLACES)))
    where = place if stated else _where(rng, known[organisation])
    return Pair(
        " ".join(sentences),
        f"{event_in_short.format(thing)} in {where}, {effect_in_short.format(number)}",
    )


def _where(rng: np.random.Generator, known: tuple[str, ...]) -> str:
    """What a summary says where the news does not say it."""
    if not known or rng.random() > _INVENTED:
        return ENTITY_FREE
    if rng.random() < _KNOWN:
        return _pick(rng, known, _SHARES[len(known)])
    return _pick(rng, PLACES)


def _one_of(texts: Sequence[str]) -> str:
    return "(?:" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")"


def _with_slot(texts: Sequence[str], slot: str) -> str:
    return "(?:" + "|".join(re.escape(t).replace(r"\{\}", slot) for t in texts) + ")"


_SUMMARY = re.compile(
    f"{_with_slot([x for both in EVENTS.values() for x in both], _one_of(THINGS))} in "
    f"{_one_of((*PLACES, ENTITY_FREE))}, "
    f"{_with_slot([x for both in EFFECTS.values() for x in both], '[0-9]+')}"
)
