"""Low-bit optimizers in Flax: linen's TrainState and nnx.Optimizer, sharded and not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec

import optax_lowbit
from optax_lowbit import QuantSpec
from tests.optimizers.cases import (
    each_family,
    normal_tree,
    quantized_leaves,
)

BLOCK_NU = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")


def inputs():
    return normal_tree({"x": (4, 64)})["x"]


@each_family
def test_linen_train_state(case):
    model = nn.Dense(128)
    variables = model.init(jax.random.key(0), inputs())
    train_state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=case.make()
    )

    @jax.jit
    def step(train_state, x):
        def loss(params):
            return jnp.mean(train_state.apply_fn({"params": params}, x) ** 2)

        value, grads = jax.value_and_grad(loss)(train_state.params)
        return value, train_state.apply_gradients(grads=grads)

    losses = []
    for _ in range(4):
        value, train_state = step(train_state, inputs())
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert quantized_leaves(train_state.opt_state)[0].shape == (64, 128)


def mean_square(model, x):
    return jnp.mean(model(x) ** 2)


@nnx.jit
def nnx_step(model, optimizer, x):
    value, grads = nnx.value_and_grad(mean_square)(model, x)
    optimizer.update(model, grads)
    return value


def optax_steps(tx, params, count):
    """The parameters that plain optax reaches."""
    state = tx.init(params)

    def loss(params):
        return jnp.mean((inputs() @ params["kernel"] + params["bias"][None, :]) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(count):
        params, state = step(params, state)
    return params


def optimizer_variables(optimizer):
    state = nnx.state(optimizer, nnx.optimizer.OptState)
    return [variable for _, variable in nnx.to_flat_state(state)]


@each_family
def test_nnx_optimizer_follows_optax(case):
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    start = {"kernel": model.kernel.get_value(), "bias": model.bias.get_value()}
    expected = optax_steps(case.make(), start, 3)
    optimizer = nnx.Optimizer(model, case.make(), wrt=nnx.Param)
    for _ in range(3):
        nnx_step(model, optimizer, inputs())
    np.testing.assert_allclose(model.kernel.get_value(), expected["kernel"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.bias.get_value(), expected["bias"], rtol=1e-4, atol=1e-5)
    dtypes = {variable.get_value().dtype for variable in optimizer_variables(optimizer)}
    assert jnp.dtype(jnp.uint8) in dtypes


@each_family
def test_nnx_state_passed_to_the_transform_itself(case):
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    tx = case.make()

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: mean_square(nnx.merge(graph, p), x))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = nnx.to_pure_dict(params)
    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state, inputs())
    expected = optax_steps(case.make(), start, 2)
    found = nnx.to_pure_dict(params)
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-4, atol=1e-5)


@each_family
def test_nnx_optimizer_reaches_no_other_variables(case):
    model = nnx.BatchNorm(8192, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, case.make(), wrt=nnx.Param)
    paths = {"/".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(optimizer))}
    assert any("scale" in path for path in paths)
    assert not any("mean" in path for path in paths)


BLOCKED = {
    "adamw4bit-block": lambda: optax_lowbit.adamw4bit(1e-2, nu_spec=BLOCK_NU),
    "sgd4bit": lambda: optax_lowbit.sgd4bit(1e-2, momentum=0.9),
    "adamw8bit": lambda: optax_lowbit.adamw8bit(1e-2),
}
WITHOUT_BLOCKS = {
    "adamw4bit": lambda: optax_lowbit.adamw4bit(1e-2),
    "factor4bit": lambda: optax_lowbit.factor4bit(1e-2),
}


def sharded_training(tx, axis_type, **metadata):
    """A sharded model and its optimizer after two steps, and the losses."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        init = nnx.initializers.lecun_normal()
        init = nnx.with_partitioning(init, ("data", "model"), **metadata)
        model = nnx.Linear(64, 512, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        losses = [float(nnx_step(model, optimizer, inputs())) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    return model, optimizer


def sharded_cases():
    for name in BLOCKED:
        for axis_type in (AxisType.Auto, AxisType.Explicit):
            yield pytest.param(name, axis_type, id=f"{name}-{axis_type.name}")


@pytest.mark.parametrize(("name", "axis_type"), list(sharded_cases()))
def test_nnx_optimizer_shards_block_scaled_states_as_parameters(name, axis_type):
    _, optimizer = sharded_training(BLOCKED[name](), axis_type)
    codes = [v for v in optimizer_variables(optimizer) if v.get_value().dtype == jnp.uint8]
    assert codes
    for variable in codes:
        assert variable.get_value().sharding.spec == PartitionSpec("data", "model")


@pytest.mark.parametrize(
    "metadata", [{}, {"optimizer_sharding": ()}], ids=["as-parameter", "optimizer-sharding"]
)
@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
def test_nnx_optimizer_takes_scales_that_are_not_laid_out_as_the_parameter(name, metadata):
    # Row and column scales have an axis of length 1, which the parameter's spec does not divide.
    _, optimizer = sharded_training(WITHOUT_BLOCKS[name](), AxisType.Auto, **metadata)
    codes = [v for v in optimizer_variables(optimizer) if v.get_value().dtype == jnp.uint8]
    assert codes


@pytest.mark.parametrize("make", [optax_lowbit.adamw4bit, optax_lowbit.muon4bit])
def test_nnx_parameters_masked_and_partitioned(make):
    """A mask leaves variables without a value."""
    model = nnx.Linear(128, 256, rngs=nnx.Rngs(0))
    tx = optax.masked(make(1e-2), lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.mean(model(jnp.ones((4, 128))) ** 2))(model)
    before = model.kernel.get_value()
    optimizer.update(model, grads)
    assert (model.kernel.get_value() != before).any()
