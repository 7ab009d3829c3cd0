"""Steps on sharded states: tensor-parallel, inside `jax.shard_map`, and in two processes."""

import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowbit
from optax_lowbit import state_shardings
from tests.optimizers.test_sharding import elements_of_collectives
from tests.sharding import worker
from tests.sharding.cases import COLUMN, NU_BLOCK, mesh_of, normal, place

ROOT = pathlib.Path(__file__).resolve().parents[2]


def small_transformer(rng):
    d, hidden = 256, 1024
    shapes = {"up": (d, hidden), "down": (hidden, d), "norm": (d,), "embed": (512, d)}
    return {n: rng.normal(size=s, scale=0.05).astype(np.float32) for n, s in shapes.items()}


# Megatron's: columns of the first matrix, rows of the second, rows of the embedding.
TENSOR_PARALLEL = {"up": P(None, "b"), "down": P("b"), "norm": P(), "embed": P("b")}


def loss_fn(params, tokens):
    x = params["embed"][tokens]
    x = x + jax.nn.gelu((x * (1 + params["norm"])[None, None]) @ params["up"]) @ params["down"]
    logits = x[:, :-1] @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def gradients(params, tokens):
    return jax.value_and_grad(loss_fn)(params, tokens)


def test_a_tensor_parallel_step_exchanges_no_more_than_its_gradients(rng):
    mesh = mesh_of(AxisType.Auto)
    host, tokens = small_transformer(rng), rng.integers(0, 512, size=(4, 16))
    params = place(host, mesh, TENSOR_PARALLEL)
    batch = jax.device_put(tokens, NamedSharding(mesh, P("a")))
    placed = jax.tree.map(lambda x: x.sharding, params)

    def collectives(f, out_shardings, *args):
        compiled = jax.jit(f, out_shardings=out_shardings).lower(*args).compile()
        return compiled, elements_of_collectives(compiled.as_text())

    def compiled_step(tx):
        def step(params, state, tokens):
            _, grads = gradients(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, grads

        shardings = state_shardings(tx, params)
        return collectives(step, (placed, shardings, placed), params, tx.init(params), batch)

    _, alone = collectives(gradients, (None, placed), params, batch)
    _, block = compiled_step(optax_lowbit.adamw4bit(1e-2, nu_spec=NU_BLOCK))
    assert sorted(block) == sorted(alone)

    # Rank-1: the maxima of the rows of `up`, of the columns of `down` and `embed`, in one or more.
    tx = optax_lowbit.adamw4bit(1e-2)
    step, more = compiled_step(tx)
    for elements in alone:
        more.remove(elements)
    assert set(more) == {256}
    check_steps_of_one_device(tx, step, host, params, batch)


def check_steps_of_one_device(tx, step, host, params, batch):
    update, state = jax.jit(tx.update), tx.init(params)
    expected, expected_state = jax.tree.map(jnp.asarray, host), tx.init(host)
    for _ in range(2):
        state = jax.device_put(state, state_shardings(tx, params))
        params, state, grads = step(params, state, batch)
        local = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), grads)
        updates, expected_state = update(local, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    for leaf in host:
        # Of two sums, the decay's and the parameter's, the compiler fuses what it likes.
        np.testing.assert_allclose(params[leaf], expected[leaf], rtol=1e-6, atol=1e-8)


SHARD_MAPPED = {
    "block": lambda backend: optax_lowbit.scale_by_adam4bit(nu_spec=NU_BLOCK, backend=backend),
    "rank1": lambda backend: optax_lowbit.scale_by_adam4bit(backend=backend),
    "factored": lambda backend: optax_lowbit.scale_by_factor4bit(backend=backend),
    "signed-column": lambda backend: optax_lowbit.trace4bit(
        0.9, trace_spec=COLUMN, backend=backend
    ),
}
LAYOUTS = {
    "rows": {"weight": P("x"), "stack": P(None, "x")},
    "columns": {"weight": P(None, "x"), "stack": P(None, None, "x")},
    "both": {"weight": P("a", "b"), "stack": P("b", "a")},
}


def shard_mapped(tx, mesh, specs, params, grads, *, check_vma=True):
    """The last updates and state of steps in a `jax.shard_map`."""
    shardings = state_shardings(tx, params, specs, mesh=mesh)
    state_specs = jax.tree.map(lambda s: s.spec, shardings)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        update = jax.jit(
            jax.shard_map(
                tx.update,
                in_specs=(specs, state_specs, specs),
                out_specs=(specs, state_specs),
                check_vma=check_vma,
            )
        )
        for step_grads in grads:
            updates, state = update(place(step_grads, mesh, specs), state, params)
    return jax.tree.map(np.asarray, (updates, state))


def whole(tx, params, grads):
    state, update = tx.init(params), jax.jit(tx.update)
    for step_grads in grads:
        updates, state = update(step_grads, state, params)
    return jax.tree.map(np.asarray, (updates, state))


def shard_map_case(layout, axis_type=AxisType.Auto):
    mesh = mesh_of(axis_type) if layout == "both" else mesh_of(axis_type, (8,), ("x",))
    shapes = {"weight": (64, 1024), "stack": (4, 16, 1024)}
    params, *grads = (normal(shapes, seed) for seed in range(3))
    return mesh, LAYOUTS[layout], jax.tree.map(jnp.asarray, params), grads


@pytest.mark.parametrize(
    ("name", "layout", "backend"),
    [
        ("block", "both", "auto"),
        ("rank1", "rows", "auto"),
        ("rank1", "columns", "auto"),
        ("rank1", "both", "auto"),
        ("factored", "both", "auto"),
        ("factored", "both", "reference"),
        ("signed-column", "both", "reference"),
    ],
)
def test_an_update_in_shard_map_has_the_bits_of_one_device(name, layout, backend):
    tx = SHARD_MAPPED[name](backend)
    mesh, specs, params, grads = shard_map_case(layout)
    if backend == "reference":  # which takes long to compile
        specs, params, *grads = ({"weight": x["weight"]} for x in (specs, params, *grads))
    result = shard_mapped(tx, mesh, specs, place(params, mesh, specs), grads)
    (updates, state), (expected, expected_state) = result, whole(tx, params, grads)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    # The compiler fuses the reference's arithmetic as it likes; kernels are as they are.
    rtol = 1e-6 if backend == "reference" else 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), updates, expected)


