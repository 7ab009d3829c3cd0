"""Whole steps of the methods: what is probed is what is moved along; schedules; what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_lowbit
from optax_lowbit import Policy, QuantSpec, zo
from optax_lowbit.zo import rows
from optax_lowbit.zo.estimators import over_probes
from optax_lowbit.zo.fzoo import Normalized
from tests.zo.cases import drawn

RATE = 2.0**-5
HESSIAN_8BIT = QuantSpec(
    codebook="linear", bits=8, signed=False, scaling="block", block_size=256, rounding="stochastic"
)


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


def linear(params, slopes):
    return jnp.sum(params * slopes)


def test_donated_step_of_adam_probes_what_it_moves_along_and_nan_changes_nothing():
    opt = zo.zo_adam(RATE, policy=Policy(min_size=100))
    params, slopes = jax.random.normal(jax.random.key(0), (2, 6, 40))
    before, z = np.asarray(params), drawn(opt, params, opt.init(params, 3))
    step = jax.jit(opt.step, static_argnums=0, donate_argnums=(1, 2))
    params, state, info = step(linear, params, opt.init(jnp.asarray(before), 3), slopes)
    np.testing.assert_allclose(info.coefficients, [linear(z, slopes)], rtol=1e-3)
    # The first step is the learning rate, downhill. Its correction of the bias, 1 - 0.999 in
    # float32, has five digits.
    step_size = -RATE * np.sign(info.coefficients[0])
    np.testing.assert_allclose(params, before + step_size * z, rtol=1e-6, atol=1e-5 * RATE)
    assert optax_lowbit.is_quantized(state.moments["mu"][0])
    kept = bits((params, state._replace(count=jnp.int32(2))))
    params, state, info = step(linear, params, state, slopes * jnp.nan)
    assert not np.any(info.record) and np.isnan(info.loss)
    assert bits((params, state)) == kept


def test_conservative_step_of_several_probes_is_rounded_in_tiles_as_it_was_judged(monkeypatch):
    monkeypatch.setattr(rows, "TILE_ELEMENTS", 2**7)
    opt = zo.zo_sgd_conservative(2.0**-10, eps=2.0**-5, num_probes=2)
    params = jax.random.normal(jax.random.key(0), (4, 30, 40)).astype(jnp.bfloat16)
    state, seen = opt.init(params, 0), []

    def loss(params):
        jax.debug.callback(lambda x: seen.append(np.asarray(x, np.float32)), params)
        return jnp.sum(jnp.abs(params.astype(jnp.float32)))

    new, _, info = opt.step(loss, params, state)
    assert info.is_taken
    new = np.asarray(new, np.float32)
    assert np.mean(new != np.asarray(params, np.float32)) > 0.1
    assert any(np.array_equal(new, candidate) for candidate in seen)


def test_conservative_step_is_the_best_of_three_and_a_rejected_one_changes_no_bit():
    def rate(count):
        # Some steps are good, some too large, some overflow; the least are below what nearest
        # rounding of bfloat16 sees.
        return jnp.array([1e-4, 1e-3, 3e-3, 1.0, 1e20, 1e-4, 1e-3])[count]

    def loss(params, target):
        return jnp.sum((params.astype(jnp.float32) - target) ** 2)

    opt = zo.zo_sgd_conservative(rate, eps=0.05)
    params = jax.random.normal(jax.random.key(0), (6, 40)).at[0, 0].set(-0.0).astype(jnp.bfloat16)
    state = opt.init(params, 0)
    estimate, apply = jax.jit(opt.estimate, static_argnums=0), jax.jit(opt.apply)
    taken = []
    for count in range(7):
        target = jax.random.normal(jax.random.key(count + 1), (6, 40))
        info = estimate(loss, params, state, target)
        down = opt.rule.record(info.coefficients, rate(count), jnp.float32(0))
        results = {0.0: params, 1.0: apply(params, state, down)[0]}
        results[-1.0] = apply(params, state, -down)[0]
        losses = {choice: float(loss(new, target)) for choice, new in results.items()}
        best = min(losses, key=lambda choice: np.nan_to_num(losses[choice], nan=np.inf))
        np.testing.assert_allclose(info.record, best * down)
        np.testing.assert_allclose(info.loss, losses[0.0], rtol=1e-6)
        new, state = apply(params, state, info.record)
        assert bits(new) == bits(results[best])
        taken.append(best)
        params = new
    assert {0.0, 1.0} <= set(taken)
    assert taken[3] == taken[4] == 0.0


def test_forward_gradient_has_the_exact_slope():
    opt = zo.forward_grad(RATE, num_probes=2)
    params = jax.random.normal(jax.random.key(0), (4, 5))

    def loss(params):
        return jnp.sum(jnp.sin(params))

    state = opt.init(params, 3)
    info = jax.jit(opt.estimate, static_argnums=0)(loss, params, state)
    z = [drawn(opt, params, state, probe) for probe in range(2)]
    expected = [np.sum(np.cos(params) * x) for x in z]
    np.testing.assert_allclose(info.coefficients, expected, rtol=1e-5)
    np.testing.assert_allclose(info.record, [*(-RATE / 2 * info.coefficients), 0])
    np.testing.assert_allclose(info.loss, loss(params), rtol=1e-6)


def quadratic(size):
    a = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    return (a + a.T) / 2


@pytest.mark.parametrize("curvature", ["exact", "difference"])
def test_hizoo_measures_along_preconditioned_rows(curvature):
    tokens, a = jnp.array([4, 1, 1]), quadratic(24)

    def loss(table):
        x = table[tokens].reshape(-1)
        return 0.5 * jnp.dot(x, jnp.dot(a, x, precision="highest"), precision="highest")

    opt = zo.hizoo(RATE, 0.1, num_probes=2, smoothing=0.25, curvature=curvature)
    params = jax.random.normal(jax.random.key(0), (6, 8)) * 0.1
    h = jnp.exp(jax.random.normal(jax.random.key(1), (6, 8)))
    state = opt.init(params, 3)._replace(moments={"hessian": (h,)})
    info = jax.jit(opt.estimate, static_argnums=0)(loss, params, state)
    plain = dataclasses.replace(opt, noise=zo.Gaussian())
    v = [drawn(plain, params, state, probe) / np.sqrt(h) for probe in range(2)]
    at_tokens = [np.asarray(x)[np.asarray(tokens)].reshape(-1) for x in (params, *v)]
    slopes = [x @ a @ at_tokens[0] for x in at_tokens[1:]]
    curvatures = np.array([x @ a @ x for x in at_tokens[1:]])
    # A quadratic has no error of differences but that of float32: 1e-7 of a loss of 1, over 0.1^2.
    np.testing.assert_allclose(info.coefficients, slopes, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        info.record,
        [*(-RATE / 2 * info.coefficients), *(0.25 / 4 * np.abs(curvatures)), 0, 0.25],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(info.loss, loss(params), rtol=1e-5)


def test_hessian_in_8_bits_moves_along_what_it_is_divided_by():
    opt = zo.hizoo(RATE, smoothing=0.5, hessian_spec=HESSIAN_8BIT, policy=Policy(min_size=10))
    params = jnp.zeros((3, 64), jnp.bfloat16)
    state = opt.init(params, 3)
    assert optax_lowbit.is_quantized(state.moments["hessian"][0])
    record = jnp.array([1.0, 2.0, 0, 0.5])
    _, after = opt.apply(params, state, record)
    z = drawn(dataclasses.replace(opt, noise=zo.Gaussian()), params, state)
    expected = 0.5 + 2 * z**2
    # Codes are 1/256 of a block's largest value apart.
    h = optax_lowbit.dequantize(after.moments["hessian"][0]).astype(jnp.float32)
    atol = np.max(expected, -1, keepdims=True) * (1 / 256 + 2**-8)
    assert np.all(np.abs(h - expected) <= atol)


def test_fzoo_divides_by_the_spread():
    losses = jnp.array([[1.0], [2.0], [4.0], [5.0]])
    found = Normalized().coefficients(jnp.float32(2), losses, jnp.float32(1e-4))
    np.testing.assert_allclose(found, [-1 / 2.5**0.5, 0, 2 / 2.5**0.5, 3 / 2.5**0.5], rtol=1e-6)
    same = Normalized().coefficients(jnp.float32(2), jnp.ones((4, 1)), jnp.float32(1e-4))
    np.testing.assert_array_equal(same, 0)
    opt = zo.fzoo(0.5)
    assert opt.estimator == Normalized() and opt.num_probes == 8 and opt.eps == 1e-4


def test_schedules_of_rate_eps_and_probes_and_decay_of_chosen_leaves():
    calls = []

    def loss(params):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2)

    opt = zo.zo_sgd(
        lambda count: 0.01 * (count + 1), lambda count: 0.5 ** (count + 1), 4,
        active_probes=lambda count: count, estimator=zo.OneSided(),
        weight_decay=0.5, weight_decay_mask="w",
    )  # fmt: skip
    params = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([0.5, 2.0])}
    step = jax.jit(opt.step, static_argnums=0)
    for count, active in ((0, 1), (2, 2), (9, 4)):
        calls.clear()
        state = opt.init(params, 0)._replace(count=jnp.int32(count))
        new, _, info = step(loss, params, state)
        jax.effects_barrier()
        assert len(calls) == 1 + active
        assert info.loss == 18.25
        z = [drawn(opt, params, state, probe) for probe in range(active)]
        # (phi(eps) - phi(0)) / eps = phi'(0) + eps z^T z.
        slopes = [sum(np.sum(2 * params[k] * x[k]) for k in params) for x in z]
        eps, rate = 0.5 ** (count + 1), 0.01 * (count + 1)
        expected = np.zeros(4, np.float32)
        expected[:active] = np.array(slopes) + eps * 5
        np.testing.assert_allclose(info.coefficients, expected, rtol=1e-4, atol=2e-6 / eps)
        for key, decay in (("w", 0.5), ("b", 0.0)):
            steps = sum(-rate / active * c * x[key] for c, x in zip(info.coefficients, z))
            theirs = (1 - rate * decay) * params[key] + steps
            np.testing.assert_allclose(new[key], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_probes_after_the_active_ones_are_zeros(batch):
    keys = jnp.arange(10, dtype=jnp.uint32).reshape(5, 1, 2)
    found = over_probes(lambda key: jnp.sum(key), keys, batch, jnp.int32(3))
    np.testing.assert_array_equal(found, [1, 5, 9, 0, 0])


SIGNED = QuantSpec(codebook="dynamic_exponent", bits=8, signed=True, scaling="block")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: zo.zo_sgd_momentum(1e-3, momentum=1.0), ValueError, "momentum must be from 0"),
        (lambda: zo.zo_sgd_momentum(1e-3, trace_spec=4), TypeError, "trace_spec must be"),
        (lambda: zo.zo_sgd_momentum(1e-3, policy=4), TypeError, "policy must be"),
        (lambda: zo.zo_adam(1e-3, b2=-0.5), ValueError, "b2 must be from 0"),
        (lambda: zo.zo_adam(1e-3, b1=lambda count: 0.9), TypeError, "b1 must be a number"),
        (lambda: zo.zo_adam(1e-3, eps=0.0), ValueError, "eps must be above 0"),
        (lambda: zo.zo_sgd(1e-3, active_probes=3), TypeError, "active_probes must be a schedule"),
        (
            lambda: zo.zo_sgd_scalar_sign(1e-3, estimator=zo.ForwardGradient()),
            TypeError,
            "estimator must be",
        ),
        (lambda: zo.fzoo(1e-3, num_probes=1), ValueError, "num_probes must be at least 2"),
        (lambda: zo.hizoo(1e-3, noise=zo.Rademacher()), ValueError, "noise must have squares"),
        (lambda: zo.hizoo(1e-3, curvature="both"), ValueError, 'curvature must be "exact"'),
        (lambda: zo.hizoo(1e-3, smoothing=2.0), ValueError, "smoothing must be"),
        (lambda: zo.hizoo(1e-3, hessian_spec=SIGNED), ValueError, "no code for 0"),
    ],
)
def test_wrong_arguments_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("factory", [zo.zo_sgd_momentum, zo.zo_adam])
def test_kernels_may_be_named(factory):
    params = {"w": jnp.linspace(-1.0, 1.0, 72 * 128).reshape(72, 128)}

    def stepped(**options):
        opt = factory(1e-2, 1e-2, **options)
        step = jax.jit(opt.step, static_argnums=0)
        return step(lambda p: jnp.mean(p["w"] ** 2), params, opt.init(params, 0))[:2]

    jax.tree.map(np.testing.assert_array_equal, stepped(), stepped(backend="reference"))
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'gpu'"):
        factory(1e-2, backend="gpu")
    with pytest.raises(ValueError, match=r"(?i)cpu"):
        stepped(backend="pallas_gpu")
