"""The table of a pod's slices: what is read off a program, what follows from rows, what is kept."""

import json
import sys

import jax
import pytest
from tpu_topology import compile_for, needs_compiler

from bench import common, pods, readme
from bench.collectives import Collective, moved

# Lines of a step compiled for eight v4 chips, [4, 128] tokens on each, without their tails.
PROGRAM = """
  %a = (f32[512,1]{0,1:T(1,128)S(3)}, f32[512,1]{0,1}) all-reduce(%x, %y), channel_id=1, \
metadata={op_name="jit(step)/jvp()/shard_map/pmax" stack_frame_id=1}
  ROOT %b = (f32[4,128]{1,0}, /*index=1*/f32[4,128]{1,0}) all-reduce(%x, %y), \
metadata={op_name="jit(step)/transpose(jvp())/reduce_sum"}
  %c = s32[4,128,4]{1,0,2:T(8,128)} all-gather(%x), dimensions={2}, \
metadata={op_name="jit(step)/jvp()/reduce"}
  %d = bf16[4,128,64]{2,1,0} all-reduce-start(%x), \
metadata={op_name="jit(step)/transpose(jvp())/shard_map/psum"}
  %e = (f32[64,8032]{1,0}, f32[]{:T(128)}) all-reduce(%x, %y), \
metadata={op_name="jit(step)/transpose(jvp())/shard_map/psum"}
  %f = bf16[4,512,64]{2,1,0} all-reduce(%x), \
metadata={op_name="jit(step)/jvp(Transformer)/Transformer.encode/out/dot_general"}
  %g = f32[4]{0} reduce-scatter(%x)
  %h = f32[512,1]{0,1} fusion(%all-reduce.1), metadata={op_name="jit(step)/jvp()/mul"}
"""
TOKENS, WIDTH = (4, 128), 64


def test_collectives_are_read_with_their_arrays_and_names():
    found = moved(PROGRAM)
    assert [c.kind for c in found] == ["all-reduce"] * 2 + ["all-gather"] + ["all-reduce"] * 3 + [
        "reduce-scatter"
    ]
    assert found[0].arrays == (("f32", (512, 1)),) * 2
    assert found[2] == Collective("all-gather", (("s32", (4, 128, 4)),), "jit(step)/jvp()/reduce")
    assert found[4].largest == 64 * 8032
    assert found[6].of == ""


def test_numbers_a_token_are_the_losses():
    assert pods.numbers_a_token(moved(PROGRAM), TOKENS, WIDTH) == [[1, 1], [1, 1], [4]]


@pytest.mark.parametrize("shape", ["4,128,8032", "512,8032"])
def test_a_vocabulary_that_moves_is_counted(shape):
    text = f' %a = f32[{shape}] all-gather(%x), metadata={{op_name="jit(step)/jvp()/sort"}}'
    assert pods.numbers_a_token(moved(text), TOKENS, WIDTH) == [[8032]]


def test_what_is_not_by_token_is_refused():
    text = ' %a = f32[8032,128] all-gather(%x), metadata={op_name="jit(step)/jvp()/sort"}'
    with pytest.raises(ValueError, match="nothing by token"):
        pods.numbers_a_token(moved(text), TOKENS, WIDTH)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*TPU")
def test_the_memory_of_a_chip_is_what_its_compiler_says():
    numbers = int(pods.HBM_GIB) << 28  # of four bytes
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"available HBM \({pods.HBM_GIB}G\)"):
        compile_for("v4", lambda x: x + 1, jax.ShapeDtypeStruct((numbers // 8, 8), "float32"))


def row(layers, rows, chips=8, **figures):
    """A program's row; its memory is bilinear, as the table takes it to be."""
    memory = 1 + 0.5 * layers + rows * (0.25 + 0.125 * layers)
    program = pods.Program("base", chips, "ours", layers, rows)
    of = dict.fromkeys((f"{name} GiB" for name in ("arguments", "temporaries", "peak")), memory)
    return program._asdict() | of | {"all GiB": memory, "loss moves": [[1, 1], [1]]} | figures


def test_figures_follow_from_two_depths_and_two_batches():
    found = [row(layers, rows) for layers in (1, 3) for rows in (2, 4)]
    assert pods.figure("all GiB", found, 3, 4) == row(3, 4)["all GiB"]
    assert pods.figure("all GiB", found, 12, 8) == pytest.approx(row(12, 8)["all GiB"])
    largest = pods.largest_batch(found, 12)
    assert row(12, largest)["all GiB"] <= pods.HBM_GIB < row(12, largest + 1)["all GiB"]


def test_a_compiled_figure_goes_before_a_line():
    found = [row(1, 2), row(3, 2), row(12, 2, **{"peak GiB": 5.0})]
    assert pods.figure("peak GiB", found, 12, 2) == 5
    assert pods.cell("peak GiB", found, 12, 2, []) == "5.00"
    assert pods.cell("peak GiB", found[:2], 12, 2, []) == f"≈{row(12, 2)['peak GiB']:.2f}"


def test_one_program_of_a_larger_slice_is_enough():
    small = [row(layers, rows) for layers in (1, 3) for rows in (2, 4)]
    (large,) = found = [row(1, 2, chips=64)]
    large["peak GiB"] += 0.25
    assert pods.figure("peak GiB", found, 1, 2, small) == large["peak GiB"]
    assert pods.figure("peak GiB", found, 12, 8, small) == row(12, 8)["peak GiB"] + 0.25
    assert pods.largest_batch(found, 12, small) == pods.largest_batch(small, 12)
    assert pods.figure("peak GiB", [row(2, 2, chips=64)], 12, 8, small) is None


def test_a_third_depth_is_held_against_the_line():
    third = row(6, 2, **{"temporaries GiB": 9.0})
    found = [row(1, 2), third, row(3, 2), row(1, 4), row(3, 4)]
    ((deepest, expected),) = pods.lines_held(found)
    assert deepest == third
    assert expected == pytest.approx(row(6, 2)["temporaries GiB"])


def test_too_few_rows_give_nothing():
    too_large = pods.Program("base", 8, "ours", 3, 2)._asdict() | {"too large": "HBM"}
    assert pods.figure("peak GiB", [row(1, 2), too_large], 12, 2) is None
    assert pods.largest_batch([row(1, 2), row(3, 2)], 12) is None
    (cells,) = pods.table([row(1, 64), row(1, 7)])
    assert cells == ["base", "8 = 2 × 4", "128", *["- / - / -"] * 3, "- / 3 in 2 / -", "- / - / -"]


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    """What was compiled is stored at once and is not compiled again."""
    compiled = []

    def measure(program):
        compiled.append(program)
        if len(compiled) == 3:
            raise KeyboardInterrupt
        return row(program.layers, program.rows)

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(pods, "measure", measure)
    asked = ["--sizes", "base", "--chips", "8", "--variants", "ours", "--rows", "2", "4"]
    monkeypatch.setattr(sys, "argv", ["bench.pods", *asked])
    with pytest.raises(KeyboardInterrupt):
        pods.main()
    assert [r["layers"] for r in json.loads((tmp_path / "pods.json").read_text())["rows"]] == [1, 3]
    pods.main()
    assert len(compiled) == 5
    assert len(set(compiled)) == 4
    pods.main()
    assert len(compiled) == 5
    assert "numbers a token" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["pods.json"]


def test_every_stored_table_has_its_place():
    text = "".join(document.read_text() for document in readme.DOCUMENTS)
    for name in readme.SECTIONS:
        assert f"<!-- {name} -->" in text, name