def test_tiles_in_shard_map():
    """Large enough for the reference to work in tiles."""
    tx = SHARD_MAPPED["rank1"]("reference")
    mesh = mesh_of(AxisType.Auto)
    specs, shapes = {"weight": P("a", "b")}, {"weight": (1024, 2048)}
    params, grads = jax.tree.map(jnp.asarray, normal(shapes)), [normal(shapes, 1)]
    result = shard_mapped(tx, mesh, specs, place(params, mesh, specs), grads)
    jax.tree.map(np.testing.assert_array_equal, result, whole(tx, params, grads))


def test_without_check_vma_rank1_maxima_stay_local():
    """The limit that docs/sharding.md names; and the control of the test above."""
    mesh, specs, params, grads = shard_map_case("rows")
    placed = place(params, mesh, specs)
    tx = SHARD_MAPPED["block"]("auto")
    result = shard_mapped(tx, mesh, specs, placed, grads, check_vma=False)
    jax.tree.map(np.testing.assert_array_equal, result, whole(tx, params, grads))
    tx = SHARD_MAPPED["rank1"]("auto")
    _, state = shard_mapped(tx, mesh, specs, placed, grads, check_vma=False)
    _, expected = whole(tx, params, grads)
    assert (state.nu["weight"].scales[1] < expected.nu["weight"].scales[1]).any()


def test_data_parallel_shard_map_exchanges_no_scales():
    mesh = mesh_of(AxisType.Auto, (8,), ("x",))
    tx = SHARD_MAPPED["rank1"]("auto")
    params = jnp.asarray(normal({"w": (64, 1024)})["w"])
    state = tx.init(params)

    def step(grads, state, params):
        updates, state = tx.update(jax.lax.pmean(grads[0], "x"), state, params)
        return updates, state

    grads = jnp.zeros((8, *params.shape)).at[3].set(8 * params)  # whose mean is exact
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P()))
    compiled = mapped.lower(grads, state, params).compile()
    assert elements_of_collectives(compiled.as_text()) == [64 * 1024]
    jax.tree.map(
        np.testing.assert_array_equal,
        compiled(*jax.device_put((grads, state, params), compiled.input_shardings[0])),
        jax.jit(tx.update)(params, state, params),
    )


def test_two_processes_have_the_bits_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.sharding.worker"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), tmp_path / "result.npz"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(worker.PROCESSES)
    ]
    try:
        expected = worker.train(jax.devices()[:4])
        for process in processes:
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    with np.load(tmp_path / "result.npz") as archive:
        leaves = jax.tree.leaves(expected)
        for found, leaf in zip(archive.values(), leaves, strict=True):
            np.testing.assert_array_equal(found, leaf)
