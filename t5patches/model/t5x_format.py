"""T5X checkpoints in and out, without T5X.

A model directory holds `checkpoint_STEP` directories. Two formats lie in them:

* today's, of Orbax: `checkpoint_STEP/state`, a tree of arrays;
* the first, of the published T5 checkpoints: `checkpoint_STEP/checkpoint`, a msgpack tree whose
  leaves are arrays, or say in which zarr array beside it they lie.

Both hold `target`, the parameters, and `state`, the step and what the optimizer keeps. Both are
read; Orbax's is written, with a fresh Adafactor, so that T5X trains on from it as from any other.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import serialization, traverse_util

from t5patches.model.t5.model import T5
from t5patches.model.t5.network import T5Config
from t5patches.runs.claims import require_space, writing
from t5patches.runs.files import require_own_file, whole_folder

_STATE, _MSGPACK = "state", "checkpoint"
# Adafactor's second moments are factored where both dimensions are at least this large.
_LEAST_FACTORED = 128


class T5XCheckpoint(NamedTuple):
    """What a T5X checkpoint says of a model.

    Attributes:
        params: float32 numpy arrays, the tree that `t5patches.network.Transformer` takes.
        step: of its training.
    """

    params: dict[str, Any]
    step: int


def load_t5x(folder: str | os.PathLike[str]) -> T5XCheckpoint:
    """Reads the parameters of a T5X checkpoint.

    Args:
        folder: `checkpoint_STEP`, or a model directory, of which the latest step is taken.

    Returns:
        The checkpoint; bfloat16 widens to float32 without loss.

    Raises:
        ValueError: there is none, it cannot be read, or something in it leads out of it.
    """
    folder = find_t5x(folder)
    for path in folder.rglob("*"):
        if path.is_symlink():
            require_own_file(path)
    try:
        read = _read_orbax if (folder / _STATE).is_dir() else _read_msgpack
        tree = read(folder)
        params = {
            path: np.asarray(x, np.float32)
            for path, x in traverse_util.flatten_dict(tree["target"]).items()
        }
        return T5XCheckpoint(traverse_util.unflatten_dict(params), int(tree["state"]["step"]))
    except MemoryError:
        raise
    # Orbax, tensorstore and msgpack tell what is broken with exceptions of many kinds.
    except Exception as error:
        raise ValueError(f"{folder} cannot be read as a T5X checkpoint: {error}") from error


def save_t5x(directory: str | os.PathLike[str], params: Mapping[str, Any], step: int = 0) -> Path:
    """Writes a T5X checkpoint, whole or not at all.

    Args:
        directory: the model directory; made if absent.
        params: the parameters, the tree under `'params'`.
        step: T5X's learning rate schedules go by it.

    Returns:
        The `checkpoint_STEP` directory.

    Raises:
        ValueError: there is one already.
        OSError: the disk is full, say; nothing is left of the attempt.
    """
    directory = Path(directory).absolute()
    output = directory / f"checkpoint_{step}"
    if output.exists():
        raise ValueError(f"{output} exists: nothing is overwritten. Give another name or step")
    state = {"step": np.int32(step), "param_states": _fresh_adafactor(params)}
    tree = {"target": dict(params), "state": state}
    require_space(directory, sum(x.nbytes for x in jax.tree.leaves(tree)), "the checkpoint")
    options = ocp.CheckpointManagerOptions(
        step_prefix="checkpoint", enable_async_checkpointing=False
    )
    with whole_folder(output) as partial:
        made = partial / "made"
        with (
            writing(f"{output}", "nothing of it is"),
            ocp.CheckpointManager(made, options=options) as manager,
        ):
            manager.save(step, args=ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(tree)}))
        # Orbax names the folder of a step itself.
        for path in (made / output.name).iterdir():
            path.rename(partial / path.name)
        shutil.rmtree(made)
    return output


def find_t5x(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint that a path means.

    Args:
        folder: `checkpoint_STEP`, or a model directory.

    Returns:
        The `checkpoint_STEP` directory.

    Raises:
        ValueError: it holds none.
    """
    folder = Path(folder).absolute()
    inside = folder.iterdir() if folder.is_dir() else ()
    numbered = {path: re.fullmatch(r"checkpoint_(\d+)", path.name) for path in inside}
    steps = {int(number[1]): path for path, number in numbered.items() if number}
    found = steps[max(steps)] if steps else folder
    if not ((found / _STATE).is_dir() or (found / _MSGPACK).is_file()):
        raise ValueError(
            f"{folder} is no T5X checkpoint: a checkpoint_STEP directory has {_STATE}/ or a file "
            f"{_MSGPACK} in it, and a model directory has checkpoint_STEP directories"
        )
    return found


