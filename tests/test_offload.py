"""State on the host: the same values, the host's memory, two leaves on the device at most."""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import offload
from tests.kernels.test_compiled_for_tpu import ENVIRONMENT
from tests.offload_cases import HOST, ONE_PAGED, expected_kinds, kinds, tree
from tests.optimizers.cases import (
    assert_bit_equal,
    assert_equal_up_to_rounding,
    assert_same_types,
    normal_tree,
    standard_promotion,
)

TRANSFORMS = {
    "adamw": lambda: optax.adamw(1e-2),
    "adamw4bit": lambda: optax_lowbit.adamw4bit(1e-2),
    "factor4bit": lambda: optax_lowbit.factor4bit(1e-2),
    "sgd8bit": lambda: optax_lowbit.sgd8bit(1e-2, momentum=0.9),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax_lowbit.adamw4bit(1e-2), optax.ema(0.9)
    ),
    "injected": lambda: optax.inject_hyperparams(optax_lowbit.adamw4bit)(learning_rate=1e-2),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)


@each_transform
def test_steps_are_those_of_the_transform_to_the_bit(name):
    tx = TRANSFORMS[name]()
    paged, params = offload(tx, min_size=1000), tree()
    update, traced = jax.jit(tx.update), []

    def noted_update(*args):
        traced.append(args)
        return paged.update(*args)

    paged_update = jax.jit(noted_update, donate_argnums=(0, 1))
    with standard_promotion():
        state, paged_state = tx.init(params), paged.init(params)
        assert_bit_equal(paged_state, state)
        assert kinds(paged_state) == expected_kinds(state, 1000)
        assert kinds(paged_state).count(HOST) >= 2
        for seed in range(1, 4):
            updates, state = update(tree(seed), state, params)
            old = jax.tree.leaves(paged_state)
            paged_updates, paged_state = paged_update(tree(seed), paged_state, params)
            assert_bit_equal((paged_updates, paged_state), (updates, state))
            assert kinds(paged_state) == expected_kinds(state, 1000)
            assert set(kinds(paged_updates)) == {"device"}
            assert all(x.is_deleted() for x in old)
        assert len(traced) == 1


def test_min_size_is_of_arrays_of_the_state():
    params = tree()
    state = optax_lowbit.adamw4bit(1e-2).init(params)
    for min_size in (0, 63, 64, 10**6):
        paged = offload(optax_lowbit.adamw4bit(1e-2), min_size=min_size).init(params)
        _, *others = expected_kinds(state, min_size)
        assert kinds(paged) == ["device", *others]
    with pytest.raises(ValueError, match="memory_kind must be 'pinned_host', got 'device'"):
        offload(optax.sgd(0.1), memory_kind="device")
    with pytest.raises(ValueError, match="min_size must be an int of at least 0, got -1"):
        offload(optax.sgd(0.1), min_size=-1)
    with pytest.raises(ValueError, match=r"min_size .* got 1\.5"):
        offload(optax.sgd(0.1), min_size=1.5)


def test_reference_tiles_agree_up_to_rounding():
    """XLA contracts other products and sums inside of another loop."""
    tx = optax_lowbit.sgd4bit(1e-2, momentum=0.9, backend="reference")
    paged, params = offload(tx, min_size=1000), normal_tree(ONE_PAGED)
    expected = jax.jit(tx.update)(params, tx.init(params), params)
    actual = jax.jit(paged.update)(params, paged.init(params), params)
    assert HOST in kinds(actual[1])
    assert_equal_up_to_rounding(actual, expected)


def test_without_jit_it_is_the_same():
    tx = optax.trace(0.9)
    paged, params = offload(tx), tree()
    updates, state = paged.update(tree(1), paged.init(params))
    assert_bit_equal((updates, state), tx.update(tree(1), tx.init(params)))
    assert kinds(state) == expected_kinds(state)


def test_state_that_is_not_on_the_host_yet_goes_there():
    tx, params = optax_lowbit.adamw4bit(1e-2), normal_tree(ONE_PAGED)
    paged = offload(tx, min_size=1000)
    expected = jax.jit(tx.update)(params, tx.init(params), params)
    actual = jax.jit(paged.update)(params, tx.init(params), params)
    assert_bit_equal(actual, expected)
    assert kinds(actual[1]) == expected_kinds(actual[1], 1000)


@pytest.mark.parametrize("params", [{}, {"a": None}, {"scalar": ()}, (9000,), {"empty": (0, 8)}])
def test_trees_of_other_forms(params):
    params = jax.tree.map(
        lambda shape: jnp.ones(shape), params, is_leaf=lambda x: isinstance(x, tuple)
    )
    tx = optax_lowbit.adamw4bit(1e-2)
    paged = offload(tx)
    state = paged.init(params)
    assert_bit_equal(state, tx.init(params))
    results = jax.jit(paged.update)(params, state, params)
    assert_bit_equal(results, jax.jit(tx.update)(params, tx.init(params), params))


# What the program says of the order of copies; what compilers make of it: the last test.


