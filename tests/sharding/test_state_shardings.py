"""state_shardings: where it puts a state is where it is born, and where every step leaves it."""

import re

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
from tests.sharding.cases import COLUMN, NU_BLOCK, mesh_of, normal, place

ABSTRACT = AbstractMesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"bias": P("b"), "scalar": P(), "stack": P(None, "a", "b"), "weight": P("a", "b")}
SHAPES = {"bias": (1024,), "scalar": (), "stack": (3, 8, 1024), "weight": (16, 1024)}


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
