"""State on the host inside and outside of other transforms, and what it is refused for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

import optax_lowbit
from optax_lowbit import offload
from tests.offload_cases import HOST, ONE_PAGED, expected_kinds, kinds, tree
from tests.optimizers.cases import (
    assert_bit_equal,
    assert_equal_up_to_rounding,
    normal_tree,
    standard_promotion,
)

MIXED = {
    "prodigy": (optax.contrib.prodigy, r"\.grad_sum\['a'\], \.grad_sum\['b'\]"),
    "lbfgs": (optax.scale_by_lbfgs, r"\.params\['a'\].*, \.\.\., so all"),
    "multi-steps": (lambda: optax.MultiSteps(optax.adam(0.1), 2), "inner_opt_state"),
    "clipped-momentum": (
        lambda: optax.chain(optax.trace(0.9), optax.clip_by_global_norm(1.0)),
        r"\[0\]\.trace\['a'\], \[0\]\.trace\['b'\]",
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_transforms_that_mix_leaves_are_refused_at_init(name):
    make, arrays = MIXED[name]
    params = {"a": jnp.ones(5000), "b": jnp.ones(5000)}
    with standard_promotion(), pytest.raises(ValueError, match=rf"tx can't be offl.*{arrays}"):
        offload(make()).init(params)


def test_transforms_with_extra_arguments_are_refused_at_update():
    params = {"a": jnp.ones(5000), "b": jnp.ones(5000)}
    tx = offload(optax.lbfgs())

    def update(params, state):
        def value_fn(params):
            return jnp.sum(params["a"]) + jnp.sum(params["b"])

        return tx.update(
            params, state, params, value=value_fn(params), grad=params, value_fn=value_fn
        )

    with standard_promotion():
        state = tx.init(params)
        with pytest.raises(ValueError, match="tx can't be offloaded"):
            jax.eval_shape(update, params, state)


def test_extra_arguments_reach_the_transform():
    def update(updates, state, params, *, factor, tree):
        del params
        return jax.tree.map(lambda u, s, t: u * factor + s + t, updates, state, tree), updates

    tx = optax.GradientTransformationExtraArgs(lambda p: jax.tree.map(jnp.zeros_like, p), update)
    params = {"a": jnp.ones(5000), "b": jnp.ones(10)}
    paged = offload(tx)
    extra = {"factor": jnp.float32(2), "tree": params}
    state = paged.init(params)
    for _ in range(2):
        updates, state = jax.jit(paged.update)(params, state, params, **extra)
    assert kinds(state) == [HOST, "device"]
    assert all((x == 4).all() for x in jax.tree.leaves(updates))


MASK = {"bias": True, "first": True}
WRAPPERS = {
    "masked outside": lambda tx, page: optax.masked(page(tx), MASK),
    "masked inside": lambda tx, page: page(optax.masked(tx, MASK)),
    "chain": lambda tx, page: optax.chain(optax.clip_by_global_norm(1.0), page(tx)),
    "multi-steps": lambda tx, page: optax.MultiSteps(page(tx), 2),
    "if finite": lambda tx, page: optax.apply_if_finite(page(tx), 3),
    "partition": lambda tx, page: optax.partition(
        {True: page(tx), False: optax.sgd(0.1)}, lambda p: {k: MASK[k] for k in p}
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper):
    make, params = WRAPPERS[wrapper], normal_tree(ONE_PAGED)
    tx = optax_lowbit.sgd8bit(1e-2, momentum=0.9)
    results = []
    for wrapped in (make(tx, lambda tx: tx), make(tx, functools.partial(offload, min_size=1000))):
        update = jax.jit(wrapped.update)
        with standard_promotion():
            state = wrapped.init(params)
            for seed in (1, 2):
                updates, state = update(normal_tree(ONE_PAGED, seed), state, params)
        results.append((updates, state))
    expected, actual = results
    assert_bit_equal(actual, expected)
    assert set(kinds(actual[1])) == {"device", HOST} and set(kinds(expected[1])) == {"device"}


def test_vmap_over_an_ensemble():
    tx = optax_lowbit.sgd8bit(1e-2, momentum=0.9)
    paged = offload(tx, min_size=1000)
    members = jax.tree.map(lambda *x: jnp.stack(x), *(normal_tree(ONE_PAGED, i) for i in range(2)))
    expected = jax.jit(jax.vmap(tx.update))(members, jax.vmap(tx.init)(members), members)
    state = jax.vmap(paged.init)(members)
    assert HOST in kinds(state)
    actual = jax.jit(jax.vmap(paged.update))(members, state, members)
    assert_bit_equal(actual, expected)
    assert kinds(actual[1]) == kinds(state)


def test_scan_over_steps():
    tx, params = offload(optax_lowbit.sgd8bit(1e-2, momentum=0.9)), tree()
    grads = [tree(seed) for seed in range(3)]
    state = tx.init(params)
    update = jax.jit(tx.update)

    @jax.jit
    def scanned(state, grads):
        return jax.lax.scan(lambda s, grad: tx.update(grad, s, params)[::-1], state, grads)

    scanned_state, updates = scanned(state, jax.tree.map(lambda *x: jnp.stack(x), *grads))
    assert kinds(scanned_state) == expected_kinds(scanned_state)
    for step, grad in enumerate(grads):
        expected, state = update(grad, state, params)
        actual = jax.tree.map(lambda x, step=step: x[step], updates)
        assert_equal_up_to_rounding(actual, expected)


def test_fused_apply_writes_parameters_leaf_by_leaf():
    tx, params = optax_lowbit.adamw4bit(1e-2), tree()
    paged = offload(tx)
    step = jax.jit(functools.partial(optax_lowbit.fused_apply, tx))
    expected = step(tree(1), tx.init(params), params)
    step = jax.jit(functools.partial(optax_lowbit.fused_apply, paged), donate_argnums=(1, 2))
    actual = step(tree(1), paged.init(params), tree())
    assert_bit_equal(actual, expected)
    assert kinds(actual[1]) == expected_kinds(actual[1])


def test_nnx_optimizer():
    def train(tx):
        model = nnx.Linear(64, 128, use_bias=False, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda model: jnp.sum(model.kernel[...] ** 2))(model)
            optimizer.update(model, grads)

        for _ in range(2):
            step(model, optimizer)
        return nnx.to_pure_dict(nnx.state(model)), nnx.state(optimizer, nnx.optimizer.OptState)

    with standard_promotion():
        expected, _ = train(optax.adamw(1e-2))
        actual, state = train(offload(optax.adamw(1e-2)))
    # Updates of 1e-2 are rounded before they are added, if they come out of a loop.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), actual, expected
    )
    assert kinds(state) == expected_kinds(state)
