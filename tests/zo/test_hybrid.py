"""Backpropagation for the last layers, against gradients at materialized perturbations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowbit
from optax_lowbit import zo
from optax_lowbit.zo.estimators import Central, ForwardGradient, OneSided
from tests.zo.cases import drawn, moved
from tests.zo.quick_noise import QuickSigns

PARAMS = {
    "embedding": jnp.linspace(-1, 1, 8).reshape(2, 4),
    "layers": jnp.linspace(-1, 1, 48).reshape(3, 4, 4),
    "head": {"kernel": jnp.ones((4, 1)), "bias": jnp.zeros(1, jnp.bfloat16)},
    "frozen": jnp.asarray(2.0),
    "none": None,
}


def loss(params, tokens=(0, 1)):
    @jax.checkpoint
    def layer(x, weight):
        return x + jnp.tanh(x @ weight), None

    x, _ = jax.lax.scan(layer, params["embedding"][jnp.array(tokens)], params["layers"])
    x = x @ params["head"]["kernel"] + params["head"]["bias"].astype(jnp.float32)[None]
    return jnp.mean((x * params["frozen"] - 1) ** 2)


def perturbed(opt, params, state, probe, s):
    direction = drawn(opt, params, state, probe)
    ours = {name: params[name] for name in ("layers", "frozen")}
    return {**params, **moved(ours, {name: direction[name] for name in ours}, s)}


value_and_grad = jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("estimator", [Central(), OneSided()])
def test_step_is_both_halves(estimator):
    rest = zo.zo_sgd(
        0.1, eps=0.05, num_probes=2, noise=QuickSigns(), trainable="layers|frozen",
        estimator=estimator,
    )  # fmt: skip
    # Leaves before and after those that are perturbed, in a scan whose body is rematerialized.
    opt = zo.hybrid(rest, optax.sgd(0.5), "head|embedding")
    state = opt.init(PARAMS, 3)
    new, after, info = jax.jit(opt.step, static_argnums=0)(loss, PARAMS, state)
    if estimator.uses_base:
        places = [PARAMS, *(perturbed(rest, PARAMS, state.zeroth, i, 0.05) for i in range(2))]
    else:
        places = [
            perturbed(rest, PARAMS, state.zeroth, i, s) for i in range(2) for s in (0.05, -0.05)
        ]
    losses, grads = zip(*map(value_and_grad, places))
    if estimator.uses_base:
        slopes, grads = [(x - losses[0]) / 0.05 for x in losses[1:]], grads[:1]
    else:
        slopes = [(losses[i] - losses[i + 1]) / 0.1 for i in (0, 2)]
    np.testing.assert_allclose(info.coefficients, slopes, rtol=1e-3)
    mean = jax.tree.map(lambda *g: sum(x.astype(jnp.float32) for x in g) / len(g), *grads)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(new["embedding"], PARAMS["embedding"] - 0.5 * mean["embedding"])
    close(new["head"]["kernel"], PARAMS["head"]["kernel"] - 0.5 * mean["head"]["kernel"])
    # In bfloat16: its gradients, their mean and the result are rounded.
    bias = new["head"]["bias"].astype(jnp.float32)
    np.testing.assert_allclose(bias, -0.5 * mean["head"]["bias"], rtol=3 * 2**-7)
    with jax.disable_jit():
        expected = rest.apply(PARAMS, state.zeroth, info.record)[0]
    for name in ("layers", "frozen"):
        close(new[name], expected[name])
        assert not np.array_equal(new[name], PARAMS[name])
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, PARAMS)
    assert after.count == 1


def test_nothing_before_the_boundary_is_kept():
    layers, width, rows = 24, 32, 1024
    params = {"body": jnp.zeros((layers, width, width)), "head": jnp.zeros((width, 1))}
    x = jnp.zeros((rows, width))

    def deep(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["body"])
        return jnp.mean((x @ params["head"]) ** 2)

    def temporaries(fun, *args):
        return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes

    activation = rows * width * 4
    # Backpropagation keeps one for each layer.
    assert temporaries(jax.grad(deep), params, x) > layers * activation
    for estimator in (zo.zo_sgd(1e-3).estimator, OneSided()):
        opt = zo.hybrid(
            zo.zo_sgd(1e-3, noise=QuickSigns(), estimator=estimator), optax.sgd(1e-3), "head"
        )
        state = opt.init(params, 0)
        step = functools.partial(opt.step, deep)
        assert temporaries(step, params, state, x) < 6 * activation


def test_program_differentiates_no_zeroth_order_leaf():
    params = {"body": jnp.ones((7, 5)), "head": jnp.ones((5, 3))}

    def two(params):
        return jnp.sum(jnp.tanh(jnp.ones((2, 7)) @ params["body"]) @ params["head"])

    def products(choice):
        opt = zo.hybrid(zo.zo_sgd(1e-3, noise=QuickSigns()), optax.sgd(1e-3), choice)
        jaxpr = jax.make_jaxpr(functools.partial(opt.step, two))(params, opt.init(params, 0))
        return str(jaxpr).count("dot_general")

    # Forward 2. Behind the head: its gradient. Behind the body: that of tanh's result, and its own.
    assert products("head") == 3
    assert products("body") == 4


def test_low_bit_optimizer_for_the_head():
    params = {"body": 0.1 * jnp.ones((4, 64)), "head": 0.01 * jnp.ones((64, 128))}

    traced = []

    def two(params):
        traced.append(params)
        return jnp.mean((jnp.tanh(params["body"]) @ params["head"] - 1) ** 2)

    opt = zo.hybrid(zo.zo_sgd(1e-3, noise=QuickSigns()), optax_lowbit.adamw4bit(1e-2), "head")
    state = opt.init(params, 0)
    step = jax.jit(opt.step, static_argnums=0)
    start = two(params)
    for number in range(20):
        params, state, info = step(two, params, state)
        if number == 0:
            traces = len(traced)
    assert len(traced) == traces
    assert isinstance(state.first[0].mu["body"], optax.MaskedNode)
    assert state.first[0].mu["head"].codes.dtype == jnp.uint8
    assert info.loss < start / 2


def test_wrong_arguments():
    rest, tx = zo.zo_sgd(0.1), optax.sgd(0.1)
    with pytest.raises(ValueError, match="first_order='tail' must choose a float leaf"):
        zo.hybrid(rest, tx, "tail").init(PARAMS, 0)
    with pytest.raises(ValueError, match=r"first_order='\.' must leave a float leaf"):
        zo.hybrid(rest, tx, ".").init(PARAMS, 0)
    with pytest.raises(TypeError, match="first_order must choose leaves"):
        zo.hybrid(rest, tx, None)
    with pytest.raises(TypeError, match="optax transform"):
        zo.hybrid(rest, 0.1, "head")
    with pytest.raises(TypeError, match="ZeroOrderOptimizer"):
        zo.hybrid(tx, rest, "head")
    with pytest.raises(TypeError, match="Central"):
        zo.hybrid(zo.zo_sgd(0.1, estimator=ForwardGradient()), tx, "head")
    with pytest.raises(ValueError, match="probe_batch must be 1"):
        zo.hybrid(zo.zo_sgd(0.1, num_probes=2, probe_batch=2), tx, "head")
