"""state_shardings: where it puts a state is where it is born, and where every step leaves it."""

import pathlib
import re
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowbit
from optax_lowbit import Policy, QuantSpec, check_alignment, state_shardings
from tests import sharding_process
from tests.optimizers.test_sharding import elements_of_collectives

ROOT = pathlib.Path(__file__).resolve().parent.parent
NU_BLOCK = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")
COLUMN = QuantSpec(
    codebook="dynamic_exponent", bits=4, signed=True, scaling="column", signed_scale=True
)
ABSTRACT = AbstractMesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"bias": P("b"), "scalar": P(), "stack": P(None, "a", "b"), "weight": P("a", "b")}
SHAPES = {"bias": (1024,), "scalar": (), "stack": (3, 8, 1024), "weight": (16, 1024)}


def mesh_of(axis_type, shape=(2, 4), names=("a", "b")):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def normal(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_t(3, size=s).astype(np.float32) for n, s in shapes.items()}


def place(tree, mesh, specs):
    return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in tree.items()}


def abstract(shapes):
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}


def specs_of(tx, params, specs, mesh=ABSTRACT):
    """{path: partition spec without trailing Nones} of `state_shardings`."""
    tree = state_shardings(tx, params, specs, mesh=mesh)
    expected = jax.tree.structure(jax.eval_shape(tx.init, params))
    assert jax.tree.structure(tree) == expected
    found = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(tree):
        assert sharding.mesh == mesh
        entries = list(sharding.spec)
        while entries and entries[-1] is None:
            entries.pop()
        found[jax.tree_util.keystr(path)] = tuple(entries)
    return found


WEIGHT = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}
STACK = {"w": jax.ShapeDtypeStruct((4, 128, 128), jnp.float32)}


def test_block_rank1_and_factored_states():
    assert specs_of(optax_lowbit.adamw4bit(1e-3), WEIGHT, P("a", "b")) == {
        "[0].count": (),
        "[0].mu['w'].codes": ("a", "b"),
        "[0].mu['w'].scales": ("a", "b"),
        "[0].nu['w'].codes": ("a", "b"),
        "[0].nu['w'].scales[0]": ("a",),
        "[0].nu['w'].scales[1]": (None, "b"),
    }
    found = specs_of(optax_lowbit.factor4bit(1e-3), WEIGHT, P("a", "b"))
    assert found["[0].nu['w'].rows"] == ("a",)
    assert found["[0].nu['w'].columns"] == (None, "b")


@pytest.mark.parametrize(
    ("params", "spec", "row", "column"),
    [
        (WEIGHT, P("a", "b"), ("b",), ("a",)),  # optax: v_row is without the largest axis, here 1
        (STACK, P("b", "a", None), ("b", "a"), ("b",)),
        (STACK, P(None, "a", "b"), (None, "a"), (None, "b")),
    ],
)
def test_vectors_of_adafactor_lie_along_their_axes(params, spec, row, column):
    found = specs_of(optax.adafactor(1e-3), params, spec)
    shape = params["w"].shape
    if shape == (256, 1024):
        row, column = column, row
    assert found["[0].v_row['w']"] == row
    assert found["[0].v_col['w']"] == column
    assert found["[0].v['w']"] == ()


def test_reduced_repeated_and_foreign_shapes_of_optax():
    square = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    found = specs_of(optax.sm3(1e-3), square, P("a", "b"))
    assert found == {"[0].mu['w'][0]": ("a",), "[0].mu['w'][1]": ("b",), "[0].nu['w']": ("a", "b")}
    found = specs_of(optax.lbfgs(memory_size=3, linesearch=None), square, P("a", "b"))
    assert found["[0].diff_params_memory['w']"] == (None, "a", "b")
    assert found["[0].weights_memory"] == ()
    found = specs_of(optax.add_noise(0.1, 0.5, jax.random.key(0)), square, P("a", "b"))
    assert set(found.values()) == {()}


