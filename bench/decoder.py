"""Edits and outputs of decoder-only models beside torch and transformers: `make bench-decoder`.

Three questions, in one run on this machine, weights random:

* update: one update of TNFF with Adam, 8 examples of 128 and 32 tokens, SmolLM2-135M's shape, all
  parameters or an adapter of rank 16, what is inside layers held or run again (`--remat`; in torch
  gradient checkpointing), the original run at each update (live) or its hidden states read from a
  teacher cache. Beside it the same loss of the same parameters in torch: transformers' network,
  peft's adapter, T5Patches' formula on whole logits of the outputs; for a cached original it is
  given the same hidden states, in memory, and makes its logits of them. The first loss of both must
  agree. Where the original is live, also the seconds of an update's parts: torch's update is timed
  as it goes, ours, which is one program, by a program for each part.
* speak: 8 greedy outputs of 32 tokens for prompts of 128, with transformers' `generate` beside.
* memory: what the compiled update holds by XLA's own figures, nothing run, for SmolLM2's shape and
  Llama 3.2 1B's; beside it the same with the dense losses.

Each measurement is a process of its own, and they take turns. What is held counts from the imports
on; "working" is the largest set of an update but the first, beyond parameters and the optimizer's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from bench import common
from t5patches.editing.plan import plan_memory
from t5patches.editing.train import Frozen, Step, TrainSettings, cache_teacher
from t5patches.model.generate import generate
from t5patches.model.huggingface import load_checkpoint, understand
from t5patches.model.lora import Lora, with_trained
from t5patches.model.memory import give_back
from t5patches.model.protocol import LanguageModel
from t5patches.model.teacher_cache import ORIGINAL_HIDDEN
from t5patches_kernels import linear_targeted_negative_loss

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        **_LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100_000.0,
    },
    "Llama 3.2 1B": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500_000.0,
    },
}
ROWS, PROMPT, OUTPUT, RANK, RATE = 8, 128, 32, 16, 1e-5
# What is trained; what is inside layers: held or run again; the original.
UPDATES = list(itertools.product(("all", "LoRA"), ("held", "run again"), ("live", "cached")))
# Of an update. The network: of the model being trained, forward and backward.
PARTS = ("original", "network", "head and loss", "optimizer")
LIBRARIES, HELD = ("ours", "torch"), ("held", "working")


def batch(rows: int | None = None) -> dict[str, np.ndarray]:
    """Random examples, one token in sixteen pushed down."""
    rng, rows = np.random.default_rng(0), rows or ROWS
    weights = np.where(np.arange(rows * OUTPUT) % 16 == 0, -1.0, 1.0).reshape(rows, OUTPUT)
    most = SHAPES["SmolLM2-135M"]["vocab_size"]
    return {
        "inputs": rng.integers(3, most, (rows, PROMPT)).astype(np.int32),
        "outputs": rng.integers(3, most, (rows, OUTPUT)).astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def settings_of(trained: str, implementation: str | None = None) -> TrainSettings:
    """As `t5patches edit` has them."""
    lora = Lora(RANK) if trained == "LoRA" else None
    return TrainSettings(
        objective="tnff", batch_size=ROWS, optimizer="adam", learning_rate=RATE, lora=lora,
        implementation=implementation,
    )  # fmt: skip


# --- In processes of their own: the work of a measurement, and what it holds between two calls ----

Seconds = dict[str, float]  # by part


class Work(NamedTuple):
    """What is measured.

    Attributes:
        call: does it once, and gives a number in which both libraries must agree.
        held: bytes that lie between two calls.
        parts: the seconds of its parts, each of so many times.
    """

    call: Callable[[], float]
    held: Callable[[], int]
    parts: Callable[[int], list[Seconds]] = lambda _: []


@contextlib.contextmanager
def timed(part: str, taken: Seconds) -> Iterator[None]:
    """Adds what it takes to a part's seconds."""
    began = time.perf_counter()
    yield
    taken[part] = taken.get(part, 0.0) + time.perf_counter() - began


