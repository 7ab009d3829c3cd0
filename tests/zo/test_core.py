"""The slice of a loss, and what a step makes of it, against directions that are materialized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo
from tests.zo.cases import TOKENS, drawn, loss, moved, odd_tree

NOISES = [zo.Rademacher(), zo.Gaussian()]


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: type(noise).__name__)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_is_that_of_the_perturbed_tree(noise, dtype):
    params = odd_tree(dtype)
    opt = zo.zo_sgd(1e-2, eps=1e-2, noise=noise)
    state = opt.init(params, 3)
    direction = drawn(opt, params, state)
    up, down = (loss(moved(params, direction, s), TOKENS) for s in (1e-2, -1e-2))
    info = jax.jit(opt.estimate, static_argnums=0)(loss, params, state, TOKENS)
    np.testing.assert_allclose(info.loss, (up + down) / 2, rtol=1e-6)
    np.testing.assert_allclose(info.coefficients[0], (up - down) / 2e-2, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: type(noise).__name__)
def test_step_moves_against_what_was_probed(noise):
    params = odd_tree()
    opt = zo.zo_sgd(1e-2, num_probes=3, noise=noise)
    state = opt.init(params, 3)._replace(count=jnp.int32(5))
    new, state_after, info = jax.jit(opt.step, static_argnums=0)(loss, params, state, TOKENS)
    expected = params
    for probe, slope in enumerate(info.record[:-1]):
        expected = moved(expected, drawn(opt, params, state, probe), slope)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), new, expected)
    assert state_after.count == 6
    np.testing.assert_array_equal(new["steps"], params["steps"])


def test_signs_are_fair_and_independent():
    opt = zo.zo_sgd(1e-2, num_probes=2)
    params = {"a": jnp.zeros((64, 100)), "b": jnp.zeros((64, 100))}
    state = opt.init(params, 0)
    z = [drawn(opt, params, state, probe) for probe in range(2)]
    samples = np.stack([z[0]["a"], z[0]["b"], z[1]["a"], z[1]["b"]]).reshape(4, -1)
    assert set(np.unique(samples)) == {-1.0, 1.0}
    correlations = samples @ samples.T / samples.shape[1] - np.eye(4)
    means = samples.mean(axis=1)
    # Five standard deviations of a mean of 6400 signs.
    assert np.abs(correlations).max() < 5 / 80
    assert np.abs(means).max() < 5 / 80


def test_leaf_keeps_its_direction_when_others_join():
    opt = zo.zo_sgd(1e-2)
    few, many = {"b": jnp.zeros((4, 40))}, {"a": jnp.zeros(3), "b": jnp.zeros((4, 40))}
    one = drawn(opt, few, opt.init(few, 0))
    other = drawn(opt, many, opt.init(many, 0))
    np.testing.assert_array_equal(one["b"], other["b"])
