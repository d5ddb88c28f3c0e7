"""What editing and generation know of a network: the language model protocol.

A model reads prompts and makes outputs. How it reads a prompt, by an encoder or in front of the
output, is its own business, and so is what its cache holds. Nothing outside an implementation asks
which one it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from t5patches.model.family import Family

Array = jax.Array
Params = Mapping[str, Any]
Cache = Any
"""A tree of arrays: what a model keeps of the prompts and of the tokens decoded so far."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""What activations and caches may be, by name."""


class OutputHead(NamedTuple):
    r"""The last linear map: `logits = logit_scale * hidden @ kernel`, or `kernel.T`.

    With a softcap c the logits z become :math:`c \tanh(z / c)`.

    Attributes:
      kernel: float32 `[emb_dim, vocab_size]`; `[vocab_size, emb_dim]` where transposed.
      transposed: whether the vocabulary is the first axis.
      logit_scale: number that multiplies the logits.
      softcap: bound of the logits; None for none.
    """

    kernel: Array
    transposed: bool
    logit_scale: float
    softcap: float | None = None

    def logits(self, hidden: Array) -> Array:
        """Float32 logits `[..., vocab_size]` of hidden states `[..., emb_dim]`.

        The kernel is rounded to their type, as in the losses: what is sampled is what is trained.

        Example:
          >>> head = OutputHead(jnp.eye(2), transposed=False, logit_scale=3.0, softcap=2.0)
          >>> head.logits(jnp.array([0.0, 9.0])).round(4).tolist()
          [0.0, 2.0]
        """
        kernel = self.kernel.T if self.transposed else self.kernel
        made = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        logits = self.logit_scale * made
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def loss_options(self) -> dict[str, Any]:
        """The options by which the linear losses of `t5patches_kernels` make the same logits.

        Returns:
          `logit_scale`, `transposed` and `softcap`.
        """
        return {
            "logit_scale": self.logit_scale,
            "transposed": self.transposed,
            "softcap": self.softcap,
        }


class ModelConfig(Protocol):
    """Sizes and switches of a model: a frozen, hashable dataclass with these fields or properties.

    Attributes:
      vocab_size: number of ids.
      emb_dim: width D of the hidden states.
      dtype: of activations; parameters and logits are float32.
      dropout_rate: of the model being trained.
      remat: whether training runs each layer again in the backward pass instead of holding what is
        inside it.
      pad_id: stands after the end of a row; no text has it. It may be -1, which is no id.
      begin_id: the first token that the network is given, of an output or of all.
      end_id: the last token of an output, where data has a text without ids.
      end_ids: all tokens that end an output; `end_id` is the first.
      max_positions: tokens that a prompt and its output may have together, but for the last one;
        None for any number.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def vocab_size(self) -> int:
        """See the class."""

    @property
    def emb_dim(self) -> int:
        """See the class."""

    @property
    def dtype(self) -> Any:
        """See the class."""

    @property
    def dropout_rate(self) -> float:
        """See the class."""

    @property
    def remat(self) -> bool:
        """See the class."""

    @property
    def pad_id(self) -> int:
        """See the class."""

    @property
    def begin_id(self) -> int:
        """See the class."""

    @property
    def end_id(self) -> int:
        """See the class."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See the class."""

    @property
    def max_positions(self) -> int | None:
        """See the class."""


def dtype_named(name: str) -> Any:
    """The type of activations by its name.

    Args:
      name: of `DTYPES`.

    Returns:
      The type.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}: one of {tuple(DTYPES)} is needed")
    return DTYPES[name]


def differing(config: ModelConfig, other: ModelConfig) -> list[str]:
    """What two configs differ in, for messages.

    Args:
      config: the first.
      other: the second, of any family.

    Returns:
      `"emb_dim (16 and 32)"` for each field; nothing for equal configs.
    """
    one, two = dataclasses.asdict(config), dataclasses.asdict(other)
    names = [*one, *(name for name in two if name not in one)]
    pairs = ((name, one.get(name), two.get(name)) for name in names)
    return [f"{name} ({a} and {b})" for name, a, b in pairs if a != b]


def as_texts(config: ModelConfig) -> dict[str, str]:
    """A config's fields as texts, for JSON."""
    return {name: str(value) for name, value in dataclasses.asdict(config).items()}