@contextlib.contextmanager
def our_update(folder: str, trained: str, layers: str, original: str) -> Iterator[Work]:
    """An update as `t5patches edit` makes it."""
    model, params = load_checkpoint(folder)
    model = model.replace(remat=layers == "run again")
    settings, arrays, teacher = settings_of(trained), batch(), None
    with tempfile.TemporaryDirectory() as place:
        if original == "cached":
            teacher = cache_teacher(place, model, params, arrays, batch_size=ROWS, dtype="float32")
        step = Step(model, settings, arrays, cached=teacher and str(teacher.dtype))
        state, frozen = step.start(params), step.place(params, params)
        del params
        give_back()

        def call() -> float:
            nonlocal state
            read = {} if teacher is None else {ORIGINAL_HIDDEN: teacher.read(arrays)}
            state, metrics = step(state, frozen, arrays | read, 0)
            jax.block_until_ready(state)
            return float(metrics["loss"])

        def held() -> int:
            return sum(x.nbytes for x in jax.tree.leaves((state, frozen)))

        def parts(rounds: int) -> list[Seconds]:
            return our_parts(model, settings, state.params, frozen, rounds)

        yield Work(call, held, parts)


def our_parts(
    model: LanguageModel, settings: TrainSettings, trained: Any, frozen: Frozen, rounds: int
) -> list[Seconds]:
    """An update with a live original, by a program for each part."""
    arrays, lora = batch(), settings.lora
    original = frozen.base if frozen.original is None else frozen.original

    @jax.jit
    def network(trained: Any, base: Any, d_hidden: jax.Array) -> tuple[jax.Array, Any]:
        hidden, backward = jax.vjp(
            lambda trained: model.hidden(with_trained(base, trained, lora), arrays), trained
        )
        return hidden, backward(d_hidden)[0]

    def loss(hidden: jax.Array, head: Any, ref_hidden: jax.Array, ref_head: Any) -> jax.Array:
        of = model.head(head)
        tokens = linear_targeted_negative_loss(
            hidden, of.kernel, ref_hidden, model.head(ref_head).kernel,
            arrays["outputs"], arrays["weights"],
            objective=settings.objective, skip_ignored=True, **of.loss_options(),
        )  # fmt: skip
        return tokens.loss.mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def optimize(trained: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = adam.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state

    of_original = jax.jit(model.hidden)
    of_loss = jax.jit(jax.value_and_grad(loss, argnums=(0, 1) if lora is None else (0,)))
    adam = optax.adam(RATE)
    ref_head = model.head_params(original)
    # As what the programs make is placed, or they would be compiled again. `trained` is a copy: it
    # is given away.
    d_hidden = jax.numpy.ones((ROWS, OUTPUT, model.config.emb_dim))
    begun = jax.tree.map(jax.numpy.copy, trained), jax.jit(adam.init)(trained), d_hidden
    trained, state, d_hidden = jax.device_put(begun, jax.devices()[0])
    rows = []
    for _ in range(1 + rounds):
        rows.append(taken := Seconds())
        with timed("original", taken):
            ref_hidden = jax.block_until_ready(of_original(original, arrays))
        with timed("network", taken):
            hidden, gradient = jax.block_until_ready(network(trained, frozen.base, d_hidden))
        with timed("head and loss", taken):
            head = model.head_params(trained) if lora is None else ref_head
            _, (d_hidden, *_) = jax.block_until_ready(of_loss(hidden, head, ref_hidden, ref_head))
        with timed("optimizer", taken):
            trained, state = jax.block_until_ready(optimize(trained, state, gradient))
        del gradient
    return rows[1:]  # the first compiles


@contextlib.contextmanager
def torch_update(folder: str, trained: str, layers: str, original: str) -> Iterator[Work]:
    """The same in torch."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if layers == "run again":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # which it wants; nothing drops
    yield dense_in_torch(model, trained, batch(), original)


def dense_in_torch(
    model: Any,
    trained: str,
    examples: dict[str, np.ndarray],
    original: str = "live",
    frozen_dtype: Any = None,
) -> Work:
    """An update of transformers' network, with its parameters or peft's adapter, on its device."""
    import peft
    import torch

    from bench import torch_dense

    frozen = None
    if trained == "LoRA":
        lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        adapted = peft.get_peft_model(model.to(frozen_dtype or model.dtype), lora)
        without = adapted.disable_adapter
    else:
        frozen = copy.deepcopy(model).requires_grad_(False).to(frozen_dtype or model.dtype)
        without = contextlib.nullcontext
    arrays = {name: torch.from_numpy(x).to(model.device) for name, x in examples.items()}
    targets, weights = arrays["outputs"].long().flatten(), arrays["weights"].flatten()
    read = torch.cat([arrays["inputs"], arrays["outputs"][:, :-1]], dim=1).long()
    learned = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.Adam(learned, RATE)

    def hidden(of: Any) -> torch.Tensor:
        return of.model(input_ids=read, use_cache=False).last_hidden_state[:, PROMPT - 1 :]

    def frozen_hidden() -> torch.Tensor:
        with torch.no_grad(), without():
            return hidden(frozen or model)

    head = (frozen or model).lm_head.weight.detach()
    cached = None
    if original == "cached":
        cached, frozen = frozen_hidden(), None
    rows: list[Seconds] = []

    def call() -> float:
        rows.append(taken := Seconds())
        with timed("original", taken):
            ref = frozen_hidden() if cached is None else cached
        with timed("network", taken):
            h = hidden(model)
        # Cut here, so that what lies behind it is timed alone.
        given = h.detach().requires_grad_()
        with timed("head and loss", taken):
            r, z = ref @ head.T, given @ model.lm_head.weight.T
            losses = torch_dense.dense("tnff", z.flatten(0, 1), r.flatten(0, 1), targets, weights)
            loss = losses.sum() / (weights != 0).sum()
            loss.backward()
        with timed("network", taken):
            h.backward(given.grad)
        with timed("optimizer", taken):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def held() -> int:
        moments = [x for of in optimizer.state.values() for x in of.values()]
        kept = [*model.parameters(), *moments, head]
        kept += [] if cached is None else [cached]
        kept += [] if frozen is None else frozen.parameters()
        return sum(x.nbytes for x in {x.data_ptr(): x for x in kept}.values())

    return Work(call, held, lambda rounds: rows[-rounds:])


@contextlib.contextmanager
def our_speech(folder: str) -> Iterator[Work]:
    """8 greedy outputs."""
    model, params = load_checkpoint(folder)
    params = jax.tree.map(jax.numpy.asarray, params)

    def call() -> float:
        out = generate(model, params, batch()["inputs"], max_length=OUTPUT, batch_size=ROWS)
        return float((out != model.config.pad_id).sum())

    yield Work(call, lambda: sum(x.nbytes for x in jax.tree.leaves(params)))


@contextlib.contextmanager
def torch_speech(folder: str) -> Iterator[Work]:
    """The same by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = torch.from_numpy(batch()["inputs"]).long()

    def call() -> float:
        lengths = {"min_new_tokens": OUTPUT, "max_new_tokens": OUTPUT}
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **lengths
        )
        return float(out[:, PROMPT:].numel())

    yield Work(call, lambda: sum(x.nbytes for x in model.parameters()))


