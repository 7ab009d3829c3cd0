"""Derivatives of steps that kernels take: those of the reference, and Optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit

SHAPE = (40, 256)


def adam(decay, backend):
    return optax_lowbit.adamw4bit(0.1, b1=decay, eps=0.1, nesterov=True, backend=backend)


def factor(decay, backend):
    return optax_lowbit.factor4bit(0.1, b1=decay, eps=0.1, backend=backend)


def momentum(decay, backend):
    return optax_lowbit.sgd4bit(0.1, momentum=decay, nesterov=True, backend=backend)


def arrays(seed=0, shape=SHAPE):
    """A gradient, parameters, and weights of the update with which no sum over it cancels."""
    rng = np.random.default_rng(seed)
    grad, params = rng.normal(size=(2, *shape))
    weights = np.sign(grad) * rng.uniform(0.5, 2, shape)
    return [jnp.asarray(x, jnp.float32) for x in (grad, params, weights)]


def weighted_update(tx, grad, state, params, weights):
    return jnp.vdot(tx.update(grad, state, params)[0], weights)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize(
    ("make", "backend"),
    [(adam, "auto"), (factor, "auto"), (momentum, "auto"), (momentum, "interpret")],
)
def test_derivatives_are_those_of_the_reference(make, backend):
    """Of an update by the gradient and a decay rate, and of new parameters by the old."""
    grad, params, weights = arrays()
    tx = make(0.9, "reference")
    _, state = jax.jit(tx.update)(0.7 * grad, tx.init(params), params)

    def derivatives(backend):
        def loss(grad, decay, params):
            tx = make(decay, backend)
            new, _ = optax_lowbit.fused_apply(tx, 2 * grad, state, params)
            return weighted_update(tx, grad, state, params, weights) + jnp.vdot(new, weights)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(grad, 0.9, params)

    ours, theirs = derivatives(backend), derivatives("reference")
    assert all(np.any(derivative != 0) for derivative in theirs)
    assert_close(ours, theirs)


def test_derivatives_of_a_first_step_are_those_of_optax():
    """Which starts from zeros, as codes do."""
    grad, params, weights = arrays()

    def loss(grad, decay, make):
        tx = make(decay)
        return weighted_update(tx, grad, tx.init(params), params, weights)

    derivatives = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    ours = derivatives(grad, 0.5, lambda decay: adam(decay, "auto"))
    with jax.numpy_dtype_promotion("standard"):
        theirs = derivatives(
            grad, 0.5, lambda decay: optax.adamw(0.1, b1=decay, eps=0.1, nesterov=True)
        )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    assert_close(ours[1], theirs[1])


def test_derivatives_of_each_of_a_batch_and_on_a_mesh():
    batch = [jnp.stack(pair) for pair in zip(arrays(0), arrays(1))]
    tx = adam(0.9, "auto")

    def derivative(grad, params, weights):
        state = tx.init(params)
        return jax.grad(lambda grad: weighted_update(tx, grad, state, params, weights))(grad)

    batched = jax.jit(jax.vmap(derivative))(*batch)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("x"))
    for i in range(2):
        alone = jax.jit(derivative)(*arrays(i))
        assert_close([batched[i]], [alone])
    with jax.set_mesh(mesh):
        assert_close([jax.jit(derivative)(*jax.device_put(arrays(1), spread))], [alone])
