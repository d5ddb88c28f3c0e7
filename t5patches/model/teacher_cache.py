"""The original model's final hidden states, computed once and read beside each batch.

A linear loss asks nothing else of it than what its decoder hands to the head, and it never
changes: one pass over the data pays for all of training. The states lie in a zarr array, one row a
target token, in a directory that says which model, tokenizer and width they are of. An example is
known by its content, the tokens of its input and output without the padding behind them: so the
same cache serves any order, batch size and packing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from t5patches.model.protocol import ModelConfig, architecture, dtype_named
from t5patches.runs.claims import claim, in_turn, require_space, writing
from t5patches.runs.files import read_object, write_file

ORIGINAL_HIDDEN = "original_hidden"  # the feature of a batch that holds the cache's states

_ROWS_A_CHUNK = 1024
_KEY_BYTES = 32

Batch = Mapping[str, np.ndarray]


class _Segment(NamedTuple):
    """One example of a batch."""

    row: int
    places: np.ndarray  # of its target tokens in the row
    key: bytes


class CacheSize(NamedTuple):
    """What a cache holds, known before it is written.

    Attributes:
        examples: different ones.
        tokens: their target tokens.
        bytes: on disk.
    """

    examples: int
    tokens: int
    bytes: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.tokens:,} tokens of {self.examples:,} examples, {self.bytes / 1e9:.3f} GB"


def states_of(checkpoint: str, config: ModelConfig) -> dict[str, Any]:
    """What a cache is known by.

    Args:
        checkpoint: the fingerprint of the original's parameters.
        config: of its network: other settings make other states of the same parameters.
    """
    return {"checkpoint": checkpoint, "config": architecture(config)}


class TeacherCache:
    """A finished cache, open for reading.

    Attributes:
        directory: where it lies.
        width: entries of a hidden state.
        dtype: numpy's, of the states.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        about: Mapping[str, Any] | None = None,
        pad_id: int = 0,
    ):
        """Opens a cache.

        Args:
            directory: of `write_cache`.
            about: what it must be of, as given to `write_cache`; None asks nothing.
            pad_id: of the batches that it will be asked about.

        Raises:
            ValueError: there is none, it is unfinished, or it is of something else.
        """
        self.directory, self._pad_id = Path(directory), pad_id
        if not (self.directory / "run.json").exists():
            raise ValueError(f"{directory} holds no teacher cache: write one first")
        self._run = run = read_object(self.directory / "run.json")
        if about is not None:
            claim(self.directory, {**run, **about})
        if not (self.directory / "index.npz").exists():
            raise ValueError(
                f"the teacher cache in {directory} is unfinished, with none of its examples: write "
                "it again, it goes on from there"
            )
        try:
            index = np.load(self.directory / "index.npz")
            self._offsets = index["offsets"]
            self._at = {key.tobytes(): i for i, key in enumerate(index["keys"])}
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise self._spoilt(f"index.npz cannot be read ({error})") from error
        if (done := _done(self.directory)) < len(self._at):
            raise ValueError(
                f"the teacher cache in {directory} has {done} of {len(self._at)} examples: write "
                "it again, it goes on from there"
            )
        self.width = run["width"]
        shape = (int(self._offsets[-1]), self.width)
        chunks = range(-(-shape[0] // _rows_a_chunk(shape)))
        lost = [i for i in chunks if not (self.directory / "states" / f"c/{i}/0").exists()]
        if lost:  # they would be read as zeros
            raise self._spoilt(f"{len(lost)} of the {len(chunks)} files of its states are missing")
        self._states = _open(self.directory, run["dtype"], shape)
        self.dtype = self._states.dtype.numpy_dtype

    def _spoilt(self, how: str) -> ValueError:
        return ValueError(
            f"the teacher cache in {self.directory} is spoilt, as {how}: remove it and write it "
            "again"
        )

    def check(self, batch: Batch, about: Mapping[str, Any], *, width: int) -> None:
        """Makes sure that all examples of a batch are there, as the original has them.

        Args:
            batch: see `read`.
            about: what the cache must be of, as given to `write_cache`.
            width: of the model that will be trained.

        Raises:
            ValueError: one is not, or the states are of another width or of something else.
        """
        if self.width != width:
            raise ValueError(
                f"the teacher cache {self.directory} has states of {self.width} entries and the "
                f"model's have {width}: it is of another model"
            )
        claim(self.directory, {**self._run, **about})
        for segment in _segments(batch, self._pad_id):
            self._find(segment)

    def read(self, batch: Batch) -> np.ndarray:
        """The original model's states for a batch.

        Args:
            batch: arrays `inputs` [B, S], `outputs` and `weights` [B, L]; or T5X's features
                `encoder_input_tokens` [B, S], `decoder_input_tokens` and `decoder_target_tokens`
                [B, L], where several examples share a row also `encoder_segment_ids` and
                `decoder_segment_ids`. What has a weight is of an output, and so is what comes
                before it, also where it is the id of padding.

        Returns:
            [B, L, D] in the dtype of the cache; zeros where there is no target token.

        Raises:
            ValueError: an example is not there: the cache is of other data.
        """
        target = batch["outputs" if "outputs" in batch else "decoder_target_tokens"]
        out = np.zeros((*np.shape(target), self.width), self.dtype)
        found = [(s, self._find(s)) for s in _segments(batch, self._pad_id)]
        # All reads are under way before the first is waited for.
        reads = [self._states[a:b].read() for _, (a, b) in found]
        for (segment, _), states in zip(found, reads, strict=True):
            try:
                out[segment.row, segment.places] = states.result()
            except ValueError as error:
                raise self._spoilt(f"a file of its states cannot be read ({error})") from error
        return out

    def _find(self, segment: _Segment) -> tuple[int, int]:
        i = self._at.get(segment.key)
        if i is None:
            raise ValueError(
                f"the example in row {segment.row}, of {len(segment.places)} target tokens, is not "
                f"in the teacher cache {self.directory}: that is of other data, or of the same "
                "texts in other tokens; write one for these"
            )
        return int(self._offsets[i]), int(self._offsets[i + 1])


def write_cache(
    directory: str | os.PathLike[str],
    batches: Callable[[], Iterable[Batch]],
    hidden_of: Callable[[Batch], Any],
    about: Mapping[str, Any],
    *,
    width: int,
    dtype: str = "bfloat16",
    pad_id: int = 0,
    tell: Callable[[CacheSize | str], None] | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """Runs the original model over the data once, or finishes what a killed run began.

    Of several processes with one directory the first writes the cache, and the others wait for it.

    Args:
        directory: made if absent.
        batches: called twice; each time the same batches, see `TeacherCache.read`.
        hidden_of: the original model without dropout: a batch's states [B, L, `width`].
        about: what the states are of, as JSON has it: fingerprints of checkpoint and tokenizer.
        width: entries of a state.
        dtype: of the states, "float32" or "bfloat16".
        pad_id: of the batches.
        tell: is told the size before anything is written; and, where another process is at work
            in the directory, that this one waits.
        advance: is told after each batch how many examples are done, and of how many.

    Returns:
        The cache, open.

    Raises:
        ValueError: the directory holds a cache of something else; no batch has an example.
        OSError: the disk has too little room.
    """
    itemsize = np.dtype(dtype_named(dtype)).itemsize
    directory = Path(directory)
    lengths: dict[bytes, int] = {}
    for batch in batches():
        lengths.update((s.key, len(s.places)) for s in _segments(batch, pad_id))
    if not lengths:
        raise ValueError("no batch has an example to cache: all target tokens are padding")
    offsets = np.cumsum([0, *lengths.values()])
    tokens = int(offsets[-1])
    size = CacheSize(len(lengths), tokens, tokens * width * itemsize)
    tell = tell or (lambda _: None)
    tell(size)
    index = _index(list(lengths), offsets)
    run = {**about, "width": width, "dtype": dtype, "data": hashlib.sha256(index).hexdigest()}
    waits = "another process is at work in it; this one waits until that has ended"
    with in_turn(directory, lambda: tell(waits)):
        claim(directory, run)
        if not (directory / "index.npz").exists():
            require_space(directory, size.bytes, f"the teacher cache of {size}")
            write_file(directory / "index.npz", index)
        if _done(directory) < len(lengths):
            states = _open(directory, dtype, (size.tokens, width))
            _fill(directory, states, batches, hidden_of, lengths, offsets, pad_id, advance)
    return TeacherCache(directory, pad_id=pad_id)


def _fill(
    directory: Path,
    states: ts.TensorStore,
    batches: Callable[[], Iterable[Batch]],
    hidden_of: Callable[[Batch], Any],
    lengths: Mapping[bytes, int],
    offsets: np.ndarray,
    pad_id: int,
    advance: Callable[[int, int], None] | None,
) -> None:
    done = _done(directory)
    at = {key: i for i, key in enumerate(lengths)}
    for batch in batches():
        # In the order of the offsets, so that what a batch adds is one piece.
        found = {at[segment.key]: segment for segment in _segments(batch, pad_id)}
        new = [s for s in found.items() if s[0] >= done]
        if not new:
            continue
        hidden = np.asarray(hidden_of(batch))
        rows = np.concatenate([hidden[s.row, s.places] for _, s in new])
        first, last = new[0][0], new[-1][0] + 1
        part = states[int(offsets[first]) : int(offsets[last])]
        with writing(f"the teacher cache in {directory}", "what is there is"):
            part.write(rows.astype(states.dtype.numpy_dtype)).result()
        done = last
        write_file(directory / "done.json", json.dumps({"examples": done}))
        if advance is not None:
            advance(done, len(lengths))


def _segments(batch: Batch, pad_id: int) -> Iterator[_Segment]:
    """The examples of a batch, row by row."""
    if "outputs" in batch:
        source, target = (np.asarray(batch[name]) for name in ("inputs", "outputs"))
        # As T5X's features have it; what an output begins with is the same for all.
        given = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
    else:
        source, given, target = (
            np.asarray(batch[f"{name}_tokens"])
            for name in ("encoder_input", "decoder_input", "decoder_target")
        )
    weights = np.asarray(batch.get("weights", batch.get("decoder_loss_weights", 0)))
    in_source, in_target = source != pad_id, (target != pad_id) | (weights != 0)
    of_source, of_target = (
        np.asarray(batch.get(f"{side}_segment_ids", np.ones_like(counts, np.int32)))
        for side, counts in (("encoder", in_source), ("decoder", in_target))
    )
    for row in range(len(target)):
        for segment in np.unique(of_target[row][of_target[row] > 0]):
            sources = _to_the_last(np.flatnonzero(of_source[row] == segment), in_source[row])
            places = _to_the_last(np.flatnonzero(of_target[row] == segment), in_target[row])
            # Padding; packed, an empty text is an id of padding that has a segment.
            if not len(places):
                continue
            tokens = [source[row][sources], given[row][places]]
            # Networks may attend to no place whose target is the id of padding.
            if len(skipped := np.flatnonzero(target[row][places] == pad_id)):
                tokens.append(skipped)
            digest = hashlib.sha256()
            for part in tokens:
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part.astype("<i4").tobytes())
            yield _Segment(row, places, digest.digest())


def _to_the_last(places: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The places up to the last that counts: a model may say the id of padding on its way."""
    return places[: np.max(np.flatnonzero(counts[places]), initial=-1) + 1]


def _index(keys: list[bytes], offsets: np.ndarray) -> bytes:
    file = io.BytesIO()
    table = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), _KEY_BYTES)
    np.savez(file, keys=table, offsets=offsets)
    return file.getvalue()


def _open(directory: Path, dtype: str, shape: tuple[int, int]) -> ts.TensorStore:
    chunk = [_rows_a_chunk(shape), shape[1]]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str((directory / "states").absolute())},
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        },
        # States of nothing but 0 are written too, so that what is missing is lost.
        "store_data_equal_to_fill_value": True,
        # Batches come back to the same chunks: keep them.
        "context": {"cache_pool": {"total_bytes_limit": 256 << 20}},
    }
    return ts.open(spec, open=True, create=True).result()


def _rows_a_chunk(shape: tuple[int, int]) -> int:
    return min(shape[0], _ROWS_A_CHUNK)


def _done(directory: Path) -> int:
    path = directory / "done.json"
    done = read_object(path).get("examples") if path.exists() else 0
    if type(done) is not int:
        raise ValueError(f"{path} says that {done!r} examples are done: remove {directory}")
    return done
