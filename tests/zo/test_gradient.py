"""Estimates of gradients as trees, and as the head of an optax chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lowbit import zo
from optax_lowbit.zo.estimators import ForwardGradient
from tests.zo.quick_noise import QuickSigns


def odd_params():
    return {
        "frozen": jnp.ones(3),
        "kernel": jnp.array([[1.0, -2.0, 0.5]]),
        "none": None,
        "scalar": jnp.asarray(3.0, jnp.bfloat16),
        "steps": jnp.arange(2),
    }


def linear(params):
    """Its gradient: kernel 1, 2, 3; scalar -4; frozen 1."""
    kernel = jnp.sum(params["kernel"] * jnp.array([[1.0, 2.0, 3.0]]))
    return kernel - 4 * params["scalar"].astype(jnp.float32) + jnp.sum(params["frozen"])


def test_mean_of_estimates_is_the_gradient():
    def estimate(key):
        return zo.gradient(
            linear, odd_params(), key, eps=2.0**-4, num_probes=1024, trainable="kernel|scalar",
            probe_batch=1024,
        )  # fmt: skip

    found = jax.jit(estimate)(jax.random.key(3))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), odd_params()
    )
    # A component's variance is the sum of the squares of the others: at most 30, over 1024 probes.
    bound = 5 * (30 / 1024) ** 0.5
    np.testing.assert_allclose(found["kernel"], [[1, 2, 3]], atol=bound)
    np.testing.assert_allclose(found["scalar"].astype(jnp.float32), -4, atol=bound)
    assert not found["frozen"].any() and not found["steps"].any()


def test_forward_gradient_is_exact_along_its_direction():
    with jax.disable_jit():
        found = zo.gradient(
            lambda x: jnp.sum(x**3), jnp.asarray(2.0), 0,
            estimator=ForwardGradient(), noise=QuickSigns(),
        )  # fmt: skip
    assert found == 12  # z is a sign, and its square 1


def test_loss_that_is_not_finite_shows():
    with jax.disable_jit():
        found = zo.gradient(lambda x: jnp.log(-jnp.sum(x**2)), jnp.ones(2), 0, noise=QuickSigns())
    assert not np.isfinite(found).any()


def test_chain_with_sgd_is_zo_sgd():
    params = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.asarray(0.5), "none": None}

    def loss(params):
        return jnp.sum(jnp.cos(params["a"])) * params["b"]

    tx = optax.chain(zo.estimate_gradient(1e-2, 2, noise=QuickSigns(), key=7), optax.sgd(0.1))
    opt = zo.zo_sgd(0.1, eps=1e-2, num_probes=2, noise=QuickSigns())
    mine, theirs = params, params
    with jax.disable_jit():
        state, other = tx.init(params), opt.init(params, 7)
        for _ in range(2):
            # What is given for updates is not looked at.
            updates, state = tx.update(
                jax.tree.map(lambda x: x * jnp.nan, mine), state, mine, obj_fn=loss, value=None
            )
            mine = optax.apply_updates(mine, updates)
            theirs, other, _ = opt.step(loss, theirs, other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), mine, theirs)
    assert np.abs(mine["a"] - params["a"]).max() > 1e-3
    assert state[0].count == 2


def test_composes_with_optax():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    head = optax.inject_hyperparams(
        zo.estimate_gradient, static_args=("num_probes", "probe_batch")
    )(eps=optax.linear_schedule(0.1, 0.0, 10), noise=QuickSigns())
    tx = optax.chain(
        head, optax.MultiSteps(optax.masked(optax.sgd(1.0), {"a": True, "b": False}), 2)
    )

    def loss(params):
        return jnp.sum(params["a"]) + jnp.sum(params["b"])

    @jax.jit
    def step(params, state):
        with jax.numpy_dtype_promotion("standard"):  # which MultiSteps needs
            return tx.update(params, state, params, obj_fn=loss)

    state = tx.init(params)
    first, after = step(params, state)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert not first["a"].any()
    second, after = step(params, after)
    # Two estimates c z, whose c is a sum of five signs: their mean is a sum of signs over 2.
    assert second["a"].any() and not np.mod(2 * second["a"] + 1e-3, 1).round(1).any()
    np.testing.assert_allclose(after[0].hyperparams["eps"], 0.09, rtol=1e-6)


def test_map_params_finds_no_parameters_in_the_state():
    tx = zo.estimate_gradient(key=1)
    state = tx.init(jnp.ones(3))
    same = optax.tree.map_params(tx, lambda x: x + 1, state)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_wrong_arguments():
    tx = zo.estimate_gradient()
    state = tx.init(jnp.ones(3))
    with pytest.raises(ValueError, match="obj_fn must be given"):
        tx.update(jnp.ones(3), state, jnp.ones(3))
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(jnp.ones(3), state, obj_fn=jnp.sum)
    with pytest.raises(ValueError, match="num_probes must be an int"):
        zo.estimate_gradient(num_probes=0)
    with pytest.raises(ValueError, match="eps must be above 0"):
        zo.gradient(jnp.sum, jnp.ones(3), 0, eps=-1.0)
    with pytest.raises(TypeError, match="key"):
        zo.estimate_gradient(key=1.5)
    with pytest.raises(ValueError, match="must choose a float leaf"):
        zo.gradient(jnp.sum, {"a": jnp.ones(3)}, 0, trainable="b")
