import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_lowbit
from optax_lowbit import qlora
from optax_lowbit.qlora import streaming
from tests.resident_memory import peak_of

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is missing")

DYNAMIC = optax_lowbit.codebook("dynamic_exponent", 8, signed=True)
TARGETS = r"_proj\.weight$"


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pieces_make_the_whole_matrix(tmp_path, rng, monkeypatch, plain_spec, dtype):
    # Pieces of four blocks, of which the last is not full; rows that are not whole blocks; less
    # than a piece, and less than a block.
    monkeypatch.setattr(streaming, "PIECE", 256)
    shapes = {"float32": [(9, 64), (7, 75), (3, 5)], "bfloat16": [(7, 75)], "float16": [(1, 1)]}
    weights = {
        f"{i}_proj.weight": jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)
        for i, shape in enumerate(shapes[dtype])
    }
    safetensors_numpy.save_file(
        {name: np.asarray(w) for name, w in weights.items()}, tmp_path / "model.safetensors"
    )
    specs = [plain_spec, *([qlora.NF4] if dtype == "bfloat16" else [])]
    for spec in specs:
        model = qlora.quantize_checkpoint(tmp_path, spec, targets=TARGETS)
        for name, w in weights.items():
            assert_same(model[name], qlora.quantize_matrix(w.T, spec))


def test_what_is_quantized(tmp_path, plain_spec):
    floats = np.ones((2, 64), np.float32)
    tensors = {
        "model.embed.weight": floats,
        "model.0.q_proj.weight": floats,
        "model.0.q_proj.bias": floats[0],
        "model.0.int_proj.weight": floats.astype(np.int32),
        "model.0.wide_proj.weight": floats.astype(np.float64),
        "model.0.empty_proj.weight": floats[:0],
        "model.0.cube_proj.weight": floats[None],
        "model.0.v_proj.weight": floats,
        "vision.0.q_proj.weight": floats,
        "x.out_proj.weight": floats,
    }
    safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    model = qlora.quantize_checkpoint(
        tmp_path, plain_spec, targets=TARGETS, exclude=r"^vision|v_proj|x\.out"
    )
    assert model.config == {"model_type": "x"}
    assert sorted(model) == sorted(tensors)
    assert len(model) == 10 and "x" not in model
    matrices = [name for name in model if isinstance(model[name], qlora.QuantizedMatrix)]
    assert matrices == ["model.0.q_proj.weight"]
    np.testing.assert_array_equal(model["model.0.cube_proj.weight"], floats[None])


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"targets": "nothing"}, ValueError, "targets='nothing' must be found in the name of a ma"),
        ({"targets": "w", "exclude": "w"}, ValueError, r"exclude='w' not; it has \['w'\]"),
        ({"targets": "("}, ValueError, "is no regular expression"),
        ({"targets": None}, TypeError, "targets must be a regular expression, got None"),
        ({"targets": "w", "exclude": ["w"]}, TypeError, "exclude must be a regular expression"),
        ({"targets": "w", "spec": "nf4"}, TypeError, "spec must be a QuantSpec"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, error, complaint):
    safetensors_numpy.save_file({"w": np.ones((2, 64), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(error, match=complaint):
        qlora.quantize_checkpoint(tmp_path, **arguments)


def test_a_real_model_is_that_of_bitsandbytes(shared_dir):
    models = shared_dir / "golden" / "models"
    model = qlora.quantize_checkpoint(models / "llama", targets=TARGETS)
    expected = qlora.read_bitsandbytes(models / "llama_bnb_nf4_dq")
    assert sorted(model) == sorted(expected)
    weights = safetensors_numpy.load_file(models / "llama" / "model.safetensors")
    midpoints = (DYNAMIC[1:] + DYNAMIC[:-1]) / 2
    for name, tensor in expected.items():
        if not isinstance(tensor, qlora.QuantizedMatrix):
            np.testing.assert_array_equal(model[name], tensor)
            continue
        ours, theirs = model[name].rows, tensor.rows
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_array_equal(ours.scales.absmax, theirs.scales.absmax)
        assert ours.scales.offset == theirs.scales.offset
        # The file's 8-bit codes are from bitsandbytes' kernel for CPUs, which looks them up in a
        # table of 65536 entries: a value next to the midpoint of two may get the other one.
        mine, file = (np.ravel(rows.scales.codes).astype(int) for rows in (ours, theirs))
        off = np.flatnonzero(mine != file)
        assert np.all(np.abs(mine - file)[off] == 1)
        absmax = np.abs(weights[name].reshape(-1, 64)).max(-1)[off] if off.size else np.zeros(0)
        value = (absmax - ours.scales.offset) / np.repeat(ours.scales.absmax, 256)[off]
        assert np.all(np.abs(value - midpoints[np.minimum(mine, file)[off]]) < 2 / 65536)
        assert off.size <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_a_checkpoint_takes_its_size_in_4_bits_and_two_tensors(tmp_path, rng):
    shapes = [(2048, 2048), (1024, 3072), (3072, 1000), (512, 2048), (2048, 2048), (4096, 512)]
    weights = {
        f"{i}_proj.weight": rng.standard_normal(shape, np.float32).astype(np.float16)
        for i, shape in enumerate(shapes)
    }
    largest = max(weight.nbytes for weight in weights.values())
    assert largest == 2**23
    files = {"one.safetensors": [*weights][:3], "two.safetensors": [*weights][3:]}
    for file, names in files.items():
        safetensors_numpy.save_file({name: weights[name] for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    setup = "from optax_lowbit import qlora"
    load = "dict(qlora.quantize_checkpoint(path, targets='_proj'))"
    peak, low_bit = peak_of(setup, load, tmp_path)
    elements = sum(weight.size for weight in weights.values())
    assert 4.12 < 8 * low_bit / elements < 4.14
    assert low_bit < peak < low_bit + 2 * largest
    # The measurement sees what is kept: all tensors, here.
    setup = "from optax_lowbit.qlora.safetensors_files import TensorFiles"
    peak, floats = peak_of(setup, "dict(TensorFiles(path))", tmp_path)
    assert peak > 0.95 * floats == 0.95 * 2 * elements