def test_wrappers():
    params = {**WEIGHT, "v": jax.ShapeDtypeStruct((64,), jnp.float32)}
    specs = {"w": P("a", "b"), "v": P("b")}
    sgd = optax_lowbit.sgd8bit(1e-3, momentum=0.9)
    codes = {"trace['w'].codes": ("a", "b"), "trace['w'].scales": ("a", "b")}

    def under(prefix, found):
        return {path[len(prefix) :]: s for path, s in found.items() if path.startswith(prefix)}

    found = specs_of(optax.MultiSteps(sgd, 2), params, specs)
    assert found[".acc_grads['w']"] == ("a", "b") and found[".acc_grads['v']"] == ("b",)
    assert found[".mini_step"] == ()
    assert codes.items() <= under(".inner_opt_state[0].", found).items()
    found = specs_of(optax.masked(sgd, {"w": True, "v": False}), params, specs)
    assert codes == {p: s for p, s in under(".inner_state[0].", found).items() if p != "count"}
    tx = optax.partition({"w": optax.adam(1.0), "v": sgd}, {"w": "v", "v": "w"})
    found = specs_of(tx, params, specs)
    assert codes.items() <= under(".inner_states['v'].inner_state[0].", found).items()
    assert found[".inner_states['w'].inner_state[0].mu['v']"] == ("b",)
    found = specs_of(optax.inject_hyperparams(optax_lowbit.adamw4bit)(1e-3), params, specs)
    assert found[".inner_state[0].mu['w'].codes"] == ("a", "b")
    assert found[".hyperparams['learning_rate']"] == ()


def test_a_prefix_none_leaves_lists_one_array_and_no_parameters():
    params = {"x": [WEIGHT["w"], None], "y": (WEIGHT["w"],)}
    found = specs_of(optax.trace(0.9), params, {"x": P("a"), "y": P(None, "b")})
    assert found == {".trace['x'][0]": ("a",), ".trace['y'][0]": (None, "b")}
    found = specs_of(optax_lowbit.trace4bit(0.9), WEIGHT["w"], P("a", "b"))
    assert found == {".count": (), ".trace.codes": ("a", "b"), ".trace.scales": ("a", "b")}
    assert specs_of(optax.adam(1e-3), {}, {}) == {"[0].count": ()}
    assert specs_of(optax.adam(1e-3), None, None) == {"[0].count": ()}
    assert jax.tree.leaves(state_shardings(optax.identity(), {})) == []


def test_axes_that_the_mesh_does_not_divide_are_not_spread():
    spec = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block", block_size=64)
    tx = optax_lowbit.trace4bit(0.9, trace_spec=COLUMN, policy=Policy(min_size=0))
    params = {"w": jax.ShapeDtypeStruct((64, 1024), jnp.float32)}
    assert specs_of(tx, params, P("a", "b"))[".trace['w'].scales"] == (None, "b")
    tx = optax_lowbit.adamw4bit(1e-3, nu_spec=spec, policy=Policy(min_size=0))
    params = {"w": jax.ShapeDtypeStruct((64, 128 * 6), jnp.float32)}
    with pytest.warns(UserWarning, match="every step will exchange codes: the last axis of"):
        found = specs_of(tx, params, P("a", "b"))
    assert found["[0].mu['w'].codes"] == ("a", "b")
    assert found["[0].mu['w'].scales"] == ("a",)  # 6 blocks over 4 devices
    assert found["[0].nu['w'].scales"] == ("a", "b")


def test_shardings_are_read_from_arrays_and_from_abstract_ones():
    mesh = mesh_of(AxisType.Auto)
    tx = optax_lowbit.adamw4bit(1e-3)
    expected = state_shardings(tx, abstract(SHAPES), SPECS, mesh=mesh)
    params = place(normal(SHAPES), mesh, SPECS)
    assert state_shardings(tx, params) == expected
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    assert state_shardings(tx, like) == expected
    assert (
        state_shardings(tx, abstract(SHAPES), jax.tree.map(lambda x: x.sharding, params))
        == expected
    )


