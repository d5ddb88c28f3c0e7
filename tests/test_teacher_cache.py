"""The original's hidden states: what is written, what is read back, and what is refused."""

import dataclasses
import json
import threading
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from editing_samples import example, model_folder, tiny_model, tiny_params
from harness import slow_unless

from t5patches import cli
from t5patches.editing.data import to_arrays, write_examples
from t5patches.editing.train import Step, TrainSettings, cache_teacher, train
from t5patches.model.placement import make_mesh
from t5patches.model.t5.network import T5Config, Transformer
from t5patches.model.teacher_cache import TeacherCache, write_cache
from t5patches.runs import claims

pytestmark = pytest.mark.usefixtures("shared_programs")

MODEL = T5Config(
    vocab_size=32, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16,
    num_encoder_layers=1, num_decoder_layers=2,
)  # fmt: skip
ABOUT = {"checkpoint": "abc", "tokenizer": "def"}
COUNT, SOURCE, TARGET = 7, 6, 8


def rows(seed=0):
    """Examples of many lengths, padded; the last is the first once more."""
    rng = np.random.default_rng(seed)
    batch = {
        "encoder_input_tokens": np.zeros((COUNT, SOURCE), np.int32),
        "decoder_input_tokens": np.zeros((COUNT, TARGET), np.int32),
        "decoder_target_tokens": np.zeros((COUNT, TARGET), np.int32),
    }
    for i in range(COUNT - 1):
        n, m = rng.integers(1, SOURCE + 1), rng.integers(1, TARGET + 1)
        batch["encoder_input_tokens"][i, :n] = rng.integers(1, 32, n)
        batch["decoder_target_tokens"][i, :m] = rng.integers(1, 32, m)
        batch["decoder_input_tokens"][i, 1:m] = batch["decoder_target_tokens"][i, : m - 1]
    for x in batch.values():
        x[-1] = x[0]
    return batch


@pytest.fixture(scope="module")
def params():
    ids = jnp.ones((1, 2), jnp.int32)
    return Transformer(MODEL).init(jax.random.key(0), ids, ids, ids, enable_dropout=False)["params"]


def batches(data, size=3):
    return [
        {k: x[i : i + size] for k, x in data.items()}
        for i in range(0, len(data["decoder_target_tokens"]), size)
    ]


def hidden_of(params):
    def hidden(batch):
        tokens = (
            batch[f"{x}_tokens"] for x in ("encoder_input", "decoder_input", "decoder_target")
        )
        model = Transformer(MODEL)
        return model.apply({"params": params}, *tokens, enable_dropout=False, return_hidden=True)

    return jax.jit(hidden)


def write(directory, params, data, **options):
    options = {"dtype": "float32", **options}
    return write_cache(
        directory, lambda: batches(data), hidden_of(params), ABOUT, width=16, **options
    )


def test_states_are_those_of_the_live_model(tmp_path, params):
    data, sizes = rows(), []
    cache = write(tmp_path / "cache", params, data, tell=sizes.append)
    got = cache.read(data)
    counts = data["decoder_target_tokens"] > 0
    want = np.asarray(hidden_of(params)(data))
    np.testing.assert_allclose(got[counts], want[counts], rtol=1e-5, atol=1e-5)
    assert not got[~counts].any()
    tokens = int(counts[:-1].sum())  # the last example is there once
    assert sizes == [(COUNT - 1, tokens, tokens * 16 * 4)]
    again = TeacherCache(tmp_path / "cache", ABOUT).read({k: x[::-1] for k, x in data.items()})
    np.testing.assert_array_equal(again, got[::-1])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("states/c/0/0", None, "1 of the 1 files of its states are missing"),
        ("states/c/0/0", b"x", "a file of its states cannot be read"),
        ("index.npz", b"", "index.npz cannot be read"),
        ("index.npz", b"PK", "index.npz cannot be read"),
        ("done.json", b"[]", "done.json"),
        ("done.json", b"{}", "says that None examples are done"),
    ],
)
def test_a_spoilt_cache_is_told(file, content, said, tmp_path, params):
    """What is missing would be read as zeros."""
    data = rows()
    write(tmp_path, params, data)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        TeacherCache(tmp_path, ABOUT).read(data)


def test_states_of_zeros_are_no_lost_ones(tmp_path):
    data = rows()
    nothing = np.zeros((3, TARGET, 16), np.float32)
    cache = write_cache(tmp_path, lambda: batches(data), lambda _: nothing, ABOUT, width=16)
    assert not cache.read(data).any()


