"""Matrices in few bits on meshes of devices: products equal those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_lowbit import qlora


def loss(x, w):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def placed(w, mesh, spec):
    return jax.device_put(w, qlora.matrix_sharding(w, NamedSharding(mesh, spec)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("model"), P("data", "model")])
def test_products_and_derivatives_are_those_of_one_device(axis_type, spec, rng):
    w = qlora.quantize_matrix(jnp.asarray(rng.normal(size=(512, 64)) / 20, jnp.float32))
    x = jnp.asarray(rng.normal(size=(8, 512)), jnp.float32)
    expected = jax.value_and_grad(loss)(x, w)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        arguments = jax.device_put(x, NamedSharding(mesh, P("data"))), placed(w, mesh, spec)
        value, grad = jax.jit(jax.value_and_grad(loss))(*arguments)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-4, atol=1e-7)
    assert grad.sharding.is_equivalent_to(arguments[0].sharding, 2) or axis_type == AxisType.Auto


def test_a_device_has_its_part_of_codes_and_scales(rng):
    w = qlora.quantize_matrix(jnp.asarray(rng.normal(size=(3, 512, 64)), jnp.float32))
    mesh = mesh_of(AxisType.Auto)
    spread = placed(w, mesh, P(None, "data", "model"))
    assert spread.rows.codes.addressable_shards[0].data.shape == (3, 32, 64)
    assert spread.rows.scales.codes.addressable_shards[0].data.shape == (3, 32, 2)
    assert spread.rows.scales.absmax.sharding.is_fully_replicated
    np.testing.assert_array_equal(spread.dequantize(), w.dequantize())


def test_codes_are_exchanged_where_it_is_asked_for(rng):
    w = qlora.quantize_matrix(jnp.asarray(rng.normal(size=(512, 64)), jnp.float32))
    mesh = mesh_of(AxisType.Auto)
    whole = qlora.matrix_sharding(w, NamedSharding(mesh, P()))

    def step(x, w):
        return x @ jax.lax.with_sharding_constraint(w, whole)

    x = jax.device_put(jnp.ones((8, 512)), NamedSharding(mesh, P("data")))
    text = jax.jit(step).lower(x, placed(w, mesh, P("data"))).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathered and all("u8[" in line for line in gathered)


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((256, 64), P(("data", "model")), r"8 x 1; the last axis but one must be a multiple of 8"),
        ((256, 63), P(None, "model"), "and the last one of 2"),
        ((100, 64), P(None, "model"), r"no whole blocks of 64 is not sharded"),
        ((256, 64), P(None, None, "model"), "has 2 axes"),
    ],
)
def test_shards_that_would_cut_blocks_are_refused(shape, spec, message):
    w = qlora.abstract_matrix(shape, jnp.float32)
    with pytest.raises(ValueError, match=message):
        qlora.matrix_sharding(w, NamedSharding(mesh_of(AxisType.Auto), spec))


def test_matrices_without_whole_blocks_lie_whole(rng):
    w = qlora.quantize_matrix(jnp.asarray(rng.normal(size=(4, 96, 32)), jnp.float32))
    mesh = mesh_of(AxisType.Auto)
    for spec in (P(), P("data")):
        np.testing.assert_array_equal(placed(w, mesh, spec).dequantize(), w.dequantize())


def test_no_mesh_needs_to_be_set(rng):
    w = qlora.quantize_matrix(jnp.asarray(rng.normal(size=(128, 64)), jnp.float32))
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        spread = placed(w, mesh_of(axis_type), P(None, "model"))
        y = jax.jit(lambda x, w: x @ w)(jnp.ones((2, 128)), spread)
        np.testing.assert_allclose(y, jnp.ones((2, 128)) @ w, rtol=1e-5, atol=1e-5)


def test_what_is_no_sharding_is_refused():
    w = qlora.abstract_matrix((64, 64), jnp.float32)
    with pytest.raises(TypeError, match="sharding must be a NamedSharding, got tuple"):
        qlora.matrix_sharding(w, ("data",))
    with pytest.raises(TypeError, match="matrix must be a QuantizedMatrix, got"):
        qlora.matrix_sharding(jnp.ones((64, 64)), NamedSharding(mesh_of(AxisType.Auto), P()))
