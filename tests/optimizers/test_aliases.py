"""Lion, AdEMAMix, RMSProp, Adagrad: optax's without quantization; what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import Policy, QuantSpec, dequantize, is_quantized
from tests.optimizers.cases import (
    FOUR,
    assert_bit_equal,
    assert_same_types,
    normal_tree,
    quantized_leaves,
    run_steps,
    standard_promotion,
)

EIGHT = QuantSpec(
    codebook="dynamic_exponent", bits=8, signed=False, scaling="block", block_size=256
)
STOCHASTIC = dataclasses.replace(EIGHT, rounding="stochastic")
SHAPES = {"matrix": (64, 128), "bias": (64,), "scalar": ()}


def decay_schedule(count):
    return 0.1 / (1.0 + count)


# Ours, optax's, what turns quantization off, arguments.
LION = (optax_lowbit.lion8bit, optax.lion, ("mu_spec",))
ADEMAMIX = (optax_lowbit.ademamix4bit, optax.contrib.ademamix, ("m1_spec", "m2_spec", "nu_spec"))
RMSPROP = (optax_lowbit.rmsprop8bit, optax.rmsprop, ("mu_spec", "nu_spec", "trace_spec"))
ADAGRAD = (optax_lowbit.adagrad8bit, optax.adagrad, ("sum_of_squares_spec",))
VARIANTS = {
    "lion4bit": ((optax_lowbit.lion4bit, *LION[1:]), {"b1": 0.8, "weight_decay": 0.1}),
    "lion": (LION, {"b2": 0.95, "weight_decay": decay_schedule}),
    "ademamix": (ADEMAMIX, {"weight_decay": 0.1, "eps_root": 1e-3}),
    "ademamix-schedules": (ADEMAMIX, {"b3": decay_schedule, "alpha": decay_schedule}),
    "rmsprop": (RMSPROP, {"initial_scale": 0.5}),
    "rmsprop-corrected": (RMSPROP, {"bias_correction": True, "eps_in_sqrt": False}),
    "rmsprop-centered": (RMSPROP, {"centered": True, "initial_scale": 1.0}),
    "rmsprop-centered-corrected": (RMSPROP, {"centered": True, "bias_correction": True}),
    "adagrad": (ADAGRAD, {}),
    "adagrad-1": (ADAGRAD, {"initial_accumulator_value": 1.0, "eps": 1e-3}),
}
each_variant = pytest.mark.parametrize(
    ("optimizer", "arguments"), VARIANTS.values(), ids=VARIANTS.keys()
)


@each_variant
def test_without_quantization_it_is_optax_to_the_bit(optimizer, arguments):
    factory, reference, specs = optimizer
    params = normal_tree(SHAPES)
    grads = [normal_tree(SHAPES, seed=seed) for seed in (1, 2, 3)]
    tx, expected_tx = (
        factory(1e-2, **dict.fromkeys(specs), **arguments),
        reference(1e-2, **arguments),
    )
    with standard_promotion():
        assert_bit_equal(tx.init(params), expected_tx.init(params))
        result = run_steps(jax.jit(tx.update), tx.init(params), params, grads)
        expected = run_steps(jax.jit(expected_tx.update), expected_tx.init(params), params, grads)
    assert_bit_equal(result, expected)


def test_without_quantization_momentum_is_optax_s_to_the_bit():
    """Its state has a count besides."""
    arguments = {"centered": True, "momentum": 0.9, "nesterov": True}
    tx = optax_lowbit.rmsprop8bit(1e-2, **arguments, **dict.fromkeys(RMSPROP[2]))
    expected_tx = optax.rmsprop(1e-2, **arguments)
    params, grads = normal_tree(SHAPES), [normal_tree(SHAPES, seed=seed) for seed in (1, 2)]
    with standard_promotion():
        updates, state = run_steps(jax.jit(tx.update), tx.init(params), params, grads)
        expected, expected_state = run_steps(
            jax.jit(expected_tx.update), expected_tx.init(params), params, grads
        )
    assert_bit_equal(updates, expected)
    assert_bit_equal(state[0], expected_state[0])
    assert_bit_equal(state[2].trace, expected_state[2].trace)


@each_variant
def test_low_bit_states_are_of_optax_s_own_types(optimizer, arguments):
    factory, reference, _ = optimizer
    params = normal_tree(SHAPES)
    state = jax.eval_shape(factory(1e-2, **arguments).init, params)
    expected = jax.eval_shape(reference(1e-2, **arguments).init, params)
    assert [type(s) for s in state] == [type(s) for s in expected]
    for name in set(state[0]._fields) - {"count", "count_m2"}:
        assert is_quantized(getattr(state[0], name)["matrix"])


@pytest.mark.parametrize("name", ["lion", "ademamix", "rmsprop-centered", "adagrad"])
def test_they_run_masked_and_accumulated(name):
    (factory, *_), arguments = VARIANTS[name]
    params, grads = normal_tree(), normal_tree(seed=1)
    inner = optax.masked(factory(1e-2, **arguments), {"matrix": True, "bias": False})
    tx = optax.MultiSteps(inner, every_k_schedule=2)

    @jax.jit
    def two_steps(params, state):
        first, state = tx.update(grads, state, params)
        return first, tx.update(grads, state, params)

    with standard_promotion():
        state = tx.init(params)
        first, (second, new_state) = two_steps(params, state)
    assert not first["matrix"].any() and second["matrix"].all()
    np.testing.assert_array_equal(second["bias"], grads["bias"])
    assert quantized_leaves(state)
    assert_same_types(new_state, state)


# Accumulators that start at other values than zero.


def test_accumulators_start_at_the_initial_value_to_the_bit():
    params = {"matrix": jnp.ones((65, 300)), "vector": jnp.ones(5000), "bias": jnp.ones(3)}
    for tx, name, value in (
        (optax_lowbit.adagrad8bit(1e-2), "sum_of_squares", 0.1),
        (optax_lowbit.adagrad8bit(1e-2, 0.0), "sum_of_squares", 0.0),
        (optax_lowbit.rmsprop8bit(1e-2, initial_scale=2.5, centered=True), "nu", 2.5),
        (optax_lowbit.rmsprop8bit(1e-2, nu_spec=None, initial_scale=2.5), "nu", 2.5),
    ):
        for state in (tx.init(params), jax.jit(tx.init)(params)):
            for leaf in getattr(state[0], name).values():
                x = dequantize(leaf) if is_quantized(leaf) else leaf
                np.testing.assert_array_equal(x, np.full(x.shape, value, np.float32))


def test_an_injected_initial_value_is_honoured():
    tx = optax.inject_hyperparams(optax_lowbit.adagrad8bit)(1e-2, initial_accumulator_value=0.7)
    state = tx.init(jnp.ones((64, 128)))
    total = dequantize(state.inner_state[0].sum_of_squares)
    np.testing.assert_array_equal(total, np.full((64, 128), np.float32(0.7)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x")], ids=str)
def test_sharded_it_has_the_same_bits_from_the_start_without_traffic(spec, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    tx = optax_lowbit.adagrad8bit(1e-2)
    grad = np.random.default_rng(0).normal(size=(64, 2048)).astype(np.float32)
    first = tx.init(jnp.asarray(grad))
    expected = jax.jit(tx.update)(grad, first, grad)
    with jax.set_mesh(mesh):
        spread = jax.device_put(grad, NamedSharding(mesh, spec))
        state = tx.init(spread)
        codes = state[0].sum_of_squares.codes
        assert codes.sharding.is_equivalent_to(spread.sharding, 2)
        compiled = jax.jit(tx.update).lower(spread, state, spread).compile()
        result = compiled(spread, state, spread)
        assert jax.tree.map(jax.typeof, result[1]) == jax.tree.map(jax.typeof, state)
    assert "all-" not in compiled.as_text() and "collective" not in compiled.as_text()
    assert_bit_equal(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, first))
    assert_bit_equal(jax.tree.map(np.asarray, result), jax.tree.map(np.asarray, expected))


# Centered RMSProp: the difference of two rounded numbers.


def test_centered_updates_are_finite_where_gradients_hardly_vary():
    """Of constant gradients, and of such with noise of 1/1000."""
    tx = optax_lowbit.rmsprop8bit(1.0, centered=True, policy=Policy(min_size=0), eps=0.0)
    rng = np.random.default_rng(0)
    constant = jnp.asarray(rng.normal(size=(8, 256)), jnp.float32)
    update = jax.jit(tx.update)
    state = tx.init(constant)
    negative = 0
    for _ in range(30):
        noise = jnp.asarray(1 + 1e-3 * rng.normal(size=(8, 256)), jnp.float32)
        noise = noise.at[::2].set(1.0)
        updates, state = update(constant * noise, state, constant)
        assert jnp.isfinite(updates).all()
        mu, nu = dequantize(state[0].mu), dequantize(state[0].nu)
        negative += int((nu < mu**2).sum())
    assert negative > 0, "there is something to mend"


# Rounding at random, in states with and without a count.


@pytest.mark.parametrize(
    ("tx", "state_type"),
    [
        (optax_lowbit.adagrad8bit(1.0, key=0), "ScaleByRssWithCountState"),
        (optax_lowbit.adagrad8bit(1.0), "ScaleByRssState"),
        (optax_lowbit.rmsprop8bit(1.0, key=0), "ScaleByRmsWithCountState"),
        (optax_lowbit.rmsprop8bit(1.0), "ScaleByRmsState"),
        (optax_lowbit.rmsprop8bit(1.0, centered=True, key=0), "ScaleByRStdDevWithCountState"),
        (optax_lowbit.rmsprop8bit(1.0, centered=True), "ScaleByRStdDevState"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_key_needs_a_count(tx, state_type):
    params = jnp.ones((64, 128))
    state = tx.init(params)
    assert type(state[0]).__name__ == state_type
    _, new_state = jax.jit(tx.update)(params, state, params)
    assert_same_types(new_state, state)
    assert optax.tree.get(new_state, "count", 1) == 1


def test_sums_go_on_growing_if_rounded_at_random():
    """A growth of 1/1000 a step, far below half a gap of the table, 0.0035 times a scale of 2."""
    grad = jnp.full((8, 512), np.sqrt(1e-3), jnp.float32).at[:, ::256].set(0)

    def after(steps, **arguments):
        tx = optax_lowbit.adagrad8bit(1.0, 1.0, policy=Policy(min_size=0), **arguments)

        def body(state, _):
            return tx.update(grad, state)[1], None

        start = tx.init(grad)
        total = jnp.ones((8, 512)).at[:, ::256].set(2.0)  # so the scales are 2, and stay
        total = optax_lowbit.quantize(total, start[0].sum_of_squares.spec, key=0)
        start = (start[0]._replace(sum_of_squares=total), *start[1:])
        state, _ = jax.jit(lambda s: jax.lax.scan(body, s, length=steps))(start)
        return np.asarray(dequantize(state[0].sum_of_squares), np.float64)[:, 1:256]

    np.testing.assert_array_equal(after(300), after(0))
    # The table's values are 0.9 / 128 apart, times 2. The variance of one rounding is at most
    # gap**2 / 4; 2040 elements were rounded 301 times.
    deviation = np.sqrt(301 / 2040) * 0.9 / 128 * 2 / 2
    random = after(300, sum_of_squares_spec=STOCHASTIC, key=0)
    assert abs(random.mean() - 1.3) < 5 * deviation


def test_the_slow_average_of_ademamix_is_not_lost():
    """It follows gradients of which it takes in one hundredth a step; 4 bits to nearest do not."""
    signal = 0.1 * jax.random.normal(jax.random.key(0), (8, 256))

    def correlation(**arguments):
        tx = optax_lowbit.ademamix4bit(1.0, b3=0.99, policy=Policy(min_size=0), **arguments)

        def body(carry, step):
            state, m2 = carry
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), signal.shape)
            grad = noise + jnp.where(step < 400, signal, -signal)
            return (tx.update(grad, state, signal)[1], 0.99 * m2 + 0.01 * grad), None

        start = (tx.init(signal), jnp.zeros(signal.shape))
        (state, m2), _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(800)))(start)
        return np.corrcoef(np.ravel(dequantize(state[0].m2)), np.ravel(m2))[0, 1]

    assert correlation() > 0.95
    assert correlation(m2_spec=FOUR) < 0.5


# Policies and wrong arguments.


def test_a_rule_may_name_the_moments_of_both_parts_of_rmsprop():
    policy = Policy(rules=[("a", {"nu": None, "trace": FOUR}), ("b", {"trace": None})])
    tx = optax_lowbit.rmsprop8bit(1e-2, momentum=0.9, policy=policy)
    state = jax.eval_shape(tx.init, {"a": jnp.ones((64, 128)), "b": jnp.ones((64, 128))})
    nu, trace = state[0].nu, state[2].trace
    assert not is_quantized(nu["a"]) and nu["b"].spec.bits == 8
    assert trace["a"].spec == FOUR and not is_quantized(trace["b"])


SIGNED_NU = QuantSpec(codebook="linear", bits=4, signed=True, scaling="block")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optax_lowbit.lion4bit(1e-3, mu_spec=EIGHT), ValueError, "mu_spec must be signed"),
        (lambda: optax_lowbit.lion8bit(1e-3, mu_spec=8), TypeError, "mu_spec must be a QuantSpec"),
        (
            lambda: optax_lowbit.ademamix4bit(1e-3, key=None),
            ValueError,
            "key must be given .* for stochastic rounding",
        ),
        (
            lambda: optax_lowbit.adagrad8bit(1e-3, sum_of_squares_spec=STOCHASTIC),
            ValueError,
            "key must be given",
        ),
        (lambda: optax_lowbit.adagrad8bit(1e-3, key="seed"), TypeError, "key must be"),
        (
            lambda: optax_lowbit.adagrad8bit(1e-3, policy=Policy(rules=[("w", {"nu": None})])),
            ValueError,
            r"name the moments \['nu'\], and there are \['sum_of_squares'\]",
        ),
        (
            lambda: optax_lowbit.rmsprop8bit(
                1e-3, momentum=0.9, policy=Policy(rules=[("w", {"trac": None})])
            ),
            ValueError,
            r"name the moments \['trac'\]",
        ),
        (
            lambda: optax_lowbit.rmsprop8bit(1e-3, momentum=0.9, policy={}),
            TypeError,
            "policy must be a Policy",
        ),
    ],
)
def test_impossible_arguments_are_refused_at_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("mask", [None, {"matrix": True, "bias": False}], ids=["all", "mask"])
def test_fused_apply_knows_scheduled_weight_decay(mask):
    tx = optax_lowbit.lion8bit(1e-2, weight_decay=decay_schedule, mask=mask)
    params, grads = normal_tree(), normal_tree(seed=1)
    state = fused_state = tx.init(params)
    fused_params = params
    fused = jax.jit(functools.partial(optax_lowbit.fused_apply, tx))
    update = jax.jit(tx.update)
    for _ in range(2):
        with standard_promotion():
            fused_params, fused_state = fused(grads, fused_state, fused_params)
            updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert_bit_equal(fused_state, state)
    for name in params:
        np.testing.assert_allclose(fused_params[name], params[name], rtol=1e-5, atol=1e-6)


def test_odd_trees():
    params = {"a": None, "empty": jnp.zeros((0, 8)), "odd": jnp.ones((65, 131)), "one": jnp.ones(1)}
    for factory in (optax_lowbit.adagrad8bit, optax_lowbit.lion4bit):
        tx = factory(1e-2, policy=Policy(min_size=0))
        for tree in (params, {}):
            state = tx.init(tree)
            updates, new_state = jax.jit(tx.update)(tree, state, tree)
            assert_same_types(updates, tree)
            assert_same_types(new_state, state)