def test_the_id_of_padding_may_be_said(tmp_path, params):
    """Within an output, and as its last token where that counts."""
    data = rows()
    said = data["decoder_target_tokens"]
    counts = said > 0
    long = np.flatnonzero(counts.sum(-1) > 3)
    said[long, 1] = said[long[0], counts[long[0]].sum() - 1] = 0
    data["decoder_input_tokens"][long, 2] = 0
    # An output of the same tokens but the one before the id of padding.
    data |= {name: np.concatenate([x, x[long[:1]]]) for name, x in data.items()}
    for name, place in (("decoder_target_tokens", 0), ("decoder_input_tokens", 1)):
        data[name][-1, place] = 31 - data[name][-1, place]
    counts = np.concatenate([counts, counts[long[:1]]])
    data["decoder_loss_weights"] = np.where(counts, -1.0, 0.0).astype(np.float32)
    got = write(tmp_path, params, data).read(data)
    want = np.asarray(hidden_of(params)(data))
    np.testing.assert_allclose(got[counts], want[counts], rtol=1e-5, atol=1e-5)
    assert not got[~counts].any()


def test_bfloat16_is_the_rounded_float32(tmp_path, params):
    data = rows()
    narrow = write(tmp_path / "a", params, data, dtype="bfloat16").read(data)
    whole = write(tmp_path / "b", params, data).read(data)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, whole.astype(jnp.bfloat16))


def test_packed_rows_find_their_examples(tmp_path, params):
    """Two examples in one row: the states of each, in its places, as the packed model has them."""
    data = rows()
    cache = write(tmp_path / "cache", params, data)
    lengths = {k: (x > 0).sum(-1) for k, x in data.items()}
    packed = {k: np.zeros((1, 2 * x.shape[1]), np.int32) for k, x in data.items()}
    for side in ("encoder", "decoder"):
        for kind in ("segment_ids", "positions"):
            like = packed[f"{side}_{'input' if side == 'encoder' else 'target'}_tokens"]
            packed[f"{side}_{kind}"] = np.zeros_like(like)
    at = {"encoder": 0, "decoder": 0}
    for number, i in enumerate((1, 4), 1):
        n = {
            "encoder": lengths["encoder_input_tokens"][i],
            "decoder": lengths["decoder_target_tokens"][i],
        }
        for side, length in n.items():
            place = slice(at[side], at[side] + length)
            for key in data:
                if key.startswith(side):
                    packed[key][0, place] = data[key][i, :length]
            packed[f"{side}_segment_ids"][0, place] = number
            packed[f"{side}_positions"][0, place] = np.arange(length)
            at[side] += length
    want = Transformer(MODEL).apply(
        {"params": params},
        packed["encoder_input_tokens"],
        packed["decoder_input_tokens"],
        packed["decoder_target_tokens"],
        encoder_segment_ids=packed["encoder_segment_ids"],
        decoder_segment_ids=packed["decoder_segment_ids"],
        encoder_positions=packed["encoder_positions"],
        decoder_positions=packed["decoder_positions"],
        enable_dropout=False,
        return_hidden=True,
    )
    counts = packed["decoder_target_tokens"] > 0
    np.testing.assert_allclose(
        cache.read(packed)[counts], np.asarray(want)[counts], rtol=1e-5, atol=1e-5
    )


def test_an_empty_text_in_a_packed_row(tmp_path):
    """Packing makes it an id of padding that has a segment."""
    texts = {"encoder_input": [[7, 1], [], [8, 1]], "decoder_target": [[3, 9, 1], [4, 1], []]}
    alone, packed = {}, {}
    for name, of_name in texts.items():
        segments = [text or [0] for text in of_name]
        numbers = np.repeat([1, 2, 3], [len(segment) for segment in segments])
        packed[f"{name}_tokens"] = np.concatenate(segments)[None]
        packed[f"{name.split('_')[0]}_segment_ids"] = numbers[None]
        alone[f"{name}_tokens"] = np.array([(text + [0] * 3)[:3] for text in of_name])
    for batch, start in ((alone, np.zeros((3, 1))), (packed, np.zeros((1, 1)))):
        said = batch["decoder_target_tokens"]
        given = np.concatenate([start, said[:, :-1]], axis=1).astype(np.int32)
        batch["decoder_input_tokens"] = np.where(given == 1, 0, given)  # what follows an end
        batch["decoder_loss_weights"] = np.where(said > 0, -1, 0)

    def states(batch):
        return np.float32(batch["decoder_target_tokens"])[..., None] * [1, 2]

    for number, written in enumerate((alone, packed)):
        options = {"width": 2, "dtype": "float32"}
        folder = tmp_path / str(number)
        cache = write_cache(folder, lambda batch=written: [batch], states, ABOUT, **options)
        for batch in (alone, packed):
            np.testing.assert_array_equal(cache.read(batch), states(batch))


