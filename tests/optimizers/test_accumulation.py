"""Accumulated gradients: optax's where in float32, unbiased in few bits, the same on every mesh."""

import json
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import Policy, QuantSpec, accumulate, dequantize, is_quantized
from tests.optimizers.cases import (
    assert_bit_equal,
    assert_same_types,
    normal_tree,
    quantized_leaves,
    standard_promotion,
)

ALL = Policy(min_size=0)
SPEC = optax_lowbit.moments.presets.UNBIASED_8BIT


def collect():
    """A transform whose updates are what it is given, and whose state is the last of them."""

    def update(updates, state, params=None):
        del state, params
        return updates, updates

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def run(tx, params, grads):
    """All updates and states of the mini-steps."""
    state, update, results = tx.init(params), jax.jit(tx.update), []
    for step_grads in grads:
        updates, state = update(step_grads, state, params)
        results.append((updates, state))
    return results


def gradients(count, shapes=None, dtype=jnp.float32):
    return [normal_tree(shapes, seed=seed, dtype=dtype) for seed in range(1, count + 1)]


def growing(step):
    return step + 1


@pytest.mark.parametrize(
    ("every_k", "dtype"),
    [(1, jnp.float32), (3, jnp.bfloat16), (growing, jnp.float32)],
    ids=["1", "3-bfloat16", "growing"],
)
def test_small_leaves_are_optax_s_to_the_bit(every_k, dtype):
    shapes = {"matrix": (8, 128), "scalar": (), "vector": (5,)}
    params, grads = normal_tree(shapes, dtype=dtype), gradients(6, shapes, dtype)
    ours, theirs = (
        accumulate(optax.sgd(0.1, 0.9), every_k),
        optax.MultiSteps(optax.sgd(0.1, 0.9), every_k),
    )
    with standard_promotion():
        assert_bit_equal(ours.init(params), theirs.init(params))
        results, expected = run(ours, params, grads), run(theirs, params, grads)
    assert_bit_equal(results, expected)


@pytest.mark.parametrize("spec", [SPEC, jnp.bfloat16], ids=["8 bits", "bfloat16"])
def test_updates_are_zeros_until_the_last_mini_step(spec):
    params, grads = normal_tree(), gradients(5)
    results = run(accumulate(optax.sgd(1.0), 2, spec), params, grads)
    for number, (updates, state) in enumerate(results):
        assert bool(updates["matrix"].any()) == bool(number % 2)
        assert state.mini_step == (number + 1) % 2 and state.gradient_step == (number + 1) // 2
        assert_same_types(state, results[0][1])
    for leaf in jax.tree.leaves(results[3][1].acc_grads["matrix"]):
        assert not np.asarray(leaf, np.float32).any() or leaf.dtype == np.uint8
    expected = -(np.asarray(grads[2]["matrix"]) + np.asarray(grads[3]["matrix"])) / 2
    # One rounding, halved: by at most a gap, 2/127 of the block's largest, or 2**-7 of a value.
    assert np.abs(results[3][0]["matrix"] - expected).max() < 4.5 * 2 / 127 / 2


def test_the_inner_update_runs_in_the_last_mini_step_alone():
    calls = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    tx = accumulate(optax.GradientTransformation(lambda params: (), update), 3)
    run(tx, normal_tree(), gradients(6))
    jax.effects_barrier()
    assert len(calls) == 2


@pytest.mark.parametrize("spec", [SPEC, jnp.bfloat16], ids=["8 bits", "bfloat16"])
def test_the_mean_over_keys_is_the_mean_gradient(spec):
    """Five standard deviations, from the roundings' variance.

    The error of a mean of k gradients is the sum over n < k of n/k times that of rounding number n,
    which has mean 0 given those before and a variance of at most gap**2 / 4. A gap of the table is
    (2 i + 1) / 127**2 < 2 / 127 of the block's largest value; one of bfloat16 at most 2**-7 of the
    value itself. Values are at most `largest`, the largest of all gradients.
    """
    count, keys = 6, 2000
    grads = jnp.asarray(np.random.default_rng(0).standard_t(4, (count, 2, 64)), jnp.float32)

    def mean_by(key):
        tx = accumulate(optax.identity(), count, spec, policy=ALL, key=key)

        def body(state, grad):
            updates, state = tx.update(grad, state)
            return state, updates

        return jax.lax.scan(body, tx.init(grads[0]), grads)[1][-1]

    means = jax.jit(lambda keys: jax.lax.map(mean_by, keys, batch_size=100))(
        jax.random.split(jax.random.key(0, impl="threefry2x32"), keys)
    )
    exact = np.asarray(grads, np.float64).mean(0)
    gap = np.abs(grads).max() * (2 / 127 if spec is SPEC else 2**-7)
    weights = np.sum((np.arange(1, count) / count) ** 2)
    deviation = np.sqrt(weights * gap**2 / 4 / keys)
    error = np.asarray(means, np.float64).mean(0) - exact
    assert np.abs(error).max() < 5 * deviation
    # And of all elements, whose errors are independent.
    assert abs(error.mean()) < 5 * deviation / np.sqrt(error.size)
    assert np.std(means, axis=0).max() > 0.1 * deviation * np.sqrt(keys), "there is noise"


