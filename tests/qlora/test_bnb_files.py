import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import QuantSpec, qlora

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is missing")


def spec_of(quant_type, block=64, nested=False):
    return QuantSpec(
        codebook=quant_type,
        bits=4,
        signed=True,
        scaling="block",
        block_size=block,
        double_quant="offset" if nested else False,
    )


def matrix(shape, spec=qlora.NF4, dtype=jnp.float32, seed=0):
    """One of random codes and scales: nothing is compiled."""
    rng = np.random.default_rng(seed)
    like = qlora.abstract_matrix(shape, dtype, spec)
    leaves, structure = jax.tree.flatten(like)
    leaves = [
        rng.integers(0, 256, x.shape, np.uint8)
        if x.dtype == np.uint8
        else np.asarray(rng.random(x.shape), np.float32)
        for x in leaves
    ]
    if like.size % 2:
        leaves[0][-1] &= 15  # the last byte has one code
    return jax.tree.unflatten(structure, leaves)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def recorded_file(golden, path, case, shape, nested):
    """A file of what bitsandbytes gave, put together from its tensors."""
    vectors, tables = golden("bnb_quant"), golden("codebooks")
    _, quant_type, block = case.split("|")
    state = {"quant_type": quant_type, "blocksize": int(block[2:])}
    state |= {"dtype": "float32", "shape": list(shape)}
    tensors = {
        "w": vectors[f"{case}/packed"].reshape(-1, 1),
        "w.absmax": vectors[f"{case}/absmax"],
        "w.quant_map": tables[f"bitsandbytes/{quant_type}"],
    }
    if nested:
        tensors["w.absmax"] = vectors[f"{case}/nested_absmax_codes"].reshape(-1)
        tensors["w.nested_absmax"] = vectors[f"{case}/nested_absmax"].reshape(-1)
        tensors["w.nested_quant_map"] = tables["bitsandbytes/dynamic/signed"]
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state |= {"nested_offset": float(vectors[f"{case}/nested_offset"])}
    name = f"w.quant_state.bitsandbytes__{quant_type}"
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    safetensors_numpy.save_file(tensors, path, {"format": "pt"})


