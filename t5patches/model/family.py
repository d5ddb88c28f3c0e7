"""How a family of models is written in Hugging Face's folders: its settings and its names.

A family is one table of settings (which key of `config.json` is which field of the model's config)
and one of names (which tensor is which parameter); `t5patches.model.huggingface` reads and writes
folders by them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple


class Tensor(NamedTuple):
    """A tensor of a folder and the parameter it is.

    Attributes:
        path: of the parameter in the tree.
        shape: in the folder.
        transposed: whether the parameter is the transpose of it.
        copies: other names under which a folder may hold it as well.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    copies: tuple[str, ...] = ()


class Setting(NamedTuple):
    """A key of `config.json`.

    Attributes:
        field: of the model's config; None where only one value is known, which no field changes.
        read: makes the field's value of the key's; None where it cannot.
        write: makes the key's value of the field's; None where it cannot.
        needed: says what `read` takes.
        default: the key's value where it is absent.
    """

    field: str | None
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]
    needed: str
    default: Any = None


def size(field: str, default: int | None = None, *, least: int = 1) -> Setting:
    """A setting that is a whole number, of 1 or more, as JAX can hold it."""
    return Setting(
        field,
        lambda value: value if type(value) is int and least <= value < 2**31 else None,
        lambda value: value,
        f"a {'positive whole number' if least == 1 else f'whole number of at least {least}'} "
        "is needed",
        default,
    )


def positive(field: str, default: float) -> Setting:
    """A setting that is a positive number, as float32 can hold it."""
    return Setting(
        field,
        lambda value: float(value) if type(value) in (int, float) and 0 < value < 1e38 else None,
        lambda value: value,
        "a positive number is needed",
        default,
    )


def rate(field: str, default: float) -> Setting:
    """A setting that is a probability below 1."""
    return Setting(
        field,
        lambda value: float(value) if isinstance(value, int | float) and 0 <= value < 1 else None,
        lambda value: value,
        "a number from 0 to below 1 is needed",
        default,
    )


def choice(field: str, values: Mapping[Any, Any], default: Any = None) -> Setting:
    """A setting that is one of several: the field's value by the key's."""
    names = {value: name for name, value in values.items()}
    return Setting(
        field,
        lambda value: values.get(value) if isinstance(value, str | bool) else None,
        names.get,
        f"known are {sorted(values)}",
        default,
    )


def only(value: Any) -> Setting:
    """A setting that the network computes with one value."""
    return Setting(
        None,
        lambda found: value if found == value else None,
        lambda _: value,
        f"only {value!r} is known",
        value,
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models in Hugging Face's format.

    Attributes:
        name: of the family.
        model_types: what `config.json` calls its members.
        settings: by the key of `config.json`.
        tensors: by the name in the folder, for a config.
        model: makes the model, of its config's fields by name.
        layers: how many a config speaks of; each has a tensor at least.
        constants: what the `config.json` of a new folder says besides its settings.
        complete: fills in what a `config.json` leaves to be understood from its other keys, or
            from `generation_config.json`, its second argument.
        written: the inverse of `complete`, for a new folder.
        shown: fields of the config, by name, that only the names of a folder's tensors tell.
        unused: patterns, as `fnmatch` has them, of the names of tensors that a folder may have and
            the network does not.
        prefix: of the tensors' names, which a folder may leave out of all of them.
        task: what the PEFT library calls what its models do, in an adapter's folder.
    """

    name: str
    model_types: Sequence[str]
    settings: Mapping[str, Setting]
    tensors: Callable[[Any], Mapping[str, Tensor]]
    model: Callable[..., Any]
    layers: Callable[[Any], int]
    constants: Mapping[str, Any]
    complete: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
    written: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    shown: Callable[[Any, Collection[str]], Mapping[str, Any]] = lambda config, names: {}
    unused: Sequence[str] = ()
    prefix: str = ""
    task: str = "CAUSAL_LM"
