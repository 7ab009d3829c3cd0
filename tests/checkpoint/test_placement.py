"""Checkpoints go from mesh to mesh and from process to process; shards stay where they lie."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import QuantSpec, checkpoint, convert_state
from optax_lowbit.kernels import checksums
from tests.optimizers.cases import assert_bit_equal
from tests.optimizers.test_sharding import elements_of_collectives

SHAPE = (64, 1024)
LOW = optax_lowbit.adamw4bit(1e-3)
WIDE_BLOCKS = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block", block_size=256)
OTHERS = {
    "same": LOW,
    "8 bits": optax_lowbit.adamw8bit(1e-3),
    "blocks": optax_lowbit.adamw4bit(1e-3, nu_spec=WIDE_BLOCKS),
    "factored": optax_lowbit.factor4bit(1e-3),
    "float32": optax.adamw(1e-3),
}


def mesh_of(devices, axis_type=AxisType.Auto):
    return jax.make_mesh(
        (devices,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:devices]
    )


def placed(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def weights():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved from eight devices, sharded by rows: the folder and the state, as NumPy and sharded."""
    params = {"w": placed(weights(), mesh_of(8), "x")}
    _, state = jax.jit(LOW.update)(params, LOW.init(params), params)
    folder = tmp_path_factory.mktemp("saved")
    state = {"params": params, "opt_state": state, "step": 1}
    checkpoint.save(folder / "low", state)
    float_state = convert_state(state["opt_state"], to=OTHERS["float32"], params=params)
    checkpoint.save(folder / "float", {**state, "opt_state": float_state})
    return folder, state


def test_every_device_writes_its_own_shards(saved):
    folder, _ = saved
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder / "low" / "state").item_metadata.tree
    (codes,) = [x for name, x in tree.items() if name.endswith("mu.w.codes")]
    assert codes.shape == (64, 512)
    assert codes.storage.chunk_shape == (8, 512)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_checksums_are_those_of_one_device_and_gather_nothing(axis_type):
    mesh = mesh_of(8, axis_type)
    for dtype in (np.uint8, jnp.bfloat16, np.float32):
        x = weights()[:, :64].astype(dtype)
        expected = checksums.checksum(x)
        assert checksums.checksum(jnp.asarray(x)) == expected
        for spec in (("x",), (None, "x")):
            assert checksums.checksum(placed(x, mesh, *spec)) == expected
    compiled = checksums._on_devices.lower(placed(x, mesh, None, "x")).compile()
    assert elements_of_collectives(compiled.as_text()) == [1]


def test_checksums_tell_what_changed():
    x = np.arange(12, dtype=np.uint8).reshape(3, 4)
    sums = {
        int(checksums.checksum(x)),
        int(checksums.checksum(x[::-1])),
        int(checksums.checksum(x.T)),
    }
    for i in range(12):
        for value in (0, 7, 255):
            changed = x.copy()
            changed.flat[i] = value
            sums.add(int(checksums.checksum(changed)))
    same = sum(value in (0, 7, 255) for value in range(12))
    assert len(sums) == 3 + 12 * 3 - same


EVERYWHERE = [(name, AxisType.Auto) for name in OTHERS] + [
    (name, AxisType.Explicit) for name in ("same", "factored")
]


@pytest.mark.parametrize(("name", "axis_type"), EVERYWHERE)
def test_onto_another_mesh_axis_and_transform(saved, name, axis_type):
    """From rows over eight devices to columns over four; the numbers are those of one device."""
    folder, state = saved
    mesh, tx = mesh_of(4, axis_type), OTHERS[name]
    with jax.set_mesh(mesh):
        params = {"w": placed(np.zeros(SHAPE, np.float32), mesh, None, "x")}
        like = {"params": params, "opt_state": tx.init(params), "step": 0}
        restored = checkpoint.restore(folder / "low", like)
    assert restored["step"] == 1
    for x, place in zip(jax.tree.leaves(restored), jax.tree.leaves(like)):
        assert getattr(x, "sharding", None) == getattr(place, "sharding", None)
    assert not jax.tree.leaves(restored["opt_state"][0].mu)[0].sharding.is_fully_replicated
    alone = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, state["opt_state"]))
    expected = convert_state(alone, to=tx, params={"w": jnp.zeros(SHAPE)})
    assert_bit_equal(restored["opt_state"], expected)
    np.testing.assert_array_equal(restored["params"]["w"], weights())


@pytest.mark.parametrize("name", ["same", "factored"])
def test_float32_into_few_bits(saved, name):
    folder, state = saved
    mesh, tx = mesh_of(8), OTHERS[name]
    params = {"w": placed(np.zeros(SHAPE, np.float32), mesh, "x")}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tx.init(params)
    )
    like = {"params": params, "opt_state": abstract, "step": 0}
    restored = checkpoint.restore(folder / "float", like)["opt_state"]
    float_state = convert_state(state["opt_state"], to=OTHERS["float32"], params=params)
    assert_bit_equal(restored, convert_state(float_state, to=tx, params=params))


def test_in_portions_of_a_leaf(tmp_path, monkeypatch):
    params = {f"w{i}": jnp.full((128, 128), i + 1.0) for i in range(4)}
    state = optax.trace(0.9).init(params)._replace(trace=params)
    checkpoint.save(tmp_path / "0", state)
    reads = []
    read = checkpoint.files._read
    monkeypatch.setattr(checkpoint.files, "_read", lambda *a: reads.append(a[1]) or read(*a))
    monkeypatch.setattr(checkpoint.files, "PORTION", 128 * 128 * 4 * 2)
    like = optax_lowbit.trace4bit(0.9).init(params)
    restored = checkpoint.restore(tmp_path / "0", like)
    assert [len(places) for places in reads] == [0, 2, 2]
    assert_bit_equal(restored.trace, convert_state(state, to=optax_lowbit.trace4bit(0.9),
                                                   params=params).trace)  # fmt: skip


def test_an_abstract_mesh_has_no_devices(saved):
    folder, _ = saved
    mesh = mesh_of(4, AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = {"w": placed(np.zeros(SHAPE, np.float32), mesh, "x")}
        abstract = jax.eval_shape(LOW.init, params)
    like = {"params": params, "opt_state": abstract, "step": 0}
    with pytest.raises(ValueError, match=r"no devices for \['opt_state'\]\[0\].mu\['w'\]"):
        checkpoint.restore(folder / "low", like)


ONE_DEVICE = """
import sys, jax, jax.numpy as jnp, numpy as np
from optax_lowbit import adamw4bit, checkpoint
assert jax.device_count() == 1
params = {"w": jnp.zeros((64, 1024))}
like = {"params": params, "opt_state": adamw4bit(1e-3).init(params), "step": 0}
restored = checkpoint.restore(sys.argv[1], like)
np.savez(sys.argv[2], *jax.tree.leaves(restored))
"""


def test_in_a_process_with_one_device(saved, tmp_path):
    folder, state = saved
    command = [sys.executable, "-c", ONE_DEVICE, folder / "low", tmp_path / "leaves.npz"]
    subprocess.run(command, check=True, timeout=120)
    with np.load(tmp_path / "leaves.npz") as leaves:
        for x, name in zip(jax.tree.leaves(state), leaves.files, strict=True):
            np.testing.assert_array_equal(x, leaves[name])