def test_zeros_stay_zeros_and_draws_differ_from_mini_step_to_mini_step():
    grad = normal_tree()["matrix"].at[:, ::2].set(0)
    tx = accumulate(collect(), 4, policy=ALL)
    states = [state.acc_grads for _, state in run(tx, grad, [grad] * 7)]
    floats = [np.asarray(dequantize(q)) for q in states]
    assert not any(x[:, ::2].any() for x in floats)
    # The first of four, and the first of the next four: the same gradient, other draws.
    assert (floats[0] != floats[4]).mean() > 0.1
    errors = [x - np.asarray(grad) for x in floats[:2]]
    assert abs(np.corrcoef(errors[0].ravel(), (errors[1] - errors[0] / 2).ravel())[0, 1]) < 0.1
    again = [state.acc_grads for _, state in run(tx, grad, [grad] * 7)]
    assert_bit_equal(again, states)
    other = run(accumulate(collect(), 4, policy=ALL, key=1), grad, [grad])[0][1].acc_grads
    assert (dequantize(other) != floats[0]).mean() > 0.1


def test_a_nan_is_gone_with_its_step():
    params, grads = normal_tree(), gradients(4)
    grads[0] = {**grads[0], "matrix": grads[0]["matrix"].at[3, 5].set(jnp.nan)}
    results = run(accumulate(optax.sgd(1.0), 2), params, grads)
    assert jnp.isnan(results[1][0]["matrix"]).any()
    assert jnp.isfinite(results[3][0]["matrix"]).all()


def test_extra_arguments_and_parameters_reach_the_inner_transform():
    def update(updates, state, params=None, *, factor, label, **others):
        assert label == "static" and not others
        return jax.tree.map(lambda u, p: factor * u + p, updates, params), state

    tx = accumulate(optax.GradientTransformationExtraArgs(lambda params: (), update), 1)
    params, grads = normal_tree(), gradients(1)[0]
    updates, _ = jax.jit(lambda g, s, p: tx.update(g, s, p, factor=2.0, label="static"))(
        grads, tx.init(params), params
    )
    np.testing.assert_allclose(updates["matrix"], 2 * grads["matrix"] + params["matrix"], rtol=1e-6)


def test_one_compilation_and_a_scan(caplog):
    tx = accumulate(optax_lowbit.sgd4bit(1e-2, 0.9), 2)
    params, grads = normal_tree(), gradients(3)
    update = jax.jit(tx.update)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        _, state = update(grads[0], tx.init(params), params)
        if "Finished XLA compilation of jit(update_fn)" not in caplog.text:
            pytest.fail("JAX logs compilations in another way")
        caplog.clear()
        looped = [state]
        for step_grads in grads[1:]:
            looped.append(update(step_grads, looped[-1], params)[1])
    assert "Finished XLA compilation" not in caplog.text

    def body(state, step_grads):
        updates, state = tx.update(step_grads, state, params)
        return state, updates

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    scanned, _ = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(tx.init(params), stacked)
    assert_same_types(scanned, tx.init(params))
    assert scanned.gradient_step == 1 and scanned.mini_step == 1
    assert_bit_equal(scanned.acc_grads, looped[-1].acc_grads)


@pytest.mark.parametrize(
    ("spec", "axis_type"),
    [(SPEC, AxisType.Auto), (SPEC, AxisType.Explicit), (jnp.bfloat16, AxisType.Auto)],
    ids=["8 bits", "8 bits-explicit", "bfloat16"],
)
def test_on_eight_devices_the_bits_are_the_same_without_traffic(spec, axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    place = NamedSharding(mesh, PartitionSpec("a", "b"))
    tx = accumulate(optax.sgd(0.1), 2, spec)
    grads = [np.asarray(normal_tree({"w": (64, 1024)}, seed=s)["w"]) for s in (1, 2, 3)]
    params = jnp.ones((64, 1024))
    expected = run(tx, params, grads)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, place)
        spread_grads = [jax.device_put(g, place) for g in grads]
        state = tx.init(spread)
        results = run(tx, spread, spread_grads)
        text = jax.jit(tx.update).lower(spread_grads[0], state, spread).compile().as_text()
        assert jax.tree.map(jax.typeof, results[-1][1]) == jax.tree.map(jax.typeof, state)
        assert jax.tree.leaves(results[0][1].acc_grads)[0].sharding.is_equivalent_to(place, 2)
    assert "all-" not in text and "collective" not in text
    assert_bit_equal(*(jax.tree.map(np.asarray, x) for x in (results, expected)))


