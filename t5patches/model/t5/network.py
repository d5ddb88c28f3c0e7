"""T5 in Flax with T5X's parameter tree, able to stop before the logits.

`Transformer` is called as `t5x.examples.t5.network.Transformer` is, and a T5X checkpoint loads into
it. It covers T5 1.0 (`mlp_activations=('relu',)`, `logits_via_embedding=True`), T5 1.1, Flan-T5 and
mT5 (`('gelu', 'linear')`, `False`).

A loss that multiplies by the vocabulary itself needs the decoder's last hidden states and the
matrix: `Transformer(...).apply(..., return_hidden=True)` and `output_head(config, params)`.

Sources: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", 2019, arXiv:1910.10683; Shazeer, "GLU Variants Improve Transformer", 2020,
arXiv:2002.05202.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from t5patches.model.protocol import OutputHead
from t5patches.model.remat import remat_module
from t5patches.model.t5 import layers
from t5patches.model.t5.layers import Array


@struct.dataclass
class T5Config:
    """The sizes and switches of a T5: the fields of T5X's class of this name, and some more.

    T5X's own may stand in its place, as gin files have it: it has the defaults of the fields that
    it lacks.

    Attributes:
      vocab_size: number of ids, rows of the embedding.
      dtype: of activations; parameters and logits are float32.
      emb_dim: width of the model.
      num_heads: attention heads.
      num_encoder_layers: encoder layers.
      num_decoder_layers: decoder layers.
      head_dim: size of each head; `num_heads * head_dim` need not be `emb_dim`.
      mlp_dim: width inside the feed-forward block.
      mlp_activations: one per input matrix of that block, see `layers.MlpBlock`.
      dropout_rate: everywhere where T5 drops.
      logits_via_embedding: the logits use the embedding, divided by `sqrt(emb_dim)` (T5 1.0).
      float32_attention_logits: attention logits in float32 whatever `dtype` is.
      scale_embedding_logits: that division; without it, as Hugging Face's library makes T5 1.1 and
        mT5 from a config. T5X always divides.
      layer_norm_epsilon: added to the mean square; T5X's is 1e-6, as for all that follow.
      relative_attention_num_buckets: of relative positions, see `layers.RelativePositionBiases`.
      relative_attention_max_distance: from which on they share a bucket.
      remat: whether training runs each layer again in the backward pass instead of holding what is
        inside it: less memory, a third more arithmetic. No property of the model.
    """

    vocab_size: int
    dtype: Any = jnp.float32
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: Sequence[str] = ("relu",)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False
    scale_embedding_logits: bool = True
    layer_norm_epsilon: float = 1e-6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    remat: bool = False

    @property
    def pad_id(self) -> int:
        """The network takes 0 for padding."""
        return 0

    @property
    def begin_id(self) -> int:
        """T5 has no token of its own for this: the decoder's first input is the padding id."""
        return 0

    @property
    def end_id(self) -> int:
        """The token that ends an output, and a prompt."""
        return 1

    @property
    def end_ids(self) -> tuple[int, ...]:
        """That one alone."""
        return (self.end_id,)

    @property
    def max_positions(self) -> None:
        """Positions are relative, so there is no last one."""


