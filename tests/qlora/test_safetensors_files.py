"""Broken and hostile files: a ValueError that names the file, at little cost."""

import json
import os
import time
import tracemalloc

import jax
import numpy as np
import pytest

from optax_lowbit import qlora

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is missing")

MIB = 2**20
NESTED = {"nested_offset": 0.5, "nested_blocksize": 256, "nested_dtype": "float32"}


def read_all(folder):
    return {
        name: jax.tree.map(np.asarray, x) for name, x in qlora.read_bitsandbytes(folder).items()
    }


def sizes(model):
    return sum(x.nbytes for tensor in model.values() for x in jax.tree.leaves(tensor))


@pytest.mark.parametrize(
    "file",
    [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
    ],
)
def test_a_broken_file_of_a_model(tiny_model, mutations, file):
    path = tiny_model / file
    whole, size = path.read_bytes(), sizes(read_all(tiny_model))
    refused = 0
    tracemalloc.start()
    for broken in mutations(whole, 150):
        path.write_bytes(broken)
        started = time.perf_counter()
        try:
            assert sizes(read_all(tiny_model)) <= 2 * size
        except ValueError as error:
            refused += 1
            assert str(tiny_model) in str(error)
            assert len(str(error)) < 2000
        assert time.perf_counter() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    tracemalloc.stop()
    assert refused > (20 if file == "config.json" else 75)


def test_a_broken_file_of_an_adapter(tiny_adapter, mutations):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = tiny_adapter / name
        whole, refused = path.read_bytes(), 0
        for broken in mutations(whole, 150):
            path.write_bytes(broken)
            try:
                qlora.read_adapter(tiny_adapter)
            except ValueError as error:
                refused += 1
                assert str(tiny_adapter) in str(error)
        path.write_bytes(whole)
        assert refused > 50