def state_bytes(tx, params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params).acc_grads))


def test_bytes_of_the_accumulator():
    params = jnp.ones((512, 1024))
    for spec, each in ((SPEC, 1 + 4 / 256), (jnp.bfloat16, 2), (None, 4)):
        tx = accumulate(optax.sgd(0.1), 4, spec)
        assert state_bytes(tx, params) == each * params.size
        (decision,) = optax_lowbit.describe(tx, params).decisions
        assert decision.moment == "acc_grads" and decision.nbytes == each * params.size
    assert state_bytes(optax.MultiSteps(optax.sgd(0.1), 4), params) == 4 * params.size
    text = str(optax_lowbit.describe(accumulate(optax.sgd(0.1), 4, jnp.bfloat16), params))
    assert "bfloat16" in text


MEASURE = """
import json, jax, jax.numpy as jnp, optax, optax_lowbit
params = jax.ShapeDtypeStruct((2048, 2048), "float32")

def temporaries(tx):
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * 2048**2)

inner = optax_lowbit.lion8bit(1e-3)
print(json.dumps({
    "8 bits": temporaries(optax_lowbit.accumulate(inner, 4)),
    "MultiSteps": temporaries(optax.MultiSteps(inner, 4)),
}))
"""


def test_temporaries_are_those_of_a_tile():
    """As a share of the gradients' bytes, with gradients and state donated."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE],
        capture_output=True,
        text=True,
        check=True,
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        timeout=300,
    )
    measured = json.loads(process.stdout.splitlines()[-1])
    assert measured["8 bits"] < 0.05 < measured["MultiSteps"], measured


def test_rules_and_odd_trees():
    policy = Policy(min_size=0, rules=[("kept", None), ("four", {"acc_grads": SIGNED_4BIT})])
    params = {
        "kept": jnp.ones((64, 256)),
        "four": jnp.ones((64, 256)),
        "none": None,
        "empty": jnp.zeros((0, 8)),
        "scalar": jnp.ones(()),
        "odd": jnp.ones((65, 131), jnp.bfloat16),
    }
    for spec in (SPEC, jnp.bfloat16):
        tx = accumulate(optax.sgd(0.1), 2, spec, policy=policy)
        state = tx.init(params)
        updates, new_state = jax.eval_shape(tx.update, params, state, params)
        assert_same_types(updates, params)
        assert_same_types(new_state, state)
        acc = state.acc_grads
        assert acc["kept"].dtype == jnp.float32 and acc["four"].spec.bits == 4
        assert is_quantized(acc["odd"]) if spec is SPEC else acc["odd"].dtype == jnp.bfloat16
        run(tx, {}, [{}])


SIGNED_4BIT = QuantSpec(codebook="integer", bits=4, signed=True, scaling="block")
UNSIGNED = QuantSpec(codebook="linear", bits=8, signed=False, scaling="block")


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((0,), {}, ValueError, "every_k must be at least 1, got 0"),
        ((2.0,), {}, TypeError, "every_k must be an int or a function"),
        ((True,), {}, TypeError, "every_k must be an int or a function"),
        ((2, UNSIGNED), {}, ValueError, "spec must be signed"),
        ((2, jnp.float16), {}, TypeError, "spec must be a QuantSpec, jnp.bfloat16 or None"),
        ((2, "8bit"), {}, TypeError, "spec must be a QuantSpec, jnp.bfloat16 or None"),
        ((2, jnp.bfloat16), {"key": None}, ValueError, "key must be given"),
        ((2,), {"key": None}, ValueError, "key must be given"),
        ((2,), {"key": "seed"}, TypeError, "key must be"),
        ((2,), {"policy": {}}, TypeError, "policy must be a Policy"),
        (
            (2,),
            {"policy": Policy(rules=[("w", {"mu": None})])},
            ValueError,
            r"name the moments \['mu'\], and there are \['acc_grads'\]",
        ),
    ],
)
def test_impossible_arguments_are_refused_at_construction(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        accumulate(optax.sgd(0.1), *arguments, **keywords)


def test_it_wraps_low_bit_and_other_transforms():
    tx = optax.chain(optax.clip(9.0), accumulate(optax_lowbit.sgd4bit(1e-2, 0.9), 2))
    params, grads = normal_tree(), gradients(2)
    results = run(tx, params, grads)
    assert results[1][0]["matrix"].all()
    assert len(quantized_leaves(results[1][1])) == 2
    assert_bit_equal(optax.tree.map_params(tx, lambda x: x, results[1][1]), results[1][1])