def output_head(config: T5Config, params: Mapping[str, Any]) -> OutputHead:
    """The matrix that turns the hidden states of `Transformer` into its logits.

    Args:
      config: of the model.
      params: its parameters, the tree under `'params'`.

    Returns:
      An `OutputHead`; its kernel is the array in `params`, so gradients flow.

    Raises:
      ValueError: where `params` has no such matrix.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> config = T5Config(vocab_size=8, emb_dim=4, num_heads=1, head_dim=4, mlp_dim=4,
      ...                   num_encoder_layers=1, num_decoder_layers=1)
      >>> ids = jnp.ones((1, 3), jnp.int32)
      >>> model = Transformer(config)
      >>> params = model.init(jax.random.key(0), ids, ids, ids, enable_dropout=False)['params']
      >>> call = dict(enable_dropout=False)
      >>> hidden = model.apply({'params': params}, ids, ids, ids, return_hidden=True, **call)
      >>> head = output_head(config, params)
      >>> logits = head.logit_scale * hidden @ head.kernel
      >>> bool(jnp.allclose(logits, model.apply({'params': params}, ids, ids, ids, **call)))
      True
    """
    tied = config.logits_via_embedding
    path = _head_path(config)
    node: Any = params
    for name in path:
        if name not in node:
            raise ValueError(
                f"No {'/'.join(path)} in params, which logits_via_embedding={tied} needs; found "
                f"{sorted(node)}. Pass the tree under 'params' and the config it was made with."
            )
        node = node[name]
    scaled = tied and _field(config, "scale_embedding_logits")
    return OutputHead(node, tied, config.emb_dim**-0.5 if scaled else 1.0)