def test_broken_json_of_a_matrix(tiny_model, mutations):
    (path,) = [
        path
        for path in tiny_model.glob("*.safetensors")
        if "layers.0.weight.absmax" in safetensors_numpy.load_file(path)
    ]
    tensors = safetensors_numpy.load_file(path)
    state = "layers.0.weight.quant_state.bitsandbytes__fp4"
    refused = 0
    for broken in mutations(tensors[state].tobytes(), 150):
        tensors[state] = np.frombuffer(broken, np.uint8)
        safetensors_numpy.save_file(tensors, path)
        try:
            qlora.read_bitsandbytes(tiny_model)["layers.0.weight"]
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and state in str(error)
    assert refused > 120


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"shape": [6, 2**39]}, r"float32 of shape \(51539607552,\), is"),
        ({"shape": [6, 2**70]}, "impossible 'shape'"),
        ({"shape": [384]}, "impossible 'shape'"),
        ({"shape": [12, 64]}, "'layers.0.weight.absmax' must be float32 of shape"),
        ({"shape": [True, 384]}, "impossible 'shape'"),
        ({"blocksize": 128}, "must be float32 of shape"),
        ({"blocksize": 2}, "impossible 'blocksize': 2"),
        ({"blocksize": 64.0}, "impossible 'blocksize'"),
        ({"dtype": "int8"}, "impossible 'dtype': 'int8'"),
        ({"dtype": []}, "impossible 'dtype'"),
        ({"quant_type": "nf4"}, "impossible 'quant_type': 'nf4'"),
        ({"nested_offset": 0.5}, r"must have \[.*'nested_dtype'"),
        ({**NESTED, "nested_offset": float("nan")}, "impossible 'nested_offset'"),
        ({**NESTED, "nested_offset": 10**99}, "impossible 'nested_offset'"),
        ({**NESTED, "nested_blocksize": 64}, "impossible 'nested_blocksize': 64"),
        ({**NESTED, "nested_dtype": "bfloat16"}, "impossible 'nested_dtype'"),
        (NESTED, "'layers.0.weight.absmax' must be uint8"),
        ({"more": 1}, "must have"),
    ],
)
def test_impossible_fields_of_a_matrix_are_named(tmp_path, plain_spec, fields, complaint):
    like = qlora.abstract_matrix((64, 6), np.float32, plain_spec)
    w = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    qlora.write_bitsandbytes(tmp_path, {"layers.0.weight": w})
    tensors = safetensors_numpy.load_file(tmp_path / "model.safetensors")
    name = "layers.0.weight.quant_state.bitsandbytes__fp4"
    state = {**json.loads(tensors[name].tobytes()), **fields}
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=complaint) as error:
        qlora.read_bitsandbytes(tmp_path)["layers.0.weight"]
    assert str(tmp_path / "model.safetensors") in str(error.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("w.absmax"), "has 'w' in 4 bits, but no 'w.absmax'"),
        (lambda t: t.pop("w"), "must be of one tensor"),
        (
            lambda t: t.update({"w.quant_map": t["w.quant_map"][::-1].copy()}),
            "'w.quant_map' is not",
        ),
        (lambda t: t.update({"w": t["w"][:-1]}), "'w' must be 192 bytes of codes"),
        (lambda t: t.update({"w": t["w"].astype(np.int32)}), "'w' must be 192 bytes of codes"),
        (lambda t: t.update({"w.absmax": t["w.absmax"].astype(np.float16)}), "must be float32"),
        (
            lambda t: t.update({"w.quant_state.bitsandbytes__nf4": np.zeros(1, np.uint8)}),
            "must be of one tensor",
        ),
        (
            lambda t: t.update({"w.quant_state.bitsandbytes__fp4": np.zeros(5000, np.uint8)}),
            "must be uint8 of at most 4096",
        ),
    ],
)
def test_tensors_of_a_matrix_that_do_not_fit(tmp_path, plain_spec, change, complaint):
    like = qlora.abstract_matrix((64, 6), np.float32, plain_spec)
    w = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    qlora.write_bitsandbytes(tmp_path, {"w": w})
    tensors = safetensors_numpy.load_file(tmp_path / "model.safetensors")
    change(tensors)
    safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=complaint) as error:
        read_all(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def header(**tensors):
    text = json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}
            for name, (dtype, shape, offsets) in tensors.items()
        }
    ).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "header"),
        (b"\0" * 8, "header"),
        (header(a=("F32", [2**40, 2**40], (0, 4))) + b"1234", "overflow"),
        (header(a=("F32", [2**30], (0, 2**32))) + b"1234", "not fully covered"),
        (header(a=("F32", [1], (0, 4)), b=("F32", [1], (0, 4))) + b"1234", "invalid offset"),
        (header(a=("F32", [2], (0, 4))) + b"1234", "header"),
        (header(a=("F32", [1] * 65, (0, 4))) + b"1234", "'a' has an impossible shape"),
        (header(a=("F32", [0, 2**62], (0, 0))), "'a' has an impossible shape"),
        (header(a=("F8_E4M3", [4], (0, 4))) + b"1234", "'a' must be of one of .* is F8_E4M3"),
        (b"\xff" * 7 + b"\0" + b"[" * 10**5, "header"),
        ((10**5).to_bytes(8, "little") + b'{"a":' * 20000, "header"),
    ],
)
def test_impossible_tensors(tmp_path, content, complaint):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=complaint) as error:
        read_all(path)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/secret.safetensors",
        "sub/x.safetensors",
        "..\\secret.safetensors",
        "c:x.safetensors",
        "x\0.safetensors",
        ".safetensors",
        "..",
        "",
        "x.bin",
        "missing.safetensors",
        "folder.safetensors",
        "pipe.safetensors",
        None,
        5,
        ["x.safetensors"],
        {"x.safetensors": 1},
    ],
)
def test_an_index_leads_nowhere_else(tmp_path, file):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    for path in (tmp_path / "secret", folder / "x", folder / "sub" / "x"):
        safetensors_numpy.save_file({"w": np.ones(2)}, f"{path}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "x.safetensors"}}))
    assert [*qlora.read_bitsandbytes(folder)] == ["w"]
    index.write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(ValueError, match=r"'weight_map' (must have names of|has)") as error:
        qlora.read_bitsandbytes(folder)
    assert str(index) in str(error.value)


def test_an_index_of_what_its_files_have_not(tiny_model):
    index = tiny_model / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["nothing"] = fields["weight_map"]["norm.weight"]
    index.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="'weight_map' has 'nothing' in model-"):
        qlora.read_bitsandbytes(tiny_model)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[" * 10**5, "at most 20000 JSON lists"),
        (b"[" * 19000, "can't be read as JSON"),
        (b'{"a":' * 15000, "can't be read as JSON"),
        (b"[" + b"[]," * 10**5, "at most 20000 JSON lists"),
        (b" " * (2**26 + 1), "must have at most 67108864 bytes"),
        (b'{"weight_map": {"a": "x"}, "weight_map": {}}', "keys must differ"),
        (b'{"weight_map": ' + b"1" * 5000 + b"}", "can't be read as JSON"),
        (b'{"weight_map": 1}', "'weight_map' must map"),
        (b"{}", "'weight_map' must map"),
        (b"[]", "must be a JSON object"),
        (b"\xff\xfe", "can't be read as JSON"),
        (b"", "can't be read as JSON"),
    ],
)
def test_json_bombs(tmp_path, content, complaint):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=complaint) as error:
        qlora.read_bitsandbytes(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    tracemalloc.stop()
    assert str(path) in str(error.value)


def test_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        qlora.read_bitsandbytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        qlora.read_bitsandbytes(tmp_path / "missing")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match="is no file"):
        qlora.read_bitsandbytes(tmp_path)


def test_names_of_tensors_are_no_names_of_files(tmp_path):
    evil = ["../../evil", "/evil", "a/b", "..", "model.safetensors", "a\0b", ""]
    tensors = {name: np.ones(100, np.float32) for name in evil}
    qlora.write_bitsandbytes(tmp_path / "new" / "model", tensors, max_shard_bytes=500)
    shards = {f"model-{i + 1:05}-of-00007.safetensors" for i in range(7)}
    found = {path.name for path in (tmp_path / "new" / "model").rglob("*")}
    assert found == {*shards, "model.safetensors.index.json", "config.json"}
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "model", *found}
    assert sorted(qlora.read_bitsandbytes(tmp_path / "new" / "model")) == sorted(evil)


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        qlora.read_bitsandbytes(tmp_path / "x.safetensors")