WORK = {
    ("update", "ours"): our_update,
    ("update", "torch"): torch_update,
    ("speak", "ours"): our_speech,
    ("speak", "torch"): torch_speech,
}


def largest(reset: bool = False) -> int:
    """Bytes of the largest resident set of this process, of its whole life or since a reset."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def measure(what: str, library: str, folder: str, variant: list[str], rounds: int) -> dict:
    """One measurement, in this process."""
    if library == "torch":  # its imports are not its work
        import peft  # noqa: F401
        import transformers  # noqa: F401
    imported = largest()
    with WORK[what, library](folder, *variant) as (call, held, parts):
        first, seconds = call(), []
        largest(reset=True)
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        found = {"held": held(), "working": largest() - imported - held()}
        in_parts = [] if "cached" in variant else parts(rounds)  # but for the original the same
    return {"first": first, "seconds": seconds, "parts": in_parts, **found}


# --- The run --------------------------------------------------------------------------------------


def write_model(folder: pathlib.Path) -> None:
    """SmolLM2's shape with random weights, by transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {k: v for k, v in SHAPES["SmolLM2-135M"].items() if k != "architectures"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.save_pretrained(folder)


def in_turn(
    what: str, variants: Sequence[tuple[str, ...]], folder: pathlib.Path, turns: int, rounds: int
) -> list[dict]:
    """Medians of each variant and library."""
    taken: dict[tuple, list[dict]] = {}
    for _ in range(turns):
        for variant in variants:
            for library in LIBRARIES:
                command = [sys.executable, "-m", "bench.decoder", "--child", what, library]
                command += [str(folder), str(rounds), *variant]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                taken.setdefault((variant, library), []).append(
                    json.loads(done.stdout.splitlines()[-1])
                )
    rows, parts = [], []
    for variant in variants:
        ours, theirs = (taken[variant, library][0]["first"] for library in LIBRARIES)
        if not np.allclose(ours, theirs, rtol=1e-4):
            raise SystemExit(f"{what} {variant} is not the same of both: {ours}, {theirs}")
        for library in LIBRARIES:
            of, about = taken[variant, library], {"library": library, "variant": variant}
            seconds = statistics.median(x for one in of for x in one["seconds"])
            gib = {f"{k} GiB": statistics.median(x[k] for x in of) / 2**30 for k in HELD}
            row = {"what": what, **about, "seconds": seconds, **gib, "first": of[0]["first"]}
            rows.append(row)
            if in_parts := [x for one in of for x in one["parts"]]:
                row = {k: statistics.median(x[k] for x in in_parts) for k in PARTS}
                row |= {"sum": sum(row.values()), "update": seconds}
                parts.append({"what": "parts", **about, **row})
    return rows + parts


