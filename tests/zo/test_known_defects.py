"""What other implementations of zeroth-order steps got wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lowbit import is_quantized, zo
from tests.zo import exact
from tests.zo.quick_noise import QuickSigns

SIGNS = QuickSigns()
X = jax.random.normal(jax.random.key(0), (32, 16))


def weights(dtype):
    return {
        "w": jax.random.normal(jax.random.key(1), (16, 8)).astype(dtype),
        "b": jnp.zeros(8, dtype),
    }


def loss(params, x):
    """Least squares, computed in the dtype of the parameters, and summed up in float32."""
    y = jnp.tanh(x.astype(params["w"].dtype) @ params["w"] + params["b"][None])
    return jnp.mean((y.astype(jnp.float32) - jnp.cos(x[:, :8])) ** 2)


METHODS = {
    "sgd": zo.zo_sgd(0.01, noise=SIGNS),
    "one-sided": zo.zo_sgd(0.01, estimator=zo.OneSided(), noise=SIGNS),
    "momentum": zo.zo_sgd_momentum(0.01, noise=SIGNS),
    "sign": zo.zo_sgd_sign(2e-3, noise=SIGNS),
    "scalar sign": zo.zo_sgd_scalar_sign(2e-3, noise=SIGNS),
    "conservative": zo.zo_sgd_conservative(0.01, noise=SIGNS),
    "forward": zo.forward_grad(0.01, noise=SIGNS),
    "adam": zo.zo_adam(2e-3, noise=SIGNS),
    "fzoo": zo.fzoo(2e-3, 1e-3, noise=SIGNS),
    "lozo": zo.lozo(0.01),
    "lozo, momentum": zo.lozo(0.01, momentum=0.9),
    "hizoo": zo.hizoo(0.01),
    "hizoo, difference": zo.hizoo(0.01, 0.05, curvature="difference"),
}


@pytest.mark.parametrize("name", METHODS)
def test_float16_steps_are_finite_and_descend(name):
    opt, params = METHODS[name], weights(jnp.float16)
    state, before = opt.init(params, 0), loss(params, X)
    step = jax.jit(opt.step, static_argnums=0, donate_argnums=(1, 2))
    for _ in range(3):
        params, state, info = step(loss, params, state, X)
        assert np.isfinite(info.loss) and info.is_taken
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == jnp.float16 and jnp.isfinite(leaf).all()
    assert loss(params, X) < before


@pytest.mark.parametrize("num_probes", [1, 2])
def test_moments_of_bfloat16_parameters_are_those_of_float32_ones(num_probes):
    opt = zo.zo_adam(1e-3, num_probes=num_probes, noise=SIGNS)
    records = [jnp.append(c * jnp.ones(num_probes), jnp.array([1e-3, 0.0])) for c in (0.3, -1e-4)]
    kept = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        params = {"large": jnp.ones((64, 128), dtype), "small": jnp.ones(5, dtype)}
        state, apply = opt.init(params, 0), jax.jit(opt.apply)
        for record in records:
            params, state = apply(params, state, record)
        assert params["large"].dtype == dtype
        kept[dtype] = state.moments, state.scalars
    for found, expected in zip(*map(jax.tree.leaves, kept.values()), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    for large, small in kept[jnp.bfloat16][0].values():
        assert is_quantized(large) and small.dtype == jnp.float32


def test_probes_of_fzoo_together_are_those_one_by_one():
    params, x = exact.exact_case()
    infos, results = [], []
    for batch in (1, 4):
        opt = zo.fzoo(2**-6, 1 / 8, 4, noise=SIGNS, probe_batch=batch)
        step = jax.jit(functools.partial(opt.step, exact.loss))
        new, _, info = step(params, opt.init(params, 3), x)
        infos.append(info)
        results.append(new)
    assert len(np.unique(infos[0].coefficients)) == 4
    np.testing.assert_array_equal(*(info.coefficients for info in infos))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_keys_whose_bits_depend_on_the_mesh_are_refused():
    params = weights(jnp.float32)
    blocks = zo.blockwise(zo.zo_sgd(0.1), ["w", "b"])
    both = zo.hybrid(zo.zo_sgd(0.1, trainable="w"), optax.sgd(0.1), "b")
    for implementation in ("rbg", "unsafe_rbg"):
        key = jax.random.key(0, impl=implementation)
        for opt in (*METHODS.values(), blocks, both):
            with pytest.raises(ValueError, match=f"be a threefry2x32 key.*'{implementation}'"):
                opt.init(params, key)


@pytest.mark.parametrize("make", [zo.zo_sgd, zo.zo_sgd_momentum, zo.zo_adam, zo.zo_sgd_sign])
def test_what_a_mask_leaves_out_of_several_probes_is_not_updated(make):
    opt = make(1e-3, num_probes=3, noise=zo.MagnitudeMask(SIGNS, 0.25, 2))
    params = weights(jnp.float32)
    new, _, info = jax.jit(opt.step, static_argnums=0)(loss, params, opt.init(params, 0), X)
    assert np.count_nonzero(info.coefficients) == 3
    size = np.abs(params["w"])
    np.testing.assert_array_equal(new["w"] != params["w"], size < np.sort(size, axis=None)[-32])
    assert (new["b"] != params["b"]).all()  # equal weights take part together


def with_dropout(params, x, key):
    """Depends on the randomness, and not on the parameters."""
    kept = jax.random.bernoulli(key, 0.5, x.shape)
    return jnp.mean(jnp.where(kept, x, 0.0) ** 2) + 0.0 * jnp.sum(params["w"])


@pytest.mark.parametrize("opt", [
    zo.zo_sgd(0.1, num_probes=3, noise=SIGNS),
    zo.zo_sgd(0.1, num_probes=3, noise=SIGNS, probe_batch=3),
    zo.fzoo(0.1, num_probes=3, noise=SIGNS),
    zo.hizoo(0.1, curvature="difference"),
], ids=["central", "together", "fzoo", "hizoo"])  # fmt: skip
@pytest.mark.parametrize("parts", [1, 4])
def test_all_evaluations_of_a_step_have_the_same_dropout(opt, parts):
    params, fun = weights(jnp.float32), zo.microbatched(with_dropout, parts)
    estimate, losses = jax.jit(opt.estimate, static_argnums=0), []
    for seed in range(2):
        info = estimate(fun, params, opt.init(params, 0), X, jax.random.key(seed))
        assert not info.coefficients.any()
        losses.append(float(info.loss))
    assert losses[0] != losses[1]