def infer_model(params: Mapping[str, Any]) -> T5:
    """A T5 of the sizes that its parameters show.

    Dropout, which they do not show, is as in every published T5: 0.1.

    Args:
        params: the tree of a T5X checkpoint.

    Returns:
        The model.

    Raises:
        ValueError: it is no T5's, or its layers are scanned; or they have gates, and parameters do
            not show whether these are GELU, SiLU or ReLU.
    """
    try:
        decoder, encoder = params["decoder"], params["encoder"]
        layer = encoder["layers_0"]
        heads = np.shape(encoder["relpos_bias"]["rel_embedding"])[0]
        if "wi_0" in layer["mlp"]:
            raise ValueError(
                "the model has gates, and its parameters do not show of which kind (gated-gelu, "
                "gated-silu, gated-relu): give a Hugging Face folder of the same model, whose "
                "config.json says it (--like)"
            )
        wi = layer["mlp"]["wi"]["kernel"]
        vocab_size, emb_dim = np.shape(params["token_embedder"]["embedding"])
        config = T5Config(
            vocab_size=vocab_size,
            emb_dim=emb_dim,
            num_heads=heads,
            num_encoder_layers=_layers(encoder),
            num_decoder_layers=_layers(decoder),
            head_dim=np.shape(layer["attention"]["query"]["kernel"])[1] // heads,
            mlp_dim=np.shape(wi)[1],
            mlp_activations=("relu",),
            logits_via_embedding="logits_dense" not in decoder,
        )
    except KeyError as error:
        raise ValueError(
            f"the checkpoint has no {error} where a T5 has it; its trees are {sorted(params)}. "
            "Models with scanned layers or other blocks are not converted"
        ) from error
    return T5(config)


def _layers(side: Mapping[str, Any]) -> int:
    return sum(name.startswith("layers_") for name in side)


def _fresh_adafactor(params: Mapping[str, Any]) -> dict[str, Any]:
    """What T5X's Adafactor keeps before its first update."""
    flat = {}
    for path, x in traverse_util.flatten_dict(dict(params)).items():
        shapes = dict.fromkeys(("m", "v", "v_col", "v_row"), (1,))
        shape = np.shape(x)
        if len(shape) == 2 and min(shape) >= _LEAST_FACTORED:
            smaller, larger = np.argsort(shape)
            shapes["v_row"], shapes["v_col"] = (shape[smaller],), (shape[larger],)
        else:
            shapes["v"] = shape
        for name, of in shapes.items():
            flat[(*path, name)] = np.zeros(of, np.float32)
    return traverse_util.unflatten_dict(flat)


def _read_orbax(folder: Path) -> dict[str, Any]:
    """The parameters and the step; what the optimizer keeps stays on the disk."""
    handler = ocp.PyTreeCheckpointHandler()
    there = handler.metadata(folder / _STATE).tree
    wanted = {"target": there["target"], "state": {"step": there["state"]["step"]}}
    flat = traverse_util.flatten_dict(wanted)
    as_numpy = dict.fromkeys(flat, ocp.RestoreArgs(restore_type=np.ndarray))
    return handler.restore(
        folder / _STATE,
        args=ocp.args.PyTreeRestore(
            wanted, restore_args=traverse_util.unflatten_dict(as_numpy), partial_restore=True
        ),
    )


def _read_msgpack(folder: Path) -> dict[str, Any]:
    found = serialization.msgpack_restore((folder / _MSGPACK).read_bytes())
    version = found.get("version", 0)
    if version not in (2, 3):
        raise ValueError(f"its version is {version!r}, and 2 and 3 are known")
    tree = found["optimizer"]
    leaves = traverse_util.flatten_dict(tree["target"], is_leaf=lambda _, x: "driver" in x)
    params = {
        path: _read_array(folder, x) if isinstance(x, dict) else x for path, x in leaves.items()
    }
    return {"target": traverse_util.unflatten_dict(params), "state": tree["state"]}


def _read_array(folder: Path, spec: Mapping[str, Any]) -> np.ndarray:
    """An array that lies beside the msgpack file, whatever storage it was first written to."""
    driver, path = spec["driver"], Path(spec["kvstore"].get("path") or spec["path"])
    if driver != "zarr":
        raise ValueError(f"an array is stored by {driver!r}, and only 'zarr' is known")
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"an array lies in {str(path)!r}, outside the checkpoint")
    store = {"driver": "file", "path": str(folder / path)}
    found = tensorstore.open({"driver": driver, "kvstore": store}, read=True).result()
    array = found.read().result()
    # Version 2 spells bfloat16 as the integers of its bits.
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
