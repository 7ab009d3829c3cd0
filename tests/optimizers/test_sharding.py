"""Sharded over eight devices: the same bits as on one, and no traffic where scales are local."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import QuantSpec

NU_BLOCK = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")
# A leaf that is cut into tiles, and a stack of matrices.
SHAPES = {"matrix": (512, 2048), "stack": (8, 64, 2048)}
LAYOUTS = {
    "rows": {"matrix": ("x", None), "stack": (None, "x", None)},
    "columns": {"matrix": (None, "x"), "stack": (None, None, "x")},
    "both": {"matrix": ("a", "b"), "stack": (None, "a", "b")},
    "stacked": {"matrix": ("x", None), "stack": ("x", None, None)},
}
OPTIMIZERS = {
    "adamw4bit-block": lambda: optax_lowbit.adamw4bit(1e-3, nu_spec=NU_BLOCK),
    "adamw4bit": lambda: optax_lowbit.adamw4bit(1e-3),
    "adamw8bit": lambda: optax_lowbit.adamw8bit(1e-3),
    "sgd4bit": lambda: optax_lowbit.sgd4bit(1e-3, momentum=0.9),
    "factor4bit": lambda: optax_lowbit.factor4bit(1e-3),
}


def mesh_for(layout, axis_type):
    if layout == "both":
        return jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    return jax.make_mesh((8,), ("x",), axis_types=(axis_type,))


def trees():
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    grads = [
        {n: rng.standard_t(3, size=s).astype(np.float32) for n, s in SHAPES.items()}
        for _ in range(2)
    ]
    return params, grads


def place(tree, mesh, layout):
    return {
        n: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*LAYOUTS[layout][n])))
        for n, x in tree.items()
    }


def run(tx, params, grads):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step_grads in grads:
        updates, state = update(step_grads, state, params)
    return jax.tree.map(np.asarray, (updates, state))


CASES = [(name, layout) for name in ("adamw4bit", "factor4bit") for layout in LAYOUTS] + [
    ("adamw4bit-block", "both"),
    ("adamw8bit", "columns"),
    ("sgd4bit", "rows"),
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_result_is_bit_equal_to_unsharded(name, layout):
    tx = OPTIMIZERS[name]()
    params, grads = trees()
    mesh = mesh_for(layout, AxisType.Auto)
    expected = run(tx, jax.tree.map(jnp.asarray, params), grads)
    result = run(tx, place(params, mesh, layout), [place(g, mesh, layout) for g in grads])
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def collectives(tx, mesh, layout):
    """Elements that each collective of an update gives."""
    params, grads = trees()
    params, grads = place(params, mesh, layout), place(grads[0], mesh, layout)
    compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
    return elements_of_collectives(compiled.as_text())


def elements_of_collectives(text):
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    results = re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", text)
    return [
        max(int(np.prod([int(d) for d in dims.split(",") if d])) for dims in shapes)
        for shapes in (re.findall(r"\w+\[([\d,]*)\]", result) for result in results)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["adamw4bit-block", "adamw8bit"])
def test_block_scaled_update_has_no_collective(name, layout):
    found = collectives(OPTIMIZERS[name](), mesh_for(layout, AxisType.Auto), layout)
    assert not found, found


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("name", ["adamw4bit", "factor4bit"])
def test_rank1_and_factored_updates_exchange_little(name, layout):
    """Maxima, or sums of blocks of 128, of rows and columns; never a leaf, nor its codes."""
    mesh = mesh_for(layout, AxisType.Auto)
    found = collectives(OPTIMIZERS[name](), mesh, layout)
    assert found
    assert max(found) <= 512 * 2048 // 32


@pytest.mark.parametrize("spec", [(None, "a"), ("a", "b"), (None, "a", "b"), ("a", None, "b")])
def test_stacked_layers_have_scales_of_their_own(spec):
    """Rank-1 maxima of a stack's matrices are exchanged along the axes of the matrices alone."""
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=(4, 256, 1024)).astype(np.float32) for _ in range(2)]
    tx = optax_lowbit.scale_by_adam4bit()
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spread = [jax.device_put(g, NamedSharding(mesh, PartitionSpec(*spec))) for g in grads]
    expected = run(tx, jnp.asarray(grads[0]), grads)
    jax.tree.map(np.testing.assert_array_equal, run(tx, spread[0], spread), expected)


