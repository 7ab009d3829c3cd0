"""Weights of 24 bits: exact over all of bfloat16, small updates kept, the same on every mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import (
    CorrectedBfloat16State,
    correct_bfloat16,
    describe,
    join_bfloat16,
    split_bfloat16,
)
from tests.optimizers.cases import assert_bit_equal, assert_same_types, standard_promotion

# Every bfloat16: all signs, exponents and fractions, zeros, subnormals, infinities and NaN.
ALL_BITS = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
LEAST_NORMAL = 2.0**-126


def bits(x):
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16))


def exact(params, correction):
    """The weights in float64, from the definition: bits of a magnitude, upper and rest."""
    upper = bits(params).astype(np.int64)
    magnitude = ((upper & 0x7FFF) << 16) + (np.asarray(correction).astype(np.int64) << 8)
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = magnitude.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(upper >> 15, -values, values)


@jax.jit
def step(params, state, update):
    """What a training step does, and what it says the parameters will be."""
    updates, state = correct_bfloat16().update(update, state, params)
    with standard_promotion():
        return optax.apply_updates(params, updates), state, updates


def all_parameters():
    return jax.lax.bitcast_convert_type(jnp.asarray(ALL_BITS), jnp.bfloat16)


def random_corrections(rng, params):
    """Any there may be: of magnitudes of 0 none is negative, and of others than numbers none."""
    correction = rng.integers(-128, 128, params.shape)
    magnitude = bits(params) & 0x7FFF
    correction = np.where(magnitude == 0, np.abs(correction) % 128, correction)
    return jnp.asarray(np.where(magnitude >= 0x7F80, 0, correction), jnp.int8)


def test_24_bits_are_split_and_joined_one_to_one():
    """Every seventh bfloat16 and the largest, with the next 8 bits: floats of 24 bits."""
    upper = np.append(ALL_BITS.ravel()[::7], np.uint16([0x7F7F, 0xFF7F]))  # the largest
    whole = (upper.astype(np.uint32)[:, None] << 16) + (np.arange(256, dtype=np.uint32) << 8)
    weights = whole.view(np.float32)
    weights = weights[np.isfinite(weights).all(1)]
    params, state = jax.jit(split_bfloat16)(jnp.asarray(weights))
    finite = np.isfinite(np.asarray(params, np.float32))
    # Beyond the largest bfloat16, and half a distance, there is infinity.
    assert np.abs(weights[~finite]).min() >= 255.5 * 2.0**120
    assert (np.asarray(state.correction)[~finite] == 0).all()
    np.testing.assert_array_equal(exact(params, state.correction)[finite], weights[finite])
    joined = np.asarray(jax.jit(join_bfloat16)(params, state))
    np.testing.assert_array_equal(joined.view(np.uint32)[finite], weights.view(np.uint32)[finite])
    # And the parameter is the nearest bfloat16.
    gap = np.abs(weights - np.asarray(params, np.float32))[finite]
    nearest = np.asarray(jnp.asarray(weights).astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(gap, np.abs(weights - nearest)[finite])


def updates_of_all_kinds(rng, params, correction):
    weights = exact(params, correction)
    scale = np.where(np.isfinite(weights), np.abs(weights), 1.0)
    random = np.exp2(rng.uniform(-140, 127, params.shape)) * rng.choice([-1, 1], params.shape)
    with np.errstate(over="ignore"):
        kinds = {
            "zero": np.zeros(params.shape),
            "small": scale * rng.normal(size=params.shape) * 2.0**-10,
            "least": scale * rng.choice([-1, 1], params.shape) * 2.0**-17,
            "as large": scale * rng.normal(size=params.shape),
            "cancelling": -weights * (1 + rng.choice([0, 2.0**-24, -(2.0**-23)], params.shape)),
            "nearly cancelling": -weights * (1 + rng.normal(size=params.shape) * 2.0**-12),
            "any": random,
            "infinite": np.where(rng.random(params.shape) < 0.5, np.inf, -np.inf),
            "nan": np.full(params.shape, np.nan),
        }
        return {name: kind.astype(np.float32) for name, kind in kinds.items()}


def test_apply_updates_gives_the_new_parameters_whatever_they_are():
    """For every bfloat16, corrections at random, updates of all sizes, also to zero and beyond."""
    rng = np.random.default_rng(0)
    params = all_parameters()
    correction = random_corrections(rng, params)
    weights = exact(params, correction)
    old = np.abs(exact(params, np.zeros((), np.int8)))
    numbers = np.isfinite(old)
    for name, update in updates_of_all_kinds(rng, params, correction).items():
        new, state, emitted = step(params, CorrectedBfloat16State(correction), update)
        assert emitted.dtype == jnp.float32 and new.dtype == jnp.bfloat16
        with np.errstate(invalid="ignore", over="ignore"):
            aim = (weights.astype(np.float32) + update).astype(np.float64)
        reached = exact(new, state.correction)
        finite = numbers & np.isfinite(np.asarray(new, np.float32))
        assert (np.asarray(state.correction)[~finite] == 0).all()
        # Rounding to 24 bits, or where float32 has no difference, that of the old parameter; and
        # weight, update, and difference may each be subnormal, which CPUs take for zero.
        allowed = np.maximum(2.0**-16 * np.abs(aim), 2.0**-24 * old)
        allowed = allowed + 3 * LEAST_NORMAL
        error = np.abs(np.subtract(reached, aim, where=finite, out=np.zeros_like(aim)))
        assert (error <= allowed)[finite].all(), name
        assert finite.mean() > 0.9 or name in ("infinite", "nan"), name
        # What is not a number stays visible: infinity where 24 bits overflow, NaN where float32
        # has one.
        np.testing.assert_array_equal(np.isnan(np.asarray(new, np.float32)), np.isnan(aim), name)
        overflows = np.abs(aim) >= 255.5 * 2.0**120
        assert np.isinf(np.asarray(new, np.float32))[overflows & ~np.isnan(aim)].all()


@pytest.mark.parametrize("start", [1.0, -3e-20], ids=str)
def test_a_random_walk_follows_float32(start):
    """10,000 steps of 2**-12 of the weight: each rounds by 2**-17 of it at most, at random."""
    rng = np.random.default_rng(1)
    updates = (start * 2.0**-12 * rng.normal(size=(10_000, 64))).astype(np.float32)

    def body(carry, update):
        params, state, weights = carry
        params, state, _ = step(params, state, update)
        return (params, state, weights + update), None

    weights = jnp.full(64, start, jnp.float32)
    params, state = split_bfloat16(weights)
    (params, state, weights), _ = jax.jit(lambda c: jax.lax.scan(body, c, updates))(
        (params, state, weights)
    )
    joined = np.asarray(join_bfloat16(params, state), np.float64)
    error = np.abs(joined - np.asarray(weights, np.float64))
    # A walk of 1e4 roundings of deviation 2**-16 / sqrt(12), weights at most doubled: six of them.
    assert error.max() < 6 * math.sqrt(1e4 / 12) * 2.0**-15 * abs(start)
    lost = np.asarray(jnp.full(64, start, jnp.bfloat16), np.float64)
    assert np.abs(lost - np.asarray(weights, np.float64)).mean() > 20 * error.mean()


def tree():
    return {
        "low": jnp.linspace(-1, 1, 5000).astype(jnp.bfloat16).reshape(50, 100),
        "full": jnp.ones((64, 128)),
        "half": jnp.ones(7, jnp.float16),
        "scalar": jnp.ones((), jnp.bfloat16),
        "empty": jnp.ones((0, 3), jnp.bfloat16),
        "none": None,
    }


def test_other_dtypes_pass_and_types_are_stable():
    params = tree()
    tx = correct_bfloat16()
    state = tx.init(params)
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, jnp.float32), params)
    updates["half"] = updates["half"].astype(jnp.float16)
    new, new_state = jax.jit(tx.update)(updates, state, params)
    assert_same_types(new_state, state)
    assert_same_types(new, updates)
    for name in ("full", "half"):
        np.testing.assert_array_equal(new[name], updates[name])
        assert isinstance(state.correction[name], optax.MaskedNode)
    assert state.correction["low"].dtype == jnp.int8
    assert_bit_equal(tx.update({}, tx.init({}), {}), ({}, CorrectedBfloat16State({})))


def test_one_byte_a_parameter():
    params = tree()
    state = correct_bfloat16().init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 5000 + 1
    assert describe(correct_bfloat16(), params).nbytes == 5001


def test_it_goes_last_in_a_chain_and_its_weights_are_read_from_the_state():
    tx = optax.chain(optax_lowbit.adamw4bit(1e-3), correct_bfloat16())
    weights = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 128)), jnp.float32)}
    params, corrected = split_bfloat16(weights)
    state = (*tx.init(params)[:-1], corrected)
    assert_same_types(state, tx.init(params))
    grads = jax.tree.map(jnp.ones_like, weights)

    @jax.jit
    def train_step(params, state):
        with standard_promotion():
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = train_step(params, state)
    moved = np.asarray(weights["w"] - join_bfloat16(params, state)["w"])
    # Three steps of Adam of 1e-3, each rounded by 2**-17 of a weight of less than 4; the weight
    # decay is 1e-7 of a weight.
    np.testing.assert_allclose(moved, 3e-3, atol=1e-5 + 4 * 4 * 2**-17)


def test_it_needs_parameters_and_a_state():
    tx = correct_bfloat16()
    params = tree()
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="no state of correct_bfloat16"):
        join_bfloat16(params, optax.sgd(0.1).init(params))


def test_variables_stay_variables():
    model = nnx.state(nnx.Linear(8, 64, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    tx = correct_bfloat16()
    state = tx.init(model)
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    updates, new_state = jax.eval_shape(tx.update, grads, state, model)
    assert jax.tree.structure(updates) == jax.tree.structure(model)
    assert_same_types(new_state, state)
    assert jax.tree.structure(join_bfloat16(model, state)) == jax.tree.structure(model)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_eight_devices_the_bits_are_the_same_without_traffic(axis_type):
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(64, 256)).astype(np.float32)
    update = (1e-3 * rng.normal(size=(64, 256))).astype(np.float32)
    params, state = split_bfloat16(jnp.asarray(weights))
    expected = step(params, state, jnp.asarray(update))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    place = NamedSharding(mesh, PartitionSpec("a", "b"))
    with jax.set_mesh(mesh):
        spread = jax.device_put((params, state, jnp.asarray(update)), place)
        assert correct_bfloat16().init(spread[0]).correction.sharding.is_equivalent_to(place, 2)
        compiled = step.lower(*spread).compile()
        result = compiled(*spread)
    assert "all-" not in compiled.as_text() and "collective" not in compiled.as_text()
    assert_bit_equal(*(jax.tree.map(np.asarray, x) for x in (result, expected)))


def test_bfloat16_gradients_train_but_lose_weight_decay():
    """Updates have the gradients' dtype, and a chain adds in it: what the docstring says."""

    def weights_after(dtype, decay):
        tx = optax.chain(
            optax.scale_by_sign(), optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(1e-2), correct_bfloat16(),
        )  # fmt: skip
        params = jnp.full(4, 0.7, jnp.bfloat16)
        state = tx.init(params)
        for _ in range(15):
            with standard_promotion():
                updates, state = tx.update(jnp.ones(4, dtype), state, params)
                params = optax.apply_updates(params, updates)
        return np.asarray(join_bfloat16(params, state), np.float64)[0]

    plain, decayed = (weights_after(jnp.float32, decay) for decay in (0.0, 2e-3))
    low, low_decayed = (weights_after(jnp.bfloat16, decay) for decay in (0.0, 2e-3))
    assert plain == pytest.approx(0.7 - 0.15, abs=0.7 / 512 + 15 * 2.0**-17)
    # 1e-2 in bfloat16 is right to 2**-9.
    assert low - plain == pytest.approx(0, abs=0.15 * 2**-9 + 15 * 2.0**-17)
    # 15 times 1e-2 * 2e-3 * 0.6, of which a step rounds 2**-17.
    assert plain - decayed == pytest.approx(15 * 1.2e-5, abs=15 * 2.0**-17)
    assert low_decayed == low