def static_memory(shape: str) -> list[dict]:
    """What updates of a shape hold, by the compiler."""
    model = understand(SHAPES[shape], {}, shape)
    rows = []
    for (trained, layers, original), losses in itertools.product(UPDATES, (None, "reference")):
        settings = settings_of(trained, losses)
        cached = "float32" if original == "cached" else None
        step = Step(model.replace(remat=layers == "run again"), settings, batch(), cached=cached)
        plan = plan_memory(step, settings)
        gib = {
            name: getattr(plan, name) / 2**30
            for name in ("parameters", "optimizer", "original", "working", "total")
        }
        about = {"what": "memory", "shape": shape, "variant": (trained, layers, original)}
        rows.append(about | {"losses": "dense" if losses else "fused"} | gib)
    return rows


def show(rows: list[dict]) -> None:
    """A table of each part."""
    console = Console(width=140)
    for what in dict.fromkeys(row["what"] for row in rows):
        of = [row for row in rows if row["what"] == what]
        table = Table(title=what)
        for name in of[0]:
            if name != "what":
                table.add_column(name, justify="left" if isinstance(of[0][name], str) else "right")
        for row in of:
            shown = {k: v for k, v in row.items() if k != "what"}
            shown["variant"] = ", ".join(row["variant"])
            table.add_row(*(x if isinstance(x, str) else f"{x:.3g}" for x in shown.values()))
        console.print(table)


def main() -> None:
    """Prints the tables and stores them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=1, help="processes of each kind")
    parser.add_argument("--rounds", type=int, default=3, help="updates that count in each")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    if options.child:
        what, library, folder, rounds, *variant = options.child
        print(json.dumps(measure(what, library, folder, variant, int(rounds))))
        return
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "model"
        write_model(folder)
        rows = in_turn("update", UPDATES, folder, options.turns, options.rounds)
        rows += in_turn("speak", [()], folder, options.turns, options.rounds)
    load.append(os.getloadavg()[0])
    for shape in options.shapes:
        rows += static_memory(shape)
    show(rows)
    print(f"load before and after: {load}")
    sizes = {"batch": ROWS, "prompt": PROMPT, "output": OUTPUT, "rank": RANK}
    print(f"stored in {common.save('decoder', rows, **sizes, load=load)}")


if __name__ == "__main__":
    main()
