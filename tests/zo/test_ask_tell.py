"""Steps whose loss is evaluated elsewhere, against those whose loss is a JAX function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo
from optax_lowbit.zo.estimators import ForwardGradient, OneSided
from tests.zo.quick_noise import QuickSigns

# Eighths and small sums of their squares are exact in float32: results must be equal, not close.
PARAMS = {"a": jnp.arange(6.0).reshape(2, 3) / 8, "b": jnp.asarray(0.5), "n": jnp.arange(2)}


def loss(params):
    return jnp.sum(params["a"] ** 2) * params["b"]


def plain_loss(params):
    return float((np.asarray(params["a"]) ** 2).sum() * np.asarray(params["b"]))


@pytest.mark.parametrize("opt", [
    zo.zo_sgd(0.5, eps=0.125, num_probes=2, noise=QuickSigns()),
    zo.zo_sgd(0.5, eps=0.125, num_probes=2, noise=QuickSigns(), estimator=OneSided()),
], ids=["central", "one-sided"])  # fmt: skip
def test_step_is_the_same(opt):
    with jax.disable_jit():
        state = opt.init(PARAMS, 1)._replace(count=jnp.int32(3))
        expected, expected_state, expected_info = opt.step(loss, PARAMS, state)
        candidates = [opt.ask(PARAMS, state, i) for i in range(opt.evaluations)]
        told, told_state, info = opt.tell(PARAMS, state, [plain_loss(c) for c in candidates])
    jax.tree.map(np.testing.assert_array_equal, told, expected)
    jax.tree.map(np.testing.assert_array_equal, told_state, expected_state)
    jax.tree.map(np.testing.assert_array_equal, info, expected_info)
    assert not np.array_equal(told["a"], PARAMS["a"])
    offsets = [c["a"] - PARAMS["a"] for c in candidates]
    if opt.estimator.uses_base:
        assert opt.evaluations == 3 and not offsets[0].any()
        offsets = offsets[1:]
    else:
        assert opt.evaluations == 4
        np.testing.assert_array_equal(offsets[0], -offsets[1])
    assert all((np.abs(offset) == 0.125).all() for offset in offsets)
    assert not np.array_equal(offsets[0], offsets[-1])


def test_number_may_be_traced():
    opt = zo.zo_sgd(0.5, eps=0.125)
    state = opt.init(PARAMS, 1)
    traced = []

    @jax.jit
    def ask(params, state, number):
        traced.append(number)
        return opt.ask(params, state, number)

    up, down = ask(PARAMS, state, 0), ask(PARAMS, state, jnp.int32(1))
    assert len(traced) <= 2
    jax.tree.map(lambda x, y, z: np.testing.assert_array_equal(x + y, 2 * z), up, down, PARAMS)
    assert up["a"].dtype == PARAMS["a"].dtype
    np.testing.assert_array_equal(up["n"], PARAMS["n"])


def test_reward_that_is_no_number_moves_nothing():
    opt = zo.zo_sgd(0.5, noise=QuickSigns())
    with jax.disable_jit():
        new, state, _ = opt.tell(PARAMS, opt.init(PARAMS, 1), [float("nan"), 1.0])
    jax.tree.map(np.testing.assert_array_equal, new, PARAMS)
    assert state.count == 1


def test_wrong_arguments():
    opt = zo.zo_sgd(0.5)
    state = opt.init(PARAMS, 1)
    with pytest.raises(ValueError, match="number must be from 0 to 1, got 2"):
        opt.ask(PARAMS, state, 2)
    with pytest.raises(ValueError, match=r"losses must be of shape \(2,\), got \(3,\)"):
        opt.tell(PARAMS, state, [1.0, 2.0, 3.0])
    forward = dataclasses.replace(opt, estimator=ForwardGradient())
    for call in (
        lambda: forward.ask(PARAMS, state, 0),
        lambda: forward.tell(PARAMS, state, [1.0, 2.0]),
        lambda: forward.evaluations,
    ):
        with pytest.raises(TypeError, match="Central"):
            call()