def architecture(config: ModelConfig) -> dict[str, str]:
    """What of a config decides what weights compute, for JSON.

    Args:
      config: of the model.

    Returns:
      Its fields as texts, without `dtype`, `dropout_rate` and `remat`, which are of a run and not
      of the model.
    """
    of_runs = ("dtype", "dropout_rate", "remat")
    return {name: text for name, text in as_texts(config).items() if name not in of_runs}


def require_positions(config: ModelConfig, prompts: np.ndarray, outputs: np.ndarray | int) -> None:
    """Refuses what is longer than a model's positions.

    Args:
      config: of the model.
      prompts: tokens that each prompt has, `[N]`.
      outputs: tokens that the output to each may have.

    Raises:
      ValueError: one is too long.
    """
    # An empty prompt is given a token to begin with.
    lengths = np.maximum(prompts, 1) + np.maximum(outputs, 1) - 1
    if config.max_positions is None or lengths.max(initial=0) <= config.max_positions:
        return
    longest = int(lengths.argmax())
    output = int(np.broadcast_to(outputs, lengths.shape)[longest])
    raise ValueError(
        f"a prompt has {prompts[longest]} tokens and its output may have {output}: the model has "
        f"{config.max_positions} positions for both. Shorten or leave out what is longer, or let "
        "outputs have fewer tokens."
    )


class LanguageModel(Protocol):
    """A network without its parameters. Equal ones compute the same; they are hashable.

    Prompts and outputs are integer ids, `config.pad_id` after their end.

    Attributes:
      config: sizes and switches.
      family: how its folders are written.
    """

    @property
    def family(self) -> Family:
        """See the class."""

    def __hash__(self) -> int:
        """Of the config."""

    @property
    def config(self) -> ModelConfig:
        """See the class."""

    def replace(self, **changes: Any) -> Self:
        """The same model with other fields in its config, such as `dtype` and `remat`."""

    def init(self, key: Array) -> Params:
        """Random parameters, float32, as training begins with them."""

    def param_shapes(self) -> Params:
        """A tree of `jax.ShapeDtypeStruct`, shaped like the parameters; none is made."""

    def param_axes(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        """The logical axes of each parameter, by its path in the tree."""

    def axis_units(self) -> Mapping[str, int]:
        """The logical axes that devices may split, and how many units each has.

        A split goes between units: an axis of heads has as many as there are heads, however long
        it is.
        """

    def hidden(
        self, params: Params, batch: Mapping[str, Any], *, dropout_key: Array | None = None
    ) -> Array:
        """What the head turns into logits, where the model is given the outputs.

        Args:
          params: the parameters.
          batch: `inputs` `[B, S]` (the prompts) and `outputs` `[B, L]`, or `[B, K, L]` where each
            prompt has several: it is read once for all of them.
          dropout_key: for dropout; None for none.

        Returns:
          `[B, L, D]` or `[B, K, L, D]`: at each position of an output, the state that predicts its
          token.
        """

    def head(self, params: Params) -> OutputHead:
        """The last linear map; its kernel is the array in `params`, so gradients flow."""

    def head_params(self, params: Params) -> dict[str, Any]:
        """The part of the parameters, in its place in the tree, that `head` reads."""

    def first_inputs(self, prompts: Array) -> Array:
        """The token `[rows]` from which the first token of an output is predicted."""

    def prefill(
        self,
        params: Params,
        prompts: Array,
        begun: Array,
        start: Array,
        *,
        streams: int,
        max_length: int,
    ) -> Cache:
        """Reads prompts, and what all outputs to a prompt begin with, in one pass.

        Args:
          params: the parameters.
          prompts: `[rows, S]`.
          begun: `[rows, F]`, the beginning of the outputs.
          start: scalar, how many of these F tokens are taken; the rest may hold anything.
          streams: how many outputs to each prompt are decoded side by side. What belongs to the
            prompt is held once for all of them.
          max_length: tokens that an output may have.

        Returns:
          The cache. The next token that it takes is the one at `start` of `first_inputs` followed
          by `begun`.
        """

    def decode(self, params: Params, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
        """Takes one more token in every stream.

        Args:
          params: the parameters.
          cache: of `prefill` or of the step before.
          tokens: `[rows, streams]`.

        Returns:
          Float32 logits `[rows, streams, vocab_size]` of the token after, and the cache.
        """
