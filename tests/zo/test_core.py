"""The slice of a loss, and what a step makes of it, against directions that are materialized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo
from optax_lowbit.zo.directions import probe_keys, split
from optax_lowbit.zo.estimators import ForwardGradient, curvature
from optax_lowbit.zo.noise import Probe
from optax_lowbit.zo.slices import Slice
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


def test_forward_gradient_is_the_derivative_along_the_direction():
    params = odd_tree()
    opt = zo.zo_sgd(1e-2, estimator=ForwardGradient())
    state = opt.init(params, 3)
    info = jax.jit(opt.estimate, static_argnums=0)(loss, params, state, TOKENS)
    gradient = jax.grad(loss, allow_int=True)(params, TOKENS)
    products = [
        jnp.sum(g * z)
        for g, z in zip(jax.tree.leaves(gradient), jax.tree.leaves(drawn(opt, params, state)))
        if g.dtype == jnp.float32
    ]
    np.testing.assert_allclose(info.coefficients[0], sum(products), rtol=1e-4)
    np.testing.assert_allclose(info.loss, loss(params, TOKENS), rtol=1e-6)


def test_curvature_is_the_second_derivative_along_the_direction():
    opt = zo.zo_sgd(1e-2)
    matrix = jnp.array([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]])
    params = {"x": jnp.array([1.0, -2.0, 0.5])}
    state = opt.init(params, 0)
    ours, run = split(params), (state.key[0], state.key[1])
    keys = probe_keys(run, state.count, 1, ours.paths)
    phi = Slice(
        lambda p: p["x"] @ matrix @ p["x"] / 2, ours, opt.noise, Probe(run, run, state.count)
    )
    z = drawn(opt, params, state)["x"]
    value, slope, second = curvature(phi, keys[0])
    np.testing.assert_allclose(value, params["x"] @ matrix @ params["x"] / 2, rtol=1e-6)
    np.testing.assert_allclose(slope, z @ matrix @ params["x"], rtol=1e-6)
    np.testing.assert_allclose(second, z @ matrix @ z, rtol=1e-6)


@pytest.mark.parametrize("fill", [None, 0.0, 2.0])
@pytest.mark.parametrize("estimator", [zo.Central(), zo.ForwardGradient()])
def test_what_is_read_in_place_of_a_missing_row_does_not_move(fill, estimator):
    params = {"table": jnp.ones((4, 8))}
    opt = zo.zo_sgd(1e-2, eps=2**-4, estimator=estimator)

    def loss(params, ids):
        rows = jnp.take(params["table"], ids, axis=0, mode="fill", fill_value=fill)
        return jnp.sum(jnp.nan_to_num(rows) @ jnp.arange(8.0))

    state = opt.init(params, 0)
    inside = opt.estimate(loss, params, state, jnp.array([1, 3]))
    beyond = opt.estimate(loss, params, state, jnp.array([1, 3, 7]))
    np.testing.assert_array_equal(beyond.coefficients, inside.coefficients)
    assert np.any(inside.coefficients != 0)


def test_leaves_without_elements_are_left_alone():
    params = {"empty": jnp.zeros((0, 3)), "w": jnp.ones(2)}
    opt = zo.zo_sgd(0.1)
    state = opt.init(params, 0)
    new, _, _ = opt.step(lambda p: jnp.sum(p["w"] ** 2), params, state)
    assert new["empty"].shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 0.0}, "eps must be above 0 and finite, got 0.0"),
        ({"eps": float("inf")}, "eps must be above 0 and finite, got inf"),
        ({"eps": "small"}, "eps must be a number or a schedule"),
        ({"num_probes": 0}, "num_probes must be an int of at least 1, got 0"),
        ({"clip": -1.0}, "clip must be a number above 0 or None"),
        ({"trainable": "("}, "no regular expression"),
        ({"trainable": 3}, "trainable must be a regular expression, a predicate"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        zo.zo_sgd(0.1, **arguments)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="must choose a float leaf, and there are"):
        zo.zo_sgd(0.1, trainable="lora").init({"w": jnp.ones(2)}, 0)


def test_loss_must_be_a_scalar():
    params = {"w": jnp.ones(2)}
    opt = zo.zo_sgd(0.1)
    with pytest.raises(TypeError, match=r"loss_fn must give a float of shape \(\), got"):
        opt.step(lambda p: p["w"], params, opt.init(params, 0))