def transfers(jaxpr):
    """(to which memory, type) of each copy between memories in a jaxpr, loops left out."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "device_put":
            for before, after in zip(equation.invars, equation.outvars):
                if before.aval.memory_space != after.aval.memory_space:
                    shape, dtype = after.aval.shape, after.aval.dtype
                    found.append((after.aval.memory_space, shape, np.dtype(dtype).name))
    return found


def of_leaf(memory, *types):
    return sorted((memory, shape, dtype) for shape, dtype in types)


def test_a_leaf_comes_while_the_one_before_is_updated_and_goes_at_once(monkeypatch):
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    monkeypatch.setattr(type(host), "__lt__", lambda a, b: a.name < b.name, raising=False)
    params = {"a": jnp.ones((64, 128)), "b": jnp.ones((64, 256)), "c": jnp.ones(64)}
    params |= {"d": jnp.ones((128, 256))}
    tx = offload(optax_lowbit.adamw4bit(1e-2), min_size=1000)
    with standard_promotion():
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    assert transfers(jaxpr) == []
    loops = [e for e in jaxpr.eqns if e.primitive.name == "while"]
    found = [sorted(transfers(loop.params["body_jaxpr"].jaxpr)) for loop in loops]
    # Codes of both moments; scales are small.
    a, b, d = ([((64 * k, 64 * j), "uint8")] * 2 for k, j in ((1, 1), (1, 2), (2, 2)))
    assert found == [
        of_leaf(device, *a),
        sorted(of_leaf(host, *a) + of_leaf(device, *b)),
        sorted(of_leaf(host, *b) + of_leaf(device, *d)),
        of_leaf(host, *d),
    ]
    # Each loop's counter goes on where that of the one before ended.
    counters = [
        next(v for v in loop.invars[-len(loop.outvars) :] if v.aval.shape == ()) for loop in loops
    ]
    assert counters[1:] == [loop.outvars[0] for loop in loops[:-1]]


def test_abstract_init_and_init_under_jit():
    tx, params = offload(optax_lowbit.adamw4bit(1e-2)), tree()
    state = tx.init(params)
    assert_same_types(jax.eval_shape(tx.init, params), state)
    jitted = jax.jit(tx.init)(params)
    assert_bit_equal(jitted, state)
    assert kinds(jitted) == kinds(state)
    description = optax_lowbit.describe(tx, params)
    assert description.nbytes == sum(x.nbytes for x in jax.tree.leaves(state))


def test_devices_without_such_memory_keep_the_state(monkeypatch):
    module = importlib.import_module("optax_lowbit.offload")
    monkeypatch.setattr(module, "_has_host_memory", lambda: False)
    tx, params = optax_lowbit.sgd8bit(1e-2, momentum=0.9), tree()
    paged = offload(tx)
    with pytest.warns(UserWarning, match="'cpu' have no memory of kind 'pinned_host'") as warned:
        state = paged.init(params)
        updates, state = jax.jit(paged.update)(tree(1), state, params)
    assert len(warned) == 1
    assert set(kinds(state)) == {"device"}
    expected = jax.jit(tx.update)(tree(1), tx.init(params), params)
    assert_bit_equal((updates, state), expected)
    step = functools.partial(optax_lowbit.fused_apply, paged)
    assert set(kinds(step(tree(1), state, params))) == {"device"}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["adamw", "adamw4bit"])
def test_each_device_has_its_shard_on_its_host(name, axis_type, tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    is_explicit = axis_type == AxisType.Explicit
    tx = TRANSFORMS[name]()
    paged = offload(tx)
    shapes = {"bias": (64,), "matrix": (64, 256)}
    rows = NamedSharding(mesh, PartitionSpec("x"))
    place = functools.partial(jax.tree.map, lambda x: jax.device_put(x, rows))
    with standard_promotion():
        with jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext():
            params, grads = place(tree(0, shapes)), place(tree(1, shapes))
            expected = jax.jit(tx.update)(grads, tx.init(params), params)
            state = paged.init(params)
            before = [x.sharding for x in jax.tree.leaves(state)]
            updates, state = jax.jit(paged.update)(grads, state, params)
    assert_bit_equal((updates, state), expected)
    for leaf, old in zip(jax.tree.leaves(state), before, strict=True):
        assert leaf.sharding.is_equivalent_to(old, leaf.ndim)
        assert leaf.sharding.memory_kind == (HOST if leaf.size > 4096 else "device")
        if leaf.size > 4096:
            assert not leaf.sharding.is_fully_replicated
    check_orbax_keeps_memory_kinds(state, tmp_path)


def check_orbax_keeps_memory_kinds(state, path):
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path / "state", target)
    assert_bit_equal(restored, state)
    assert kinds(restored) == kinds(state)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiled_for_tpu_the_device_holds_two_leaves():
    script = pathlib.Path(__file__).with_name("compile_offload_for_tpu.py")
    process = subprocess.run(
        [sys.executable, script],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    report = json.loads(process.stdout.splitlines()[-1])
    control = report.pop("all at once")
    beyond = {}
    for name, case in report.items():
        leaf, leaves = case["state of a leaf"], case["leaves"]
        # The state is on the host, and each array is written where it was.
        assert case["host arguments"] == case["host aliased"] == leaf * leaves, name
        # On the device are parameters, gradients, and what is small.
        floats = 2 * case["parameter"] * leaves
        assert floats <= case["arguments"] <= 1.001 * floats, name
        # Beside them two leaves' states, two leaves' updates, and what describes each transfer.
        most = 2 * leaf + 2 * case["parameter"] + 2**18 * case["transfers"]
        assert case["temporaries"] <= most, name
        # In and out once; codes twice, as libtpu changes their layout on the device.
        assert case["transfers"] == 2 * (case["paged arrays"] + case["paged codes"]), name
        beyond.setdefault(name.split(",")[0], []).append(case["peak"] - case["arguments"])
    # At its peak the device holds as much beside the arguments for 24 leaves as for 12.
    for twelve, twenty_four in beyond.values():
        assert abs(twenty_four - twelve) < 2**17
    adamw = report["adamw, 24 leaves"]
    assert beyond["adamw"][1] <= 2 * adamw["state of a leaf"] + adamw["parameter"] + 2**17
    # All leaves at once, were XLA left to itself.
    assert control["peak"] - control["arguments"] >= control["leaves"] * control["state of a leaf"]