def test_a_killed_pass_goes_on(tmp_path, params):
    data, calls = rows(), []
    live = hidden_of(params)

    def dying(batch):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return live(batch)

    def run():
        return write_cache(tmp_path, lambda: batches(data), dying, ABOUT, width=16, dtype="float32")

    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(ValueError, match=r"has 3 of 6 examples"):
        TeacherCache(tmp_path)
    cache = run()
    assert len(calls) == 3  # one, one that died, and the rest; the first was not made again
    whole = write(tmp_path / "whole", params, data)
    np.testing.assert_array_equal(cache.read(data), whole.read(data))


def test_a_pass_that_was_killed_before_it_had_an_index_goes_on(tmp_path, params, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("t5patches.model.teacher_cache.require_space", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, params, rows())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(ValueError, match="is unfinished, with none of its examples"):
        TeacherCache(tmp_path)
    assert write(tmp_path, params, rows()).read(rows()).any()


def test_of_two_at_once_one_writes_and_the_other_reads(tmp_path, params):
    data, live = rows(), hidden_of(params)
    begun, waits = threading.Event(), threading.Event()

    def slow(batch):
        begun.set()
        assert waits.wait(10)
        return live(batch)

    def tell(said):
        if "this one waits" in str(said):
            waits.set()

    def run(hidden, **more):
        return write_cache(tmp_path, lambda: batches(data), hidden, ABOUT, width=16, **more)

    with futures.ThreadPoolExecutor() as pool:
        first = pool.submit(run, slow)
        assert begun.wait(60)
        second = pool.submit(run, None, tell=tell)
    np.testing.assert_array_equal(first.result().read(data), second.result().read(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "xyz"}, "checkpoint .abc there, xyz asked"),
        ({"tokenizer": "xyz"}, "tokenizer .def there, xyz asked"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, params, change, message):
    data = rows()
    write(tmp_path, params, data)
    with pytest.raises(ValueError, match=message):
        TeacherCache(tmp_path, ABOUT | change)
    with pytest.raises(ValueError, match=message):
        write_cache(tmp_path, lambda: batches(data), hidden_of(params), ABOUT | change, width=16)


def test_other_data_are_refused(tmp_path, params):
    cache = write(tmp_path, params, rows())
    with pytest.raises(ValueError, match=r"row 0.*other data"):
        cache.check(rows(seed=1), ABOUT, width=16)
    with pytest.raises(ValueError, match=r"row 0.*other data"):
        cache.read(rows(seed=1))
    with pytest.raises(ValueError, match=r"data .* there"):
        write(tmp_path, params, rows(seed=1))


def test_nothing_to_read_or_to_write(tmp_path, params):
    with pytest.raises(ValueError, match="holds no teacher cache"):
        TeacherCache(tmp_path / "none")
    empty = {k: np.zeros_like(x) for k, x in rows().items()}
    with pytest.raises(ValueError, match="all target tokens are padding"):
        write(tmp_path, params, empty)
    with pytest.raises(ValueError, match="bfloat16"):
        write(tmp_path, params, rows(), dtype="float16")


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, params, monkeypatch):
    monkeypatch.setattr(claims.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))

    def never(batch):
        raise AssertionError(batch)

    with pytest.raises(OSError, match=r"tokens of 6 examples.* disk space"):
        write_cache(tmp_path, lambda: batches(rows()), never, ABOUT, width=16)
    assert json.loads((tmp_path / "run.json").read_text())["checkpoint"] == "abc"


# --- Training from a cache ------------------------------------------------------------------------

STUDENT = tiny_model(dropout_rate=0.1)
RUN = TrainSettings(objective="tnrf", steps=4, batch_size=2, learning_rate=1e-2)


def arrays():
    """Of outputs one of which ends with the id of padding."""
    other = example("other news", "the mayor sold the bridge")
    return to_arrays(
        [
            example("news of a fire", "a fire in Paris", "Paris"),
            example("news of a flood", "a flood in New York", "New York"),
            dataclasses.replace(other, output_ids=(*other.output_ids[:-1], 0)),
        ],
        pad_id=0,
    )


@pytest.mark.parametrize(
    ("dtype", "shards"),
    [slow_unless((dtype, shards) == ("bfloat16", 2), dtype, shards)
     for dtype in ("float32", "bfloat16") for shards in (None, 2)],
)  # fmt: skip
def test_training_from_a_cache_is_training_with_the_live_model(tmp_path, dtype, shards):
    mesh = None if shards is None else make_mesh(2, jax.devices()[:4])
    start, original = tiny_params(), tiny_params(1)
    cache = cache_teacher(
        tmp_path / "cache", STUDENT, original, arrays(), batch_size=2, dtype=dtype, mesh=mesh
    )
    runs = {
        name: train(
            STUDENT, start, arrays(), RUN, tmp_path / name,
            original=original, mesh=mesh, teacher=teacher,
        )
        for name, teacher in (("live", None), ("cached", cache))
    }  # fmt: skip
    rtol = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(
        runs["cached"].history["loss"], runs["live"].history["loss"], rtol=rtol
    )


