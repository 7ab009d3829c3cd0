"""Features of zeroth-order steps together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lowbit import zo
from tests.zo.cases import drawn
from tests.zo.quick_noise import QuickSigns

PARAMS = {"a": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.ones(4)}


def loss(params):
    return jnp.sum(jnp.tanh(params["a"]) ** 2) + jnp.sum(params["b"] ** 2)


@pytest.mark.parametrize(
    "noise",
    [zo.MagnitudeMask(QuickSigns(), 0.5, 10), zo.RandomMask(QuickSigns(), 0.5, 10)],
    ids=type,
)
def test_gradient_through_a_mask_is_not_zero(noise):
    found = jax.jit(functools.partial(zo.gradient, loss, noise=noise))(PARAMS, 0)
    assert np.count_nonzero(found["a"]) == 6 and np.count_nonzero(found["b"]) in (2, 4)


def test_what_is_not_a_number_on_the_way_changes_no_direction():
    x = jnp.array([0.0, 1.0, 2.0, 3.0])

    def masked(params):
        shares = x / x  # NaN first
        y = params["a"].T @ jnp.ones(3)
        return jnp.sum(y * jnp.where(jnp.isnan(shares), 1.0, shares))

    opt = zo.zo_sgd(0.1, eps=1e-2)
    state = opt.init({"a": PARAMS["a"]}, 1)
    info = jax.jit(opt.estimate, static_argnums=0)(masked, {"a": PARAMS["a"]}, state)
    z = drawn(opt, {"a": PARAMS["a"]}, state)["a"]
    np.testing.assert_allclose(info.coefficients[0], jnp.sum(z), rtol=1e-3)


def test_tell_counts_the_probes_that_are_active():
    opt = zo.zo_sgd(0.1, num_probes=4, noise=QuickSigns(), active_probes=optax.constant_schedule(2))
    state = opt.init(PARAMS, 0)
    losses = [loss(opt.ask(PARAMS, state, i)) for i in range(opt.evaluations)]
    told, _, info = opt.tell(PARAMS, state, losses)
    stepped, _, expected = jax.jit(opt.step, static_argnums=0)(loss, PARAMS, state)
    assert np.count_nonzero(info.coefficients) == 2
    np.testing.assert_allclose(info.coefficients, expected.coefficients, rtol=2e-3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3), told, stepped)


def test_hessian_is_averaged_while_the_learning_rate_is_0():
    noise = zo.Gaussian()
    opt = zo.hizoo(optax.constant_schedule(0.0), smoothing=0.5, noise=noise)
    state = opt.init(PARAMS, 0)
    new, after, _ = jax.jit(opt.step, static_argnums=0)(loss, PARAMS, state)
    jax.tree.map(np.testing.assert_array_equal, new, PARAMS)
    assert not np.array_equal(after.moments["hessian"][0], state.moments["hessian"][0])


def test_blocks_of_forward_gradients_under_a_scan():
    opt = zo.blockwise(zo.forward_grad(0.1, noise=QuickSigns()), ["a", "b"])

    def scanned(params):
        turn = lambda x, row: (jnp.tanh(x + row), None)  # noqa: E731
        x, _ = jax.lax.scan(turn, params["b"], params["a"])
        return jnp.sum(x**2)

    state = opt.init(PARAMS, 0)
    new, _, info = jax.jit(opt.step, static_argnums=0)(scanned, PARAMS, state)
    assert info.coefficients.shape == (2, 1)
    assert all(not np.array_equal(new[name], PARAMS[name]) for name in PARAMS)


def test_momentum_survives_a_refresh_that_is_not_taken():
    params = {"w": jnp.ones((5, 4))}
    opt = zo.lozo(0.0, interval=2, momentum=0.5)
    state = opt.init(params, 3)
    apply = jax.jit(opt.apply)
    record = jnp.array([1.0, 0.1, 0.0])
    for _ in range(2):
        _, state = apply(params, state, record)
    _, taken = apply(params, state, record)
    _, skipped = apply(params, state, jnp.zeros(3))
    np.testing.assert_array_equal(skipped.moments["trace"][0], state.moments["trace"][0])
    # The next step projects what was left, whatever step of the interval it is.
    _, later = apply(params, skipped, 1e-30 * record)
    old, new = (np.asarray(s.moments["trace"][0], np.float64) for s in (state, later))
    _, tiny = apply(params, state, 1e-30 * record)
    np.testing.assert_allclose(new, tiny.moments["trace"][0], rtol=1e-5)
    assert not np.allclose(new, 0.5 * old)
    assert not np.allclose(new, taken.moments["trace"][0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zo.zo_sgd(0.1, noise=zo.Gaussian), "noise must be a Noise"),
        (lambda: zo.zo_sgd(0.1, estimator=zo.OneSided), "estimator must be an Estimator"),
        (lambda: zo.probe_parallel(zo.fzoo(0.1), "d"), "probe_axis must be None"),
        (lambda: zo.probe_parallel(zo.hizoo(0.1), "d"), "probe_axis must be None"),
        (lambda: zo.probe_parallel(zo.blockwise(zo.zo_sgd(0.1), ["."]), "d"), "opt must be a Zero"),
        (lambda: zo.hybrid(zo.zo_sgd_conservative(0.1), optax.sgd(0.1), "b"), "be asked for cand"),
        (lambda: zo.diagnose(zo.hizoo(0.1), loss, PARAMS, None), "opt must take steps along"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_number_that_there_is_no_candidate_of():
    opt = zo.zo_sgd(0.1)
    state = opt.init(PARAMS, 0)
    for number in (2, jnp.int32(2), -1):
        with pytest.raises(ValueError, match="number must be from 0 to 1"):
            opt.ask(PARAMS, state, number)
    assert dataclasses.replace(opt, num_probes=3).evaluations == 6
