"""Kernels on parts of a leaf: the same results as on the whole, and no needless traffic."""

import re

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import Policy
from optax_lowbit.kernels import backends
from optax_lowbit.kernels.cpu import library
from optax_lowbit.quant.scaling import rank1_axes

MAKERS = {
    "adam4bit": optax_lowbit.scale_by_adam4bit,
    "adam8bit": optax_lowbit.scale_by_adam8bit,
    "momentum": lambda **kw: optax_lowbit.trace4bit(0.9, **kw),
}
COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("


def steps(update, state, grads):
    results = []
    for grad in grads:
        result, state = update(grad, state)
        results.append((result, state))
    return jax.tree.map(np.asarray, results)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_sharded_steps_equal_those_of_one_device(backend, name, axes):
    if backend == "cpu" and library.library() is None:
        pytest.skip("the native kernels were not built: no C++ compiler")
    tx = MAKERS[name](policy=Policy(min_size=0), backend=backend)
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=(64, 1024)), jnp.float32) for _ in range(2)]
    update = jax.jit(tx.update)
    expected = steps(update, tx.init(grads[0]), grads)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axes,) * 2)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec("x", "y"))
        spread = [jax.device_put(grad, place) for grad in grads]
        state = tx.init(spread[0])
        ours = steps(update, state, spread)
        text = update.lower(spread[0], state).compile().as_text()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        if a.dtype == np.uint8:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    # Rank-1 scales alone are of more than one device.
    found = set(re.findall(COLLECTIVES, text))
    assert found == ({"all-reduce"} if name == "adam4bit" else set())


def test_examples_of_a_batch_are_stepped_one_by_one():
    tx = optax_lowbit.scale_by_adam4bit(policy=Policy(min_size=0))
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 256)), jnp.float32)
    state = jax.vmap(tx.init)(grads)
    batched = jax.jit(jax.vmap(tx.update))(grads, state)
    for i in range(3):
        alone = jax.jit(tx.update)(grads[i], jax.tree.map(lambda x, i=i: x[i], state))
        for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


def test_a_named_kernel_takes_shards_whose_own_scales_would_have_more_axes():
    tx = optax_lowbit.scale_by_adam4bit(backend="interpret")
    stack = jax.ShapeDtypeStruct((8, 512, 256), jnp.float32)
    state = jax.eval_shape(tx.init, stack)
    assert len(state.nu.scales) == 2
    assert rank1_axes((8, 64, 256), state.nu.spec.block_size) == 3
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec(None, "x"), PartitionSpec()
    specs = jax.tree.map(lambda x: rows if x.ndim == 3 and x.shape[1] > 1 else whole, state)
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(rows, specs), out_specs=(rows, specs), check_vma=False
    )
    updates, _ = jax.eval_shape(update, stack, state)
    assert updates.shape == stack.shape


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_several_tpus_kernels_need_explicit_axes(axes, monkeypatch):
    """The compiler would fail, so the reference is chosen, and `describe` says why."""
    monkeypatch.setattr(jax.extend.backend, "backends", lambda: {"tpu": None})
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axes,))
    spec = optax_lowbit.QuantSpec(
        codebook="dynamic_exponent", bits=4, signed=True, scaling="block", block_size=128
    )
    with jax.set_mesh(mesh):
        leaf = jax.device_put(jnp.ones((4096, 1024)), NamedSharding(mesh, PartitionSpec("x")))
        chosen = backends.platforms(
            "auto", "momentum", leaf, leaf.shape, leaf.dtype, spec, task="step this leaf"
        )
        tx = optax_lowbit.sgd4bit(0.1, momentum=0.9)
        (kernel,) = optax_lowbit.describe(tx, leaf).kernels
    if axes == AxisType.Explicit:
        assert chosen == {"tpu": "pallas_tpu"} and kernel.backend == "pallas_tpu"
    else:
        assert chosen == {"tpu": "reference"} and kernel.backend == "reference"
        assert kernel.reason == "on several TPUs a kernel needs explicit axes or jax.shard_map"
