"""Moments whose block scales are in 8 bits: the same step, then scales rounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowbit
from optax_lowbit import QuantSpec, dequantize, describe
from optax_lowbit.quant.array import with_float_scales
from tests.optimizers.cases import assert_bit_equal

MU = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block")
NU = QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")


def double(spec, **changes):
    return dataclasses.replace(spec, double_quant=True, **changes)


def gradients(shape, steps=3):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(steps)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_step_is_that_of_float_scales(backend):
    """From the same moments: the same update and codes; scales within a gap of the 8-bit table."""
    coded = optax_lowbit.adamw4bit(
        1e-3, mu_spec=double(MU), nu_spec=double(NU), key=0, backend=backend
    )
    plain = optax_lowbit.adamw4bit(1e-3, mu_spec=MU, nu_spec=NU, backend=backend)
    params = jnp.ones((300, 200))
    state, update, update_plain = coded.init(params), jax.jit(coded.update), jax.jit(plain.update)
    for grad in gradients(params.shape):
        moments = {n: with_float_scales(getattr(state[0], n)) for n in ("mu", "nu")}
        start = (state[0]._replace(**moments), *state[1:])
        expected, new = update_plain(grad, start, params)
        updates, state = update(grad, state, params)
        assert_bit_equal(updates, expected)
        for name in ("mu", "nu"):
            found, exact = getattr(state[0], name), getattr(new[0], name)
            assert_bit_equal(found.codes, exact.codes)
            # Scales of normal gradients lie in the upper decade, whose gaps are at most 0.9 / 64.
            error = abs(with_float_scales(found).scales / exact.scales - 1)
            assert 0 < error.max() < 0.9 / 64 / 0.1


def test_scales_follow_a_second_moment_that_falls():
    """By 0.1% in a step, which nearest rounding could not see: the table's gaps are 1% to 8%."""
    tx = optax_lowbit.scale_by_adam4bit(mu_spec=MU, nu_spec=double(NU), key=0, backend="reference")
    exact = optax_lowbit.scale_by_adam4bit(mu_spec=MU, nu_spec=NU, backend="reference")
    size = jnp.where(jnp.arange(256) < 128, 0.1, 1.0)[:, None]

    def body(states, step):
        grad = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (256, 128))
        grad = jnp.where(step < 100, grad, size * grad)
        return [t.update(grad, s)[1] for t, s in zip((tx, exact), states)], None

    start = [t.init(jnp.ones((256, 128))) for t in (tx, exact)]
    states, _ = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(3000)))(start)
    coded, floats = (np.asarray(dequantize(s.nu))[:128].mean() for s in states)
    assert abs(coded / floats - 1) < 0.1
    assert floats < 0.2  # where it was 1


def test_adamw_takes_1_016_bytes_a_parameter():
    tx = optax_lowbit.adamw4bit(1e-3, mu_spec=double(MU), nu_spec=double(NU), key=0)
    leaf = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    description = describe(tx, leaf)
    assert description.nbytes / leaf.size == pytest.approx(1.016, abs=5e-4)
    assert "4b block 128, 8b scales" in str(description)


def test_a_key_is_needed():
    with pytest.raises(ValueError, match=r"key must be given .* under double_quant, of scales"):
        optax_lowbit.sgd4bit(0.1, momentum=0.9, trace_spec=double(MU))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=["rows", "columns"])
def test_sharded_is_bit_equal_and_without_collectives(spec, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    tx = optax_lowbit.adamw4bit(1e-3, mu_spec=double(MU), nu_spec=double(NU), key=0)
    (grad,) = gradients((2048, 1024), 1)
    expected = jax.jit(tx.update)(grad, tx.init(grad), grad)
    with jax.set_mesh(mesh):
        spread = jax.device_put(grad, NamedSharding(mesh, PartitionSpec(*spec)))
        state = tx.init(spread)
        compiled = jax.jit(tx.update).lower(spread, state, spread).compile()
        result = compiled(spread, state, spread)
    assert_bit_equal(jax.tree.map(np.asarray, result), jax.tree.map(np.asarray, expected))
    text = compiled.as_text()
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all") if f" {name}(" in text]


def test_explicit_mesh_refuses_rows_that_are_not_aligned():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    tx = optax_lowbit.adamw4bit(1e-3, mu_spec=double(MU), nu_spec=double(NU), key=0)
    with jax.set_mesh(mesh):
        params = {
            "w": jax.device_put(jnp.ones((512, 128)), NamedSharding(mesh, PartitionSpec("x")))
        }
        with pytest.raises(ValueError, match=r"last but one axis of parameter 'w'.*8 x 256"):
            tx.init(params)
