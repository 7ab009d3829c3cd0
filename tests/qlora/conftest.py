"""Small files, whole and broken."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import QuantSpec, qlora


@pytest.fixture(scope="session")
def plain_spec():
    return QuantSpec(codebook="fp4", bits=4, signed=True, scaling="block", block_size=64)


@pytest.fixture
def tiny_model(tmp_path, plain_spec):
    """A folder of two files, an index and a config."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((64, 6), np.float32))
    tensors = {
        "layers.0.weight": qlora.quantize_matrix(w, plain_spec),
        "layers.1.weight": qlora.quantize_matrix(w[:, :3].T, plain_spec),
        "norm.weight": jnp.arange(5, dtype=jnp.bfloat16),
    }
    qlora.write_bitsandbytes(tmp_path / "model", tensors, max_shard_bytes=500)
    return tmp_path / "model"


@pytest.fixture
def tiny_adapter(tmp_path):
    rng = np.random.default_rng(0)
    pair = {"a": rng.random((2, 6), np.float32), "b": rng.random((2, 4), np.float32)}
    arrays = {**pair, "magnitude": rng.random(4, np.float32)}
    config = qlora.AdapterConfig(r=2, use_dora=True, alpha_pattern={"q": 3})
    adapter = qlora.Adapter(config=config, matrices={"l.q": arrays}, others={"x.bias": arrays["b"]})
    qlora.write_adapter(tmp_path / "adapter", adapter)
    return tmp_path / "adapter"


def with_header(data, change):
    """A safetensors file with another header."""
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate(data, rng):
    """A file with something broken: bytes, its length, or a value of its JSON."""
    choice = rng.randrange(6)
    if choice == 0:
        return data[: rng.randrange(len(data))]
    if choice == 1:
        at = rng.randrange(min(len(data), 600))
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if choice == 2:
        return data + bytes(rng.randrange(1, 9))
    if choice == 3 and data[:1] != b"{":
        return rng.choice([0, 1, 2**20, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    if data[:1] == b"{":
        return mutate_json(data, rng)
    return with_header(data, lambda header: mutate_json(header, rng))


def mutate_json(data, rng):
    value = json.loads(data)
    holders = [value]
    for holder in holders:
        children = holder.values() if isinstance(holder, dict) else holder
        holders.extend(child for child in children if isinstance(child, dict | list) and child)
    holder = rng.choice(holders)
    key = rng.choice([*holder]) if isinstance(holder, dict) else rng.randrange(len(holder))
    odd = [None, True, -1, 0, 1, 2**31, 2**63, 2**200, 1.5, 1e400, "", "../x", "x" * 999, [], {}]
    odd += [[1] * 70, [2**40, 2**40], {"a": []}, "\0", "F8_E4M3", "BF16", "I64", "\ud800"]
    if rng.randrange(4):
        holder[key] = rng.choice(odd)
    elif isinstance(holder, dict):
        holder[str(rng.choice(odd))] = holder.pop(key)
    else:
        holder.append(rng.choice(odd))
    return json.dumps(value).encode()


@pytest.fixture(scope="session")
def mutations():
    """`mutations(data, count)`: a file's content with something broken, the same in each run."""

    def of(data, count):
        rng = random.Random(0)
        return [mutate(data, rng) for _ in range(count)]

    return of