def test_memory_kind_is_that_of_the_parameter():
    mesh = mesh_of(AxisType.Auto)
    sharding = NamedSharding(mesh, P("a", "b"), memory_kind="pinned_host")
    found = state_shardings(optax_lowbit.adamw4bit(1e-3), WEIGHT, sharding)[0]
    assert {s.memory_kind for s in jax.tree.leaves(found.mu)} == {"pinned_host"}


TRANSFORMS = {
    "adamw4bit": lambda: optax_lowbit.adamw4bit(1e-3),
    "factor4bit": lambda: optax_lowbit.factor4bit(1e-3),
    "sgd8bit-accumulated": lambda: optax.MultiSteps(optax_lowbit.sgd8bit(1e-3, 0.9), 2),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "injected-and-partitioned": lambda: optax.inject_hyperparams(
        lambda rate: optax.partition(
            {"low": optax_lowbit.adamw4bit(rate, nu_spec=NU_BLOCK), "full": optax.adamw(rate)},
            {"bias": "full", "scalar": "low", "stack": "low", "weight": "full"},
        )
    )(1e-3),
}


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [(name, AxisType.Auto) for name in TRANSFORMS]
    + [(name, AxisType.Explicit) for name in ("adamw4bit", "sgd8bit-accumulated")],
)
def test_state_is_born_and_stays_where_it_says(name, axis_type):
    tx, mesh = TRANSFORMS[name](), mesh_of(axis_type)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        params = place(normal(SHAPES), mesh, SPECS)
        shardings = state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        update = jax.jit(tx.update)
        _, new_state = update(params, state, params)
        eager = tx.init(params)
        if axis_type == AxisType.Explicit:
            assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, eager)
    for found in (state, new_state):
        jax.tree.map(lambda x, sharding: assert_lies(x, sharding), found, shardings)
    # What init itself puts beside the parameters lies so, too.
    if name != "adafactor":
        jax.tree.map(
            lambda x, s: isinstance(x.sharding, NamedSharding) and assert_lies(x, s),
            eager,
            shardings,
        )
    jax.tree.map(np.testing.assert_array_equal, state, eager)


def assert_lies(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)


def test_a_jitted_init_holds_an_eighth_on_each_device():
    mesh = mesh_of(AxisType.Auto, (8,), ("x",))
    params = {"w": jnp.ones((1024, 4096), device=NamedSharding(mesh, P("x")))}
    tx = optax_lowbit.adamw4bit(1e-3, nu_spec=NU_BLOCK)
    init = jax.jit(tx.init, out_shardings=state_shardings(tx, params)).lower(params).compile()
    total = optax_lowbit.describe(tx, params).nbytes
    memory = init.memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < total / 8 + 1024
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(init(params)):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {(total - 4) // 8 + 4}  # the counter is everywhere
    # Control: nothing tells a plain jit where zeros are to lie.
    whole = jax.jit(tx.init).lower(params).compile().memory_analysis()
    assert whole.output_size_in_bytes > total - 1024


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
    command = [sys.executable, "-m", "tests.sharding_process"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), tmp_path / "result.npz"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(sharding_process.PROCESSES)
    ]
    try:
        expected = sharding_process.train(jax.devices()[:4])
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


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_nnx_parameters(axis_type):
    tx, mesh = optax_lowbit.adamw4bit(1e-2), mesh_of(axis_type)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("a", "b"))
        model = nnx.Linear(64, 1024, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
        shardings = state_shardings(tx, params)
        assert jax.tree.structure(shardings) == jax.tree.structure(tx.init(params))
        assert state_shardings(tx, params, nnx.get_named_sharding(params, mesh)) == shardings
        # An nnx.Optimizer, made outside of jit, puts its state there.
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        jax.tree.map(assert_lies, nnx.as_pure(optimizer.opt_state), nnx.as_pure(shardings))


def test_linen_partitioned_parameters():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
    model, mesh = nn.Dense(1024, kernel_init=init), mesh_of(AxisType.Auto)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 64)))["params"]
    tx = optax_lowbit.adamw4bit(1e-3)
    found = state_shardings(tx, shapes, nn.get_sharding(shapes, mesh))
    assert found[0].mu["kernel"].value.codes.spec == P("a", "b")
    assert found[0].nu["kernel"].value.scales[1].spec == P(None, "b")
    assert found[0].mu["bias"].is_fully_replicated
    assert state_shardings(tx, shapes, nn.get_partition_spec(shapes), mesh=mesh) == found


