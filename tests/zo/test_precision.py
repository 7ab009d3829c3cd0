"""What rounding leaves of probes and of updates, and warnings of it."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo
from optax_lowbit.zo.estimators import ForwardGradient
from tests.zo.quick_noise import QuickSigns

# Of a standard deviation of 0.02, as those of many a language model.
WEIGHTS = 0.02 * jax.random.normal(jax.random.key(0), (512, 512))


def linear(params):
    return jnp.sum(params["w"].astype(jnp.float32)) / 512


@pytest.mark.parametrize(
    ("eps", "cosine", "step", "moved"),
    [(1e-3, 0.9995, 1e-6, 0.012), (1e-4, 0.951, 1e-5, 0.116), (1e-5, 0.46, 1e-4, 0.675)],
)
def test_figures_in_bfloat16(eps, cosine, step, moved, rng):
    params = {"w": WEIGHTS.astype(jnp.bfloat16)}
    opt = zo.zo_sgd(1.0, eps=eps, noise=zo.Gaussian())
    with jax.disable_jit():
        state = opt.init(params, 3)
        # So that a step is `step` times a normal value.
        slope = float(opt.estimate(linear, params, state).coefficients[0])
        opt = dataclasses.replace(opt, learning_rate=step / abs(slope))
        found = zo.diagnose(opt, linear, params, state, num_probes=1)
    np.testing.assert_allclose(found.cosine["w"], cosine, atol=0.006 if eps < 1e-3 else 2e-4)
    # The figure's last digit, and five standard deviations of such a share of the weights.
    error = 5e-4 + 5 * (moved * (1 - moved)) ** 0.5 / 512
    np.testing.assert_allclose(found.moved_to_nearest["w"], moved, atol=error)
    # Rounded stochastically, a weight moves with the chance that its step has of its spacing.
    weights = np.asarray(params["w"], np.float32)
    spacing = 2.0 ** (np.frexp(weights)[1] - 8)
    steps = step * np.abs(rng.standard_normal(weights.shape))
    np.testing.assert_allclose(found.moved["w"], np.minimum(1, steps / spacing).mean(), atol=5e-3)
    assert found.evaluations == 2


def test_signal_to_noise_of_a_cube():
    # phi(s) = (t + s z)^3: the central difference is 3 t^2 z + eps^2 z^3, with a sign for z.
    params = jnp.asarray(1.0)
    opt = zo.zo_sgd(1e-3, eps=0.25, noise=QuickSigns())
    with jax.disable_jit():
        found = zo.diagnose(opt, lambda x: x**3, params, opt.init(params, 0))
    np.testing.assert_allclose(found.signal_to_noise, 3 / 0.25**2, rtol=1e-5)
    assert found.cosine == {"": 1} and found.moved == {"": 1} == found.moved_to_nearest


def test_a_schedule_that_gives_0_is_diagnosed():
    opt, params = zo.zo_sgd(1e-3, lambda count: 0.0 * count, noise=QuickSigns()), jnp.asarray(1.0)
    with jax.disable_jit():
        found = zo.diagnose(opt, lambda x: x**3, params, opt.init(params, 0))
    assert found.signal_to_noise == 0 and found.cosine == {"": 0} == found.moved


def test_diagnosis_needs_an_eps():
    opt = zo.zo_sgd(1e-3, estimator=ForwardGradient())
    state = opt.init(jnp.ones(2), 0)
    with pytest.raises(TypeError, match="Central"):
        zo.diagnose(opt, jnp.sum, jnp.ones(2), state)
    with pytest.raises(TypeError, match="ZeroOrderOptimizer"):
        zo.diagnose(zo.blockwise(opt, ["."]), jnp.sum, jnp.ones(2), state)


def test_warning_names_leaf_and_eps():
    params = {
        "small": 0.02 * jnp.ones((4, 4), jnp.bfloat16),
        "large": jnp.full((4, 4), -2, jnp.bfloat16),
        "half": jnp.ones(3, jnp.float16),
        "full": 1e6 * jnp.ones(3),
    }
    # Ten times 2 / 256; the half's least is 10 / 2048.
    expected = r"eps=1.0e-03 is under 10 ulp .* of 2 leaves.*'large' in bfloat16.*least 7.8e-02"
    with pytest.warns(UserWarning, match=expected):
        zo.zo_sgd(1e-3).init(params, 0)
    with pytest.warns(UserWarning, match="of 1 leaves.*'large'"):
        zo.zo_sgd(1e-3, eps=lambda count: 0.05 / (count + jnp.int32(1))).init(params, 0)


def test_no_warning_where_there_is_no_need():
    params = {"w": WEIGHTS[:8].astype(jnp.bfloat16), "zero": jnp.zeros(3, jnp.bfloat16)}
    large = {"w": jnp.ones(3, jnp.bfloat16), "v": jnp.ones(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zo.zo_sgd(1e-3, eps=1e-3).init(params, 0)
        zo.zo_sgd(1e-3, eps=1e-3, trainable="v").init(large, 0)
        zo.zo_sgd(1e-3, eps=1e-3, estimator=ForwardGradient()).init(large, 0)
        jax.eval_shape(lambda p: zo.zo_sgd(1e-3).init(p, 0), large)