def test_only_the_originals_head_is_held():
    step = Step(STUDENT, RUN, arrays(), cached="bfloat16")
    leaves = jax.tree.leaves(step.place(tiny_params(), tiny_params(1)))
    assert [x.shape for x in leaves] == [(STUDENT.config.emb_dim, STUDENT.config.vocab_size)]


def test_the_original_runs_no_more():
    """Little is left of the price of the original: its head."""
    model = tiny_model(mlp_dim=512)

    def flops(objective, cached=None):
        settings = dataclasses.replace(RUN, objective=objective, negatives=0)
        data = arrays()
        if objective == "ce":
            data["weights"] = np.abs(data["weights"])
        return Step(model, settings, data, cached=cached).compiled.cost_analysis()["flops"]

    plain, live, cached = flops("ce"), flops("tnff"), flops("tnff", "float32")
    assert plain < cached < live
    assert cached - plain < 0.5 * (live - plain)


def test_what_cannot_be_trained_from(tmp_path):
    cache = cache_teacher(tmp_path / "cache", STUDENT, tiny_params(), arrays(), batch_size=2)

    def run(model=STUDENT, data=None, seed=0, **changes):
        settings = dataclasses.replace(RUN, **changes)
        params = tiny_params(seed)
        train(model, params, data or arrays(), settings, tmp_path / "run", teacher=cache)

    with pytest.raises(ValueError, match="ul keeps to no original"):
        run(objective="ul")
    with pytest.raises(ValueError, match=r"16 entries and the model's have 32"):
        run(model=tiny_model(emb_dim=32))
    with pytest.raises(ValueError, match="other data"):
        run(data=to_arrays([example("not there", "a fire in Paris", "Paris")], pad_id=0))
    # What changes nothing in the states may differ.
    like = tiny_model(dropout_rate=0.2, remat=True)
    cache_teacher(tmp_path / "cache", like, tiny_params(), arrays(), batch_size=2)
    other, differs = tiny_model(layer_norm_epsilon=0.1), r"layer_norm_epsilon \(1e-06 there, 0.1 "
    for model, seed, message in ((STUDENT, 1, "checkpoint"), (other, 0, differs)):
        with pytest.raises(ValueError, match=message):
            cache_teacher(tmp_path / "cache", model, tiny_params(seed), arrays(), batch_size=2)
        with pytest.raises(ValueError, match=message):
            run(model=model, seed=seed)
    assert not (tmp_path / "run").exists()


def test_edit_from_a_cache(tmp_path, capsys):
    model = model_folder(tmp_path / "model")
    data = tmp_path / "edits.jsonl"
    write_examples(
        data, [example("news of a fire", "a fire in Paris", "Paris"), example("news", "a flood")]
    )

    def edit(output, *more, code=0):
        given = ["--model", model, "--data", data, "--output", tmp_path / output]
        sizes = ["--steps", 3, "--batch-size", 2, "--devices", 1, "--json"]
        # Optax's Adafactor multiplies a float by an integer count.
        with jax.numpy_dtype_promotion("standard"):
            assert cli.main([str(x) for x in ("edit", *given, *sizes, *more)]) == code
        shown = capsys.readouterr()
        return json.loads(shown.out or "null"), shown.err

    live, _ = edit("live")
    cached, told = edit("cached", "--cache-teacher", tmp_path / "cache")
    again, _ = edit("again", "--cache-teacher", tmp_path / "cache", "--alpha", 1)
    assert "tokens of 2 examples, 0.000 GB" in " ".join(told.split())
    np.testing.assert_allclose(cached["history"]["loss"], live["history"]["loss"], rtol=1e-5)
    assert again["history"]["loss"] == cached["history"]["loss"]
    # On a CPU, where what was read stays in the same memory.
    assert cached["memory"]["original"] == live["memory"]["original"]
    _, told = edit("none", "--objective", "ul", "--cache-teacher", tmp_path / "cache", code=2)
    assert "ul keeps to no original model" in told
    config = model / "config.json"
    mended = json.loads(config.read_text()) | {"layer_norm_epsilon": 0.1}
    config.write_text(json.dumps(mended))
    _, told = edit("mended", "--cache-teacher", tmp_path / "cache", code=2)
    assert "layer_norm_epsilon (1e-06 there, 0.1 asked for)" in told
    # Nor is an edit of the model with its old config one of this model.
    _, told = edit("live", "--resume", code=2)
    assert "live exists: nothing is overwritten" in told
