"""Exact bytes: against real buffers, over devices, and against the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit.memory import Fit, abstract_params, abstract_state, plan

SHAPES = {"matrix": (192, 256), "stack": (3, 64, 128), "odd": (65, 131), "bias": (64,), "one": ()}
TRANSFORMS = {
    "adamw4bit": optax_lowbit.adamw4bit(1e-3),
    "factor4bit": optax_lowbit.factor4bit(1e-3),
    "sgd8bit": optax_lowbit.sgd8bit(1e-3, momentum=0.9),
    "adamw": optax.adamw(1e-3),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=64),
    "sm3": optax.sm3(1e-3),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax_lowbit.scale_by_adam4bit()),
    "accumulated": optax.MultiSteps(optax_lowbit.adamw4bit(1e-3), 2),
    "injected": optax.inject_hyperparams(optax_lowbit.adamw4bit)(learning_rate=1e-3),
    "masked": optax.masked(optax_lowbit.adamw4bit(1e-3), lambda p: {n: n != "odd" for n in p}),
    "noise": optax.add_noise(0.1, 0.5, key=jax.random.key(0)),
    "none": optax.sgd(1e-3),
}


def arrays(dtype=jnp.float32):
    return {name: jnp.ones(shape, dtype) for name, shape in SHAPES.items()}


def real_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_bytes_are_those_of_real_buffers(name):
    tx, params = TRANSFORMS[name], arrays()
    memory = plan(params, tx)
    assert memory.parameters.total == real_bytes(params)
    assert memory.gradients.total == real_bytes(jax.grad(lambda p: optax.tree.sum(p))(params))
    assert memory.state.total == real_bytes(tx.init(params))
    assert memory.nbytes == 2 * real_bytes(params) + real_bytes(tx.init(params))


def test_abstract_parameters_give_the_same_plan_and_allocate_nothing():
    tx = TRANSFORMS["adamw4bit"]
    before = len(jax.live_arrays())
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()}
    abstract = plan(params, tx)
    assert len(jax.live_arrays()) == before
    assert abstract == plan(arrays(), tx)
    huge = plan({"w": jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16)}, tx)
    assert huge.parameters.total == 2**41


def test_state_is_split_into_groups():
    memory = plan(arrays(), TRANSFORMS["accumulated"])
    decisions = optax_lowbit.describe(TRANSFORMS["adamw4bit"], arrays()).decisions
    low_bit = sum(decision.nbytes for decision in decisions if decision.spec is not None)
    floats = sum(decision.nbytes for decision in decisions if decision.spec is None)
    assert low_bit and floats
    assert memory.low_bit_moments.total == low_bit
    # The accumulated gradients belong to the parameters, too.
    assert memory.float_moments.total == floats + memory.parameters.total
    # Counts of mini-steps, of steps, of Adam's, and whether an update was skipped.
    assert 0 < memory.other_state.total <= 4 * 4


@pytest.mark.parametrize(
    ("name", "low_bit", "floats", "other"),
    [
        ("adamw4bit", True, True, 4),
        ("adamw", False, True, 4),
        # learning_rate, b1, b2, eps, eps_root, weight_decay, and two counts.
        ("injected", True, True, 6 * 4 + 2 * 4),
        ("none", False, False, 0),
    ],
)
def test_counts_and_hyperparameters_are_neither_low_bit_nor_moments(name, low_bit, floats, other):
    memory = plan(arrays(), TRANSFORMS[name])
    assert bool(memory.low_bit_moments.total) == low_bit
    assert bool(memory.float_moments.total) == floats
    assert memory.other_state.total == other


def test_factored_moments_are_low_bit():
    memory = plan(jnp.ones((128, 256)), TRANSFORMS["factor4bit"])
    assert memory.low_bit_moments.total == 128 * 256 // 2 + 128 * 2 * 4 + (128 + 256) * 4
    assert (memory.float_moments.total, memory.other_state.total) == (0, 4)


def test_gradients_and_moments_have_the_dtype_of_parameters():
    memory = plan(arrays(jnp.bfloat16), optax.adamw(1e-3))
    assert memory.gradients.total == 2 * memory.count
    assert memory.state.total == 4 * memory.count + 4
    assert plan({"ids": jnp.ones(8, jnp.int32)}, optax.sgd(0.1)).gradients.total == 0


def test_adapters_alone_have_gradients_and_state():
    base = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
    adapters = {"a": jnp.ones((4096, 8)), "b": jnp.zeros((8, 4096))}
    tx = TRANSFORMS["adamw4bit"]
    memory = plan(base, tx, adapters=adapters)
    assert memory.parameters.total == 2 * 4096**2
    assert memory.adapters.total == memory.gradients.total == real_bytes(adapters)
    assert memory.state == plan(adapters, tx).state
    assert memory.count == 4096**2 + 2 * 8 * 4096
    assert "adapters" in str(memory) and "adapters" not in str(plan(base, tx))


@pytest.mark.parametrize(
    "params", [{}, [], {"a": None}, {"a": None, "b": jnp.ones(3)}, 2.0, {"a": 1.0}, jnp.ones(())]
)
def test_odd_trees(params):
    tx = optax.adam(1e-3)
    memory = plan(params, tx)
    floats = real_bytes(jax.tree.map(jnp.asarray, params))
    assert memory.parameters.total == memory.gradients.total == floats
    assert memory.state.total == real_bytes(tx.init(params))
    assert str(memory)


# --- over devices ---


def on_mesh(mesh, spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return {
        "w": jax.ShapeDtypeStruct((512, 2048), jnp.float32, sharding=sharding),
        "b": jax.ShapeDtypeStruct((2048,), jnp.float32),
    }


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("adamw4bit", ("x",)),
        ("adamw4bit", (None, "x")),
        ("adamw", (("x", "y"),)),
        ("factor4bit", ("y", "x")),
        ("injected", ()),
    ],
)
def test_bytes_of_a_device_are_those_of_its_buffers(name, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    tx, abstract = TRANSFORMS[name], on_mesh(mesh, spec)
    params = jax.tree.map(
        lambda leaf: jax.device_put(jnp.ones(leaf.shape), leaf.sharding), abstract
    )
    memory = plan(abstract, tx)

    def on_one_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert memory.devices == 8
    assert memory.parameters.device == memory.gradients.device == on_one_device(params)
    assert memory.state.device == on_one_device(tx.init(params))
    assert memory.nbytes == 2 * on_one_device(params) + memory.state.device
    assert memory.state.total == real_bytes(tx.init(params))
    assert "each of 8 devices" in str(memory)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_needs_no_devices(axis_type):
    mesh = AbstractMesh((1024,), ("x",), axis_types=(axis_type,))
    params = {"w": jax.ShapeDtypeStruct((2**14, 256), jnp.float32)}
    params["w"] = params["w"].update(sharding=NamedSharding(mesh, PartitionSpec("x")))
    memory = plan(params, TRANSFORMS["adamw4bit"])
    assert memory.parameters.device == 2**14 * 256 * 4 // 1024
    assert memory.devices == 1024


def test_state_is_on_every_device_where_the_mesh_does_not_divide_it():
    mesh = AbstractMesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    param = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=sharding)
    mu = abstract_state(TRANSFORMS["adamw4bit"], {"w": param})[0].mu["w"]
    assert mu.codes.sharding.spec == PartitionSpec(None, "x")
    assert mu.scales.sharding.spec == PartitionSpec()  # two blocks in a row


def test_wrong_arguments_are_told_without_a_step():
    with pytest.raises(ValueError, match=r"target must be one of cpu, .*got 'tpu v99'"):
        plan({"w": jnp.ones(3)}, optax.sgd(0.1), target="tpu v99")
    with pytest.raises(ValueError, match="step must be given, got None"):
        plan({"w": jnp.ones(3)}, optax.sgd(0.1), arguments=(1,))


# --- compiled ---


def training_step(tx):
    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)

    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def test_compiled_bytes_are_the_compilers():
    tx = optax.sgd(0.1, momentum=0.9)
    params = {"w": jnp.ones((256, 128))}
    arguments = params, tx.init(params), jnp.ones((64, 256))
    step = training_step(tx)
    memory = plan(params, tx, step=step, arguments=arguments)
    expected = step.lower(*arguments).compile().memory_analysis()
    assert memory.step.arguments == expected.argument_size_in_bytes
    assert memory.step.outputs == expected.output_size_in_bytes
    assert memory.step.aliased == expected.alias_size_in_bytes
    assert memory.step.temporaries == expected.temp_size_in_bytes
    assert memory.step.arguments >= real_bytes(arguments)
    # The input of tanh for its gradient, at the least.
    assert memory.step.temporaries >= 64 * 128 * 4
    assert memory.nbytes == memory.step.nbytes
    assert "compiled for cpu" in str(memory)
    assert memory.step.aliased >= real_bytes(arguments[:2])


def test_compiled_over_a_mesh_without_devices_of_its_own():
    tx = optax.sgd(0.1)
    mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = {"w": jax.ShapeDtypeStruct((256, 128), jnp.float32)}
    params["w"] = params["w"].update(sharding=NamedSharding(mesh, PartitionSpec("x")))
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    memory = plan(params, tx, step=training_step(tx), arguments=(params, tx.init({}), x))
    assert memory.step.devices == 8
    assert memory.step.arguments == 256 * 128 * 4 // 8 + 64 * 256 * 4


def test_a_step_must_be_jitted():
    with pytest.raises(TypeError, match=r"step must be what jax.jit returns, got function"):
        plan({}, optax.sgd(0.1), step=lambda: None)


@pytest.mark.parametrize("target", ["gpu", "tpu", "tpu v9", "cpu:2", "h100:9"])
def test_unknown_target(target):
    with pytest.raises(ValueError, match=rf"target must be .* got '{target}'"):
        plan({}, optax.sgd(0.1), step=jax.jit(lambda: 0), target=target)


@pytest.mark.parametrize(
    ("target", "command"),
    [("tpu v5e", r'pip install "jax\[tpu\]=='), ("h100", r'pip install "jax\[cuda12\]==')],
)
def test_a_missing_compiler_is_named(target, command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=command):
        plan({}, optax.sgd(0.1), step=jax.jit(lambda: 0), target=target)


def test_more_devices_than_the_target_has():
    mesh = AbstractMesh((16,), ("x",))
    x = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
    with pytest.raises(ValueError, match=r"over 16 devices, and target 'cpu' has 8"):
        plan(x, optax.sgd(0.1), step=jax.jit(lambda x: x), arguments=(x,))


def test_arguments_over_two_meshes():
    x, y = (
        jax.ShapeDtypeStruct(
            (8,), jnp.float32, sharding=NamedSharding(AbstractMesh((8,), (name,)), PartitionSpec())
        )
        for name in "xy"
    )
    with pytest.raises(ValueError, match="must be laid out over one mesh"):
        plan(x, optax.sgd(0.1), step=jax.jit(lambda x, y: x), arguments=(x, y))


# --- whether it fits ---


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("24GB", 24 * 2**30),
        ("24GiB", 24 * 2**30),
        (" 1.5 tb ", 3 * 2**39),
        ("512MB", 2**29),
        ("4096", 4096),
        (4096, 4096),
        ("h100", 80 * 2**30),
        ("RTX4090", 24 * 2**30),
    ],
)
def test_sizes(size, nbytes):
    params = jnp.ones((128, 128))
    fit = plan(params, optax.sgd(0.1)).fits(size)
    assert fit == Fit(needed=2 * 128 * 128 * 4, available=nbytes)
    assert fit.left == nbytes - 131072
    assert bool(fit) == (nbytes >= 131072)


def test_what_just_fits_and_what_does_not():
    assert Fit(needed=5, available=5) and not Fit(needed=6, available=5)
    assert str(Fit(3 * 2**30, 2**30)) == (
        "does not fit in 1.00 GiB (1.07 GB of 10^9 bytes): 3.00 GiB needed, 2.00 GiB missing"
    )


@pytest.mark.parametrize("size", ["", "GB", "24XB", "-1", -1, 24.0, True, None, "h1000"])
def test_no_size(size):
    with pytest.raises(ValueError, match=r"size must be .* got"):
        plan({}, optax.sgd(0.1)).fits(size)


# --- published figures ---


def test_float32_moments_of_llama_7b():
    memory = plan(abstract_params("llama-7b", jnp.bfloat16), optax_lowbit.adamw4bit(1e-5))
    full = plan("llama-7b", optax.adamw(1e-5))
    assert full.state.total == 8 * 6_738_415_616 + 4
    np.testing.assert_allclose(full.state.total / 2**30, 50.2, atol=0.01)
    # Table 4 of arXiv 2309.01507: 75.40 and 31.87, of which these parts are all but 1%.
    parts = memory.parameters.total + memory.gradients.total
    np.testing.assert_allclose((parts + full.state.total) / 2**30, 75.40, rtol=0.01)
    np.testing.assert_allclose((parts + memory.state.total) / 2**30, 31.87, rtol=0.01)