def test_alignment_names_every_parameter_that_is_not():
    params = {
        "rows": jax.ShapeDtypeStruct((1024, 100), jnp.float32),
        "fine": jax.ShapeDtypeStruct((64, 8 * 128), jnp.float32),
        "short": jax.ShapeDtypeStruct((64, 8 * 72), jnp.float32),
        "float": jax.ShapeDtypeStruct((8,), jnp.float32),
        "long": jax.ShapeDtypeStruct((64, 12 * 128), jnp.float32),
    }
    specs = {n: P(None, ("a", "b")) for n in params} | {"rows": P("a"), "float": P(("a", "b"))}
    tx = optax_lowbit.adamw8bit(1e-3, policy=Policy(rules=[("fine", NU_BLOCK_SIGNED)]))
    with pytest.raises(ValueError) as caught:
        check_alignment(tx, params, specs, mesh=ABSTRACT)
    lines = str(caught.value).split("\n")
    assert len(lines) == 2
    for line, name, size in zip(lines, ("long", "short"), (1536, 576)):
        assert re.match(
            rf"the last axis of parameter '{name}', of {size} elements, is sharded 8 ways over "
            rf"\('a', 'b'\), so it must be a multiple of 8 x 256",
            line,
        )
    # As is: floats, other axes, and shards of whole groups.
    for name in ("short", "long"):
        specs[name] = P(("a", "b"))
    check_alignment(tx, params, specs, mesh=ABSTRACT)
    check_alignment(optax.adamw(1e-3), params, specs, mesh=ABSTRACT)


NU_BLOCK_SIGNED = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block")


def test_misaligned_shards_are_an_error_on_an_explicit_mesh_and_a_warning_on_an_auto_mesh():
    tx = optax_lowbit.adamw4bit(1e-3)
    params = {"w": jax.ShapeDtypeStruct((128, 512), jnp.float32)}
    message = r"'w'.*sharded 8 ways over \('a', 'b'\).*multiple of 8 x 128"
    with pytest.raises(ValueError, match=message):
        state_shardings(tx, params, P(None, ("a", "b")), mesh=mesh_of(AxisType.Explicit))
    with pytest.warns(UserWarning, match=message) as caught:
        state_shardings(tx, params, P(None, ("a", "b")), mesh=mesh_of(AxisType.Auto))
    assert caught[0].filename == __file__
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("params", "shardings", "mesh", "error", "match"),
    [
        ({"w": np.ones((4, 8))}, None, None, ValueError, "'w' has no NamedSharding.*device_put"),
        ({"w": 1.0}, None, None, ValueError, "'w' has no NamedSharding"),
        (WEIGHT, P("a"), None, ValueError, "mesh must be given with partition specs"),
        (WEIGHT, "a", ABSTRACT, TypeError, "'w' has no NamedSharding but 'a'"),
        (WEIGHT, {"v": P()}, ABSTRACT, ValueError, "structure of params or a prefix of it"),
        (WEIGHT, {"w": None}, ABSTRACT, ValueError, "structure of params or a prefix of it"),
        ({"w": np.ones((4, 9))}, P(None, "b"), ABSTRACT, ValueError, "'w' of shape .4, 9. cannot"),
        ({"w": np.ones(4)}, P(None, "b"), ABSTRACT, ValueError, "'w' of shape .4,. cannot be"),
        ({}, None, None, ValueError, "mesh must be given where there are no parameters"),
    ],
)
def test_wrong_arguments(params, shardings, mesh, error, match):
    with pytest.raises(error, match=match):
        state_shardings(optax.adam(1e-3), params, shardings, mesh=mesh)