def test_fresh_moments_are_of_the_type_that_a_step_gives():
    """As Optax's are: of another, the second step would compile again for their sake."""
    mesh = mesh_for("both", AxisType.Auto)
    params, grads = trees()
    params, grads = place(params, mesh, "both"), place(grads[0], mesh, "both")
    tx = OPTIMIZERS["adamw4bit"]()
    state = tx.init(params)
    _, new_state = jax.jit(tx.update)(grads, state, params)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new_state)):
        assert before.ndim == 0 or before.sharding == after.sharding


def test_a_mesh_that_does_not_divide_the_devices():
    """Six of eight: sums of other parts, so equal but for their rounding."""
    mesh = jax.make_mesh((6,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:6])
    grad = np.random.default_rng(0).normal(size=(12, 256)).astype(np.float32)
    tx = optax_lowbit.factor4bit(1e-2, policy=optax_lowbit.Policy(min_size=0))
    expected, _ = jax.jit(tx.update)(grad, tx.init(jnp.asarray(grad)), grad)
    spread = jax.device_put(grad, NamedSharding(mesh, PartitionSpec("x")))
    updates, _ = jax.jit(tx.update)(spread, tx.init(spread), spread)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_control_a_misaligned_border_needs_collectives():
    """Blocks of 128 over shards of 64 columns: the check above can fail."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    params = jax.device_put(jnp.ones((128, 512)), sharding)
    tx = OPTIMIZERS["adamw4bit-block"]()
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    assert elements_of_collectives(compiled.as_text())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fresh_state_lies_where_an_update_leaves_it(layout, axis_type):
    mesh = mesh_for(layout, axis_type)
    params, grads = trees()
    params, grads = place(params, mesh, layout), place(grads[0], mesh, layout)
    tx = OPTIMIZERS["adamw4bit-block"]()
    with jax.set_mesh(mesh):
        state = tx.init(params)
        _, new_state = jax.jit(tx.update)(grads, state, params)
    for name in SHAPES:
        for moment in ("mu", "nu"):
            before, after = getattr(state[0], moment)[name], getattr(new_state[0], moment)[name]
            assert before.codes.sharding.is_equivalent_to(after.codes.sharding, before.ndim)
            assert before.scales.sharding.is_equivalent_to(after.scales.sharding, before.ndim)
            assert not before.codes.sharding.is_fully_replicated


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_explicit_mesh_keeps_types_and_bits(name, layout):
    tx = OPTIMIZERS[name]()
    params, grads = trees()
    mesh = mesh_for(layout, AxisType.Explicit)
    expected = run(tx, jax.tree.map(jnp.asarray, params), grads)
    with jax.set_mesh(mesh):
        params = place(params, mesh, layout)
        grads = [place(g, mesh, layout) for g in grads]
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        update = jax.jit(tx.update)
        for step_grads in grads:
            updates, state = update(step_grads, state, params)
            assert jax.tree.map(jax.typeof, state) == types
    result = jax.tree.map(np.asarray, (updates, state))
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_explicit_mesh_refuses_misaligned_shards_at_init():
    mesh = mesh_for("columns", AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = {
            "w": jax.device_put(jnp.ones((128, 512)), NamedSharding(mesh, PartitionSpec(None, "x")))
        }
        with pytest.raises(ValueError, match=r"last axis of parameter 'w'.*multiple of 8 x 128"):
            optax_lowbit.adamw4bit(1e-3).init(params)
