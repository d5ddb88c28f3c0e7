"""A card to compile for where there is none, and what the compiled program does."""

from __future__ import annotations

import functools
import heapq
import math
import os
import re

import jax
from harness import AS_USERS

# The facts XLA asks about a card, by NVIDIA's figures; of those that are not Hopper's, what tells
# them apart.
_FACTS = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability { major: {major} minor: {minor} }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" name: "{name}"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "{name}"
"""
_HOPPER = {"major": 9, "minor": 0, "shared": 233472, "optin": 232448}
_CARDS = {
    "H100": _HOPPER
    | {"name": "NVIDIA H100 80GB HBM3", "memory": 85899345920, "bandwidth": 3352320000000},
    "H200": _HOPPER | {"name": "NVIDIA H200", "memory": 151397597184, "bandwidth": 4800000000000},
    "B200": _HOPPER
    | {"name": "NVIDIA B200", "major": 10, "memory": 191503794176, "bandwidth": 8000000000000},
    "A100": {"major": 8, "minor": 0, "shared": 167936, "optin": 166912}
    | {"name": "NVIDIA A100-SXM4-80GB", "memory": 85899345920, "bandwidth": 2039000000000},
    "L4": {"major": 8, "minor": 9, "shared": 102400, "optin": 101376}
    | {"name": "NVIDIA L4", "memory": 24152899584, "bandwidth": 300000000000},
    "RTX 5090": {"major": 12, "minor": 0, "shared": 102400, "optin": 101376}
    | {"name": "NVIDIA GeForce RTX 5090", "memory": 34190917632, "bandwidth": 1792000000000},
}


@functools.cache
def device(card: str = "H200") -> jax.Device | str:
    """A compile-only card, or why there is none."""
    try:
        import jax_plugins.xla_cuda13  # noqa: F401
    except ImportError:
        return "needs the CUDA plugin: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt"
    from jax.experimental import topologies

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    config = _FACTS
    for key, value in _CARDS[card].items():
        config = config.replace(f"{{{key}}}", str(value))
    description = topologies.get_topology_desc(
        platform="cuda", target_config=config, topology="1x1x1"
    )
    return description.devices[0]


def compile_for(device: jax.Device, f, *args):
    """`f` compiled ahead of time for `device` at the shapes and dtypes of `args`."""
    place = jax.sharding.SingleDeviceSharding(device)
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    return jax.jit(f, compiler_options=AS_USERS).lower(*shaped).compile()


def passes(compiled, shape: tuple[int, int]) -> float:
    """How many arrays of `shape`'s size the optimised program reads and writes."""
    text = re.sub(r"/\*.*?\*/", "", compiled.as_text())
    computations = dict(re.findall(r"^(?:ENTRY )?(%[\w.-]+) \(.*?\{$(.*?)^\}", text, re.S | re.M))
    entry = re.search(r"^ENTRY (%[\w.-]+)", text, re.M)
    assert entry is not None
    return sum(moved for _, moved in traffic(computations, entry[1], math.prod(shape)))


def traffic(computations: dict[str, str], name: str, size: int) -> list[tuple[str, float]]:
    """What each instruction of a computation reads and writes, in arrays of `size` elements."""
    free = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant", "copy-done")
    moved, sizes = [], {}
    for result, type_, op, arguments, line in _instructions(computations[name]):
        sizes[result] = written = _large(type_, size)
        if op in free:
            continue
        called = re.search(r"calls=(%[\w.-]+)", line)
        inside = computations[called[1]] if called and op == "fusion" else None
        read = sum(
            sizes.get(x, 0.0)
            for i, x in enumerate(arguments)
            if inside is None or not _only_picked_from(inside, i)
        )
        if written + read:
            moved.append((line.strip(), written + read))
    return moved


def _instructions(body: str):
    for line in body.splitlines():
        match = re.match(r"\s*(?:ROOT )?(%[\w.-]+) = (.*?) ([\w-]+)\((.*?)\)", line)
        if match is not None:
            name, type_, op, arguments = match.groups()
            yield name, type_, op, re.findall(r"%[\w.-]+", arguments), line


def _only_picked_from(body: str, index: int) -> bool:
    """Whether a fusion reads no more than a few entries of its parameter `index`."""
    names = {f"%{name[1:]}" for name, _, op, _, line in _instructions(body)
             if op == "parameter" and f"parameter({index})" in line}  # fmt: skip
    users = []
    for name, _, op, arguments, _ in _instructions(body):
        if names & set(arguments):
            if op == "bitcast":
                names.add(name)
            else:
                users.append(op)
    return bool(users) and set(users) <= {"gather", "dynamic-slice"}


def _large(type_: str, size: int) -> float:
    """The arrays of about `size` elements or more in an HLO type, in multiples of it."""
    dims = re.findall(r"\w+\[([\d,]+)\]", type_)
    elements = (math.prod(int(d) for d in x.split(",")) for x in dims)
    return sum(n / size for n in elements if n >= size // 2)


def column_loops(ptx: str) -> list[list[str]]:
    """The instructions of a kernel's loops over columns, one step by the shortest way through it.

    That is a step without what few have: an edit, the target, an overlap, a chunk to fetch. A loop
    over columns is told by its exponentials.
    """
    blocks: list[list[str]] = [[]]
    labelled: dict[str, int] = {}
    for line in (line.partition("//")[0].strip() for line in ptx.splitlines()):
        if label := re.fullmatch(r"(\$\w+):", line):
            blocks.append([])
            labelled[label[1]] = len(blocks) - 1
        elif instruction := re.fullmatch(r"((?:@!?%\w+\s+)?[a-z].*);", line):
            blocks[-1].append(instruction[1])
            if re.search(r"\b(bra|ret)\b", line):
                blocks.append([])

    def after(block: int) -> list[int]:
        last = blocks[block][-1] if blocks[block] else ""
        jump = re.search(r"\bbra\S*\s+(\$\w+)", last)
        falls = last.startswith("@") or not (jump or last == "ret")
        following = [block + 1] if falls and block + 1 < len(blocks) else []
        return ([labelled[jump[1]]] if jump else []) + following

    found: dict[int, list[str]] = {}  # by the block that a loop begins with
    for end in range(len(blocks)):
        for head in (x for x in after(end) if x <= end):
            ways, done = [(len(blocks[head]), (head,))], set()
            while ways and ways[0][1][-1] != end:
                length, way = heapq.heappop(ways)
                if way[-1] in done:
                    continue
                done.add(way[-1])
                for x in set(after(way[-1])) - {head}:
                    heapq.heappush(ways, (length + len(blocks[x]), (*way, x)))
            if ways:
                step = [line for block in ways[0][1] for line in blocks[block]]
                found[head] = min(found.get(head, step), step, key=len)
    return [step for step in found.values() if any(line.startswith("ex2.") for line in step)]