def head_params(config: T5Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's parameters, in its place in the tree, that `output_head` reads.

    Args:
      config: of the model.
      params: its parameters, or anything in their place in such a tree.

    Returns:
      A tree with that one leaf.
    """
    path = _head_path(config)
    leaf: Any = params
    for name in path:
        leaf = leaf[name]
    return functools.reduce(lambda tree, name: {name: tree}, reversed(path), leaf)


def _head_path(config: T5Config) -> tuple[str, ...]:
    tied = config.logits_via_embedding
    return ("token_embedder", "embedding") if tied else ("decoder", "logits_dense", "kernel")


def _field(config: T5Config, name: str) -> Any:
    """A field that T5X's class lacks."""
    return getattr(config, name, getattr(T5Config, name))


def _attention(config: T5Config, name: str) -> layers.MultiHeadDotProductAttention:
    return layers.MultiHeadDotProductAttention(
        num_heads=config.num_heads,
        dtype=config.dtype,
        head_dim=config.head_dim,
        dropout_rate=config.dropout_rate,
        float32_logits=config.float32_attention_logits,
        name=name,
    )


def _mlp(config: T5Config) -> layers.MlpBlock:
    return layers.MlpBlock(
        intermediate_dim=config.mlp_dim,
        activations=config.mlp_activations,
        intermediate_dropout_rate=config.dropout_rate,
        dtype=config.dtype,
        name="mlp",
    )


def _norm(config: T5Config, name: str) -> layers.LayerNorm:
    epsilon = _field(config, "layer_norm_epsilon")
    return layers.LayerNorm(epsilon=epsilon, dtype=config.dtype, name=name)


def _dropout(config: T5Config) -> nn.Dropout:
    # The same features are dropped at every position of a row, as in T5.
    return nn.Dropout(rate=config.dropout_rate, broadcast_dims=(-2,))


def _relative_positions(config: T5Config) -> layers.RelativePositionBiases:
    return layers.RelativePositionBiases(
        num_buckets=_field(config, "relative_attention_num_buckets"),
        max_distance=_field(config, "relative_attention_max_distance"),
        num_heads=config.num_heads,
        dtype=config.dtype,
        embedding_init=nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
        name="relpos_bias",
    )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward block, each normalised before and added after.

    Attributes:
      config: of the model.
      relative_embedding: the encoder's relative positions, shared by its layers.
    """

    config: T5Config
    relative_embedding: nn.Module

    @nn.compact
    def __call__(
        self, inputs: Array, encoder_mask: Array | None = None, deterministic: bool = False
    ) -> Array:
        """Maps `[batch, length, emb_dim]` to the same shape."""
        cfg = self.config
        bias = self.relative_embedding(inputs.shape[-2], inputs.shape[-2], True)
        x = _norm(cfg, "pre_attention_layer_norm")(inputs)
        x = _attention(cfg, "attention")(x, x, encoder_mask, bias, deterministic=deterministic)
        x = _dropout(cfg)(x, deterministic=deterministic) + inputs
        y = _norm(cfg, "pre_mlp_layer_norm")(x)
        y = _mlp(cfg)(y, deterministic=deterministic)
        return _dropout(cfg)(y, deterministic=deterministic) + x


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder, feed-forward block.

    Attributes:
      config: of the model.
      relative_embedding: the decoder's relative positions, shared by its layers.
    """

    config: T5Config
    relative_embedding: nn.Module

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        encoded: Array,
        decoder_mask: Array | None = None,
        encoder_decoder_mask: Array | None = None,
        deterministic: bool = False,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Array:
        """Maps `[batch, length, emb_dim]` to the same shape, looking at `encoded`."""
        cfg = self.config
        length = max_decode_length if decode and max_decode_length else inputs.shape[-2]
        bias = self.relative_embedding(length, length, False)
        x = _norm(cfg, "pre_self_attention_layer_norm")(inputs)
        x = _attention(cfg, "self_attention")(
            x, x, decoder_mask, bias, deterministic=deterministic, decode=decode
        )
        x = _dropout(cfg)(x, deterministic=deterministic) + inputs
        y = _norm(cfg, "pre_cross_attention_layer_norm")(x)
        y = _attention(cfg, "encoder_decoder_attention")(
            y, encoded, encoder_decoder_mask, deterministic=deterministic
        )
        y = _dropout(cfg)(y, deterministic=deterministic) + x
        z = _norm(cfg, "pre_mlp_layer_norm")(y)
        z = _mlp(cfg)(z, deterministic=deterministic)
        return _dropout(cfg)(z, deterministic=deterministic) + y


class Encoder(nn.Module):
    """The encoder: embedding, layers, norm.

    Attributes:
      config: of the model.
      shared_embedding: the embedding that encoder and decoder share.
    """

    config: T5Config
    shared_embedding: nn.Module

    @nn.compact
    def __call__(
        self,
        encoder_input_tokens: Array,
        encoder_mask: Array | None = None,
        deterministic: bool = False,
    ) -> Array:
        """Maps ids `[batch, length]` to `[batch, length, emb_dim]`."""
        cfg = self.config
        relative_positions = _relative_positions(cfg)
        x = self.shared_embedding(encoder_input_tokens.astype(jnp.int32))
        x = _dropout(cfg)(x, deterministic=deterministic).astype(cfg.dtype)
        layer = remat_module(EncoderLayer) if _field(cfg, "remat") else EncoderLayer
        for i in range(cfg.num_encoder_layers):
            x = layer(cfg, relative_positions, name=f"layers_{i}")(
                x, encoder_mask, deterministic=deterministic
            )
        x = _norm(cfg, "encoder_norm")(x)
        # Alone among T5X's dropouts, this one draws for each position.
        return nn.Dropout(rate=cfg.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
    """The decoder: embedding, layers, norm, logits.

    Attributes:
      config: of the model.
      shared_embedding: the embedding that encoder and decoder share.
    """

    config: T5Config
    shared_embedding: nn.Module

    @nn.compact
    def __call__(
        self,
        encoded: Array,
        decoder_input_tokens: Array,
        decoder_positions: Array | None = None,
        decoder_mask: Array | None = None,
        encoder_decoder_mask: Array | None = None,
        deterministic: bool = False,
        decode: bool = False,
        max_decode_length: int | None = None,
        return_hidden: bool = False,
    ) -> Array:
        """Maps ids `[batch, length]` to float32 logits `[batch, length, vocab_size]`.

        `decoder_positions` is part of T5X's signature and needs no use: relative positions within
        a packed example are the same wherever it starts. With `return_hidden` the result is what
        the logits are made of, `[batch, length, emb_dim]` in `config.dtype`.
        """
        del decoder_positions
        cfg = self.config
        relative_positions = _relative_positions(cfg)
        y = self.shared_embedding(decoder_input_tokens.astype(jnp.int32))
        y = _dropout(cfg)(y, deterministic=deterministic).astype(cfg.dtype)
        layer = remat_module(DecoderLayer) if _field(cfg, "remat") else DecoderLayer
        for i in range(cfg.num_decoder_layers):
            y = layer(cfg, relative_positions, name=f"layers_{i}")(
                y,
                encoded,
                decoder_mask,
                encoder_decoder_mask,
                deterministic=deterministic,
                decode=decode,
                max_decode_length=max_decode_length,
            )
        y = _norm(cfg, "decoder_norm")(y)
        y = _dropout(cfg)(y, deterministic=deterministic)
        if return_hidden:
            return y
        if cfg.logits_via_embedding:
            logits = self.shared_embedding.attend(y)
            scaled = _field(cfg, "scale_embedding_logits")
            return logits / jnp.sqrt(jnp.float32(cfg.emb_dim)) if scaled else logits
        return layers.DenseGeneral(
            cfg.vocab_size,
            dtype=jnp.float32,
            kernel_axes=("embed", "vocab"),
            name="logits_dense",
        )(y)


class Transformer(nn.Module):
    """An encoder-decoder T5.

    Attributes:
      config: sizes and switches.
    """

    config: T5Config

    def setup(self) -> None:
        """Declares the embedding, the encoder and the decoder."""
        cfg = self.config
        # T5X looks ids up by a product with one-hot rows, which costs as much as the logits. A
        # lookup gives the same numbers, and today's partitioner splits it over the vocabulary.
        self.shared_embedding = layers.Embed(
            num_embeddings=cfg.vocab_size,
            features=cfg.emb_dim,
            dtype=cfg.dtype,
            attend_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(stddev=1.0),
            name="token_embedder",
        )
        self.encoder = Encoder(config=cfg, shared_embedding=self.shared_embedding)
        self.decoder = Decoder(config=cfg, shared_embedding=self.shared_embedding)

    def encode(
        self,
        encoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        enable_dropout: bool = True,
    ) -> Array:
        """Runs the encoder.

        Args:
          encoder_input_tokens: `[batch, length]`, 0 where padding.
          encoder_segment_ids: `[batch, length]`, the number of the packed example.
          enable_dropout: needs an rng named `'dropout'`.

        Returns:
          `[batch, length, emb_dim]` in `config.dtype`.

        Raises:
          ValueError: for ids that are not `[batch, length]`.
        """
        _check_ids("encoder_input_tokens", encoder_input_tokens)
        real = encoder_input_tokens > 0
        mask = layers.make_attention_mask(real, real, dtype=self.config.dtype)
        if encoder_segment_ids is not None:
            mask = layers.combine_masks(
                mask,
                layers.make_attention_mask(encoder_segment_ids, encoder_segment_ids, jnp.equal),
                dtype=self.config.dtype,
            )
        return self.encoder(encoder_input_tokens, mask, deterministic=not enable_dropout)

    def decode(
        self,
        encoded: Array,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        decoder_positions: Array | None = None,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        return_hidden: bool = False,
    ) -> Array:
        """Runs the decoder on what `encode` returned.

        Args:
          encoded: `[batch, length, emb_dim]`.
          encoder_input_tokens: for the mask only.
          decoder_input_tokens: `[batch, length]`, the targets shifted right by one, 0 first.
          decoder_target_tokens: for the mask only.
          encoder_segment_ids: packed examples, as given to `encode`.
          decoder_segment_ids: packed examples, `[batch, length]`.
          decoder_positions: not needed (positions are relative).
          enable_dropout: needs an rng named `'dropout'`.
          decode: allocate or use the `cache` collection; nothing is then taken for padding in the
            decoder.
          max_decode_length: length of the cache, where one position at a time is fed.
          return_hidden: stop before the logits.

        Returns:
          float32 logits `[batch, length, vocab_size]`, or with `return_hidden` the hidden states
          `[batch, length, emb_dim]` that `output_head` turns into them.

        Raises:
          ValueError: for ids that are not `[batch, length]`, segment ids on one side only, and
            packing while decoding.
        """
        _check_ids("decoder_input_tokens", decoder_input_tokens)
        if (encoder_segment_ids is None) != (decoder_segment_ids is None):
            raise ValueError(
                "encoder_segment_ids and decoder_segment_ids come together: a packed row says for "
                "both sides which example each position belongs to."
            )
        if decode and encoder_segment_ids is not None:
            raise ValueError(
                "During decoding, packing should not be used but `encoder_segment_ids` was passed "
                "to `Transformer.decode`. Give each example its own row."
            )
        return self.decoder(
            encoded,
            decoder_input_tokens=decoder_input_tokens,
            decoder_positions=decoder_positions,
            decoder_mask=None
            if decode
            else layers.make_decoder_mask(
                decoder_target_tokens,
                dtype=self.config.dtype,
                decoder_segment_ids=decoder_segment_ids,
            ),
            encoder_decoder_mask=self._cross_mask(
                encoder_input_tokens > 0,
                (decoder_target_tokens > 0) | decode,
                encoder_segment_ids,
                decoder_segment_ids,
            ),
            deterministic=not enable_dropout,
            decode=decode,
            max_decode_length=max_decode_length,
            return_hidden=return_hidden,
        )

    def _cross_mask(
        self,
        encoder_real: Array,
        decoder_real: Array,
        encoder_segment_ids: Array | None,
        decoder_segment_ids: Array | None,
    ) -> Array:
        packing = None
        if encoder_segment_ids is not None and decoder_segment_ids is not None:
            packing = layers.make_attention_mask(
                decoder_segment_ids, encoder_segment_ids, jnp.equal
            )
        real = layers.make_attention_mask(decoder_real, encoder_real)
        return layers.combine_masks(real, packing, dtype=self.config.dtype)

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        decoder_positions: Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        return_hidden: bool = False,
    ) -> Array:
        """Logits of the targets, or the hidden states before them.

        Args:
          encoder_input_tokens: `[batch, input_length]`, 0 where padding.
          decoder_input_tokens: `[batch, length]`, the targets shifted right by one, 0 first (in a
            packed row: at the start of every example).
          decoder_target_tokens: `[batch, length]`, 0 where padding; for the mask only.
          encoder_segment_ids: `[batch, input_length]`, the number of the packed example.
          decoder_segment_ids: `[batch, length]`, the number of the packed example.
          encoder_positions: not needed (positions are relative).
          decoder_positions: not needed (positions are relative).
          enable_dropout: needs an rng named `'dropout'`.
          decode: allocate or use the `cache` collection.
          return_hidden: stop before the logits.

        Returns:
          float32 logits `[batch, length, vocab_size]`, or with `return_hidden` the hidden states
          `[batch, length, emb_dim]` that `output_head` turns into them.

        Raises:
          ValueError: for ids that are not `[batch, length]`, segment ids on one side only, and
            packing while decoding.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> config = T5Config(vocab_size=8, emb_dim=4, num_heads=1, head_dim=4, mlp_dim=4,
          ...                   num_encoder_layers=1, num_decoder_layers=1)
          >>> targets = jnp.array([[3, 4, 1]])
          >>> inputs = jnp.array([[0, 3, 4]])
          >>> model = Transformer(config)
          >>> logits, variables = model.init_with_output(
          ...     jax.random.key(0), jnp.array([[5, 6, 1]]), inputs, targets, enable_dropout=False)
          >>> logits.shape
          (1, 3, 8)
        """
        del encoder_positions
        encoded = self.encode(
            encoder_input_tokens,
            encoder_segment_ids=encoder_segment_ids,
            enable_dropout=enable_dropout,
        )
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            decoder_positions=decoder_positions,
            enable_dropout=enable_dropout,
            decode=decode,
            return_hidden=return_hidden,
        )


def _check_ids(name: str, ids: Array) -> None:
    if ids.ndim != 2:
        raise ValueError(f"{name} must be [batch, length]; got shape {ids.shape}.")