def shapes_of(size):
    """Rows that are whole blocks, and rows that are not."""
    return [(1, size), (size, 1), *([(2, size // 2)] if size % 2 == 0 else [])]


def test_what_bitsandbytes_has_recorded_is_read_and_written_again(golden, tmp_path):
    vectors = golden("bnb_quant")
    cases = [key.removesuffix("/packed") for key in vectors if key.endswith("/packed")]
    cases = [case for case in cases if f"{case}/dequant" in vectors]
    assert {case.split("|")[1] for case in cases} == {"nf4", "fp4"}
    for number, case in enumerate(cases):
        size = vectors[f"{case}/dequant"].size
        shape = shapes_of(size)[number % len(shapes_of(size))]
        for nested in (False, *([True] if f"{case}/nested_dequant" in vectors else [])):
            path = tmp_path / f"{number}{nested}"
            path.mkdir()
            recorded_file(golden, path / "model.safetensors", case, shape, nested)
            w = qlora.read_bitsandbytes(path)["w"]
            expected = vectors[f"{case}/{'nested_' if nested else ''}dequant"]
            if "16_in" not in case:
                np.testing.assert_array_equal(np.ravel(w.dequantize().T), expected.reshape(-1))
            qlora.write_bitsandbytes(path / "again", {"w": w})
            written = (path / "again" / "model.safetensors").read_bytes()
            assert written == (path / "model.safetensors").read_bytes(), case


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 3), (5, 3), (128, 2), (1, 1), (192, 86), (65, 2)])
def test_read_is_what_was_written(tmp_path, quant_type, nested, shape):
    w = matrix(shape, spec_of(quant_type, nested=nested))
    qlora.write_bitsandbytes(tmp_path / "a", {"w.weight": w})
    model = qlora.read_bitsandbytes(tmp_path / "a")
    assert_same(model["w.weight"], w)
    qlora.write_bitsandbytes(tmp_path / "b", model, config=model.config)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("storage", ["uint8", "int8", "bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_codes_stored_as_another_dtype(tmp_path, storage, dtype):
    w = matrix((64, 4), dtype=dtype)
    config = {"quantization_config": {"bnb_4bit_quant_storage": storage}}
    qlora.write_bitsandbytes(tmp_path, {"w": w}, config=config)
    stored = safetensors_numpy.load_file(tmp_path / "model.safetensors")["w"]
    assert stored.dtype.name == storage
    assert stored.shape == (128 // stored.dtype.itemsize, 1)
    model = qlora.read_bitsandbytes(tmp_path)
    assert_same(model["w"], w)
    assert model.config["quantization_config"]["bnb_4bit_quant_storage"] == storage


def test_several_files_and_their_index(tmp_path):
    tensors = {f"layers.{i}.weight": matrix((64, 8), seed=i) for i in range(5)}
    tensors |= {"norm.weight": jnp.arange(7.0), "scalar": jnp.float16(3), "none": jnp.zeros((0, 3))}
    tensors["head.weight"] = jnp.ones((3, 4), jnp.bfloat16)
    qlora.write_bitsandbytes(tmp_path / "one", tensors)
    qlora.write_bitsandbytes(tmp_path / "many", tensors, max_shard_bytes=4000)
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert shards == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    assert names == sorted([*shards, "config.json", "model.safetensors.index.json"])
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    read = [safetensors_numpy.load_file(tmp_path / "many" / shard) for shard in shards]
    assert index["metadata"]["total_size"] == sum(x.nbytes for part in read for x in part.values())
    assert all((tmp_path / "many" / shard).stat().st_size < 8000 for shard in shards)
    for folder in ("one", "many"):
        model = qlora.read_bitsandbytes(tmp_path / folder)
        assert sorted(model) == sorted(tensors)
        assert len(model) == len(tensors)
        for name, tensor in tensors.items():
            assert_same(model[name], tensor)


def test_one_file_without_a_folder(tmp_path):
    qlora.write_bitsandbytes(tmp_path, {"w": matrix((64, 2))})
    model = qlora.read_bitsandbytes(tmp_path / "model.safetensors")
    assert model["w"].shape == (64, 2)
    assert model.config == {}
    assert "w" in model and "w.absmax" not in model and "nothing" not in model
    for name in ("w.absmax", "nothing"):
        with pytest.raises(KeyError):
            model[name]


def test_a_model_without_low_bit_matrices_says_nothing_of_them(tmp_path):
    qlora.write_bitsandbytes(tmp_path, {"w": jnp.ones((2, 3))}, config={"model_type": "x"})
    assert qlora.read_bitsandbytes(tmp_path).config == {"model_type": "x"}


def test_config_says_what_the_matrices_are(tmp_path):
    tensors = {"q_proj.weight": matrix((64, 2), spec_of("fp4")), "k_proj.weight": jnp.ones((2, 64))}
    given = {"model_type": "llama", "quantization_config": {"bnb_4bit_compute_dtype": "bfloat16"}}
    qlora.write_bitsandbytes(tmp_path, tensors, config=given)
    assert given["quantization_config"] == {"bnb_4bit_compute_dtype": "bfloat16"}
    assert qlora.read_bitsandbytes(tmp_path).config == {
        "model_type": "llama",
        "quantization_config": {
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_skip_modules": ["k_proj", "lm_head"],
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        },
    }


W = matrix((64, 2))


@pytest.mark.parametrize(
    ("tensors", "config", "complaint"),
    [
        ({"w": matrix((3, 64, 2))}, {}, r"'w' must be one matrix, got a stack \(3, 64, 2\)"),
        ({"w": matrix((64, 2), spec_of("nf4", 16))}, {}, "must be nf4 or fp4 in blocks of one of"),
        ({"w": W, "v": matrix((64, 2), spec_of("fp4", 64, True))}, {}, "'bnb_4bit_quant_type' 'nf"),
        ({"w": W, "v": matrix((64, 2), spec_of("nf4"))}, {}, "'bnb_4bit_use_double_quant' True"),
        ({"w": W}, {"bnb_4bit_quant_type": "fp4"}, "'bnb_4bit_quant_type' 'fp4', this one has"),
        ({"w": W}, {"load_in_4bit": False}, "'load_in_4bit' must be true"),
        ({"w": W}, {"quant_method": "gptq"}, "must be bitsandbytes, is"),
        ({"w": W}, {"bnb_4bit_quant_storage": "complex64"}, "'bnb_4bit_quant_storage' must be one"),
        ({"w": W}, {"llm_int8_skip_modules": ["w"]}, "names 'w', which is in 4 bits"),
        ({"w": W}, {"llm_int8_skip_modules": "w"}, "must be names, is 'w'"),
        ({"w": W, "w.absmax": jnp.ones(1)}, {}, "different names"),
        ({"w": matrix((5, 1))}, {"bnb_4bit_quant_storage": "float32"}, "do not fill float32"),
        ({"w": jnp.ones(2, jnp.complex64)}, {}, "'w' is of complex64"),
    ],
)
def test_what_bitsandbytes_has_not_is_not_written(tmp_path, tensors, config, complaint):
    with pytest.raises(ValueError, match=complaint):
        qlora.write_bitsandbytes(tmp_path, tensors, config={"quantization_config": config})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("floats", "matrices", "skipped"),
    [
        ([], ["lm_head"], []),
        (["lm_head"], ["x.q"], ["lm_head"]),
        (["proj", "x.embed"], ["x.q_proj"], ["^proj$", "lm_head", "x.embed"]),
        (["h.1"], ["h.11.q", "h.1.q"], ["^h\\.1$", "lm_head"]),
        (["h.1"], ["h.11.q"], ["h.1", "lm_head"]),
    ],
)
def test_modules_that_are_skipped_have_no_matrix(tmp_path, floats, matrices, skipped):
    tensors = {f"{name}.weight": jnp.ones((2, 2)) for name in floats}
    tensors |= {f"{name}.weight": W for name in matrices}
    qlora.write_bitsandbytes(tmp_path, tensors)
    model = qlora.read_bitsandbytes(tmp_path)
    assert model.config["quantization_config"]["llm_int8_skip_modules"] == skipped
    assert {name for name in model if isinstance(model[name], qlora.QuantizedMatrix)} == {
        f"{name}.weight" for name in matrices
    }


def test_a_config_without_json_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError, match=r"config can't be written as JSON: .*int64"):
        qlora.write_bitsandbytes(tmp_path, {"w": W}, config={"n": np.int64(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_there_stays(tmp_path):
    qlora.write_bitsandbytes(tmp_path, {"w": W})
    with pytest.raises(ValueError, match="must have no safetensors files yet, has"):
        qlora.write_bitsandbytes(tmp_path, {"v": W})
    assert [*qlora.read_bitsandbytes(tmp_path)] == ["w"]
    with pytest.raises(TypeError, match="max_shard_bytes must be an int of at least 1, got 0"):
        qlora.write_bitsandbytes(tmp_path / "new", {"v": W}, max_shard_bytes=0)


@pytest.fixture(scope="module")
def real(shared_dir):
    models = shared_dir / "golden" / "models"
    with np.load(models / "io_bnb.npz") as archive:
        recorded = {k.removeprefix("llama_bnb_nf4_dq/"): archive[k] for k in archive}
    return models / "llama_bnb_nf4_dq", recorded


def test_dequantized_weights_of_a_real_model_byte_for_byte(real):
    model, recorded = qlora.read_bitsandbytes(real[0]), real[1]
    names = [key.removeprefix("dequant_sha256/") for key in recorded if "sha256" in key]
    assert sorted(model) == sorted(names)
    matrices = 0
    for name in names:
        weight = model[name]
        if isinstance(weight, qlora.QuantizedMatrix):
            matrices += 1
            weight = np.asarray(weight.dequantize()).T
        digest = hashlib.sha256(np.ascontiguousarray(weight).tobytes()).digest()
        assert digest == recorded[f"dequant_sha256/{name}"].tobytes(), name
        if f"dequant/{name}" in recorded:
            np.testing.assert_array_equal(weight, recorded[f"dequant/{name}"])
    assert matrices == 14


def test_a_real_model_is_written_byte_for_byte(real, tmp_path):
    model = qlora.read_bitsandbytes(real[0])
    qlora.write_bitsandbytes(tmp_path, model, config=model.config)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (real[0] / name).read_bytes()


def test_products_with_matrices_of_a_real_model(real, rng):
    model = qlora.read_bitsandbytes(real[0])
    for name in ("layers.0.mlp.down_proj", "layers.1.self_attn.q_proj"):
        w = model[f"model.{name}.weight"]
        x = jnp.asarray(rng.standard_normal((3, w.shape[0]), np.float32))
        expected = x.astype(jnp.float32) @ w.dequantize()
        np.testing.assert_allclose(x @ w, expected, rtol=1e-6, atol=1e-6 * math.sqrt(w.shape[0]))
