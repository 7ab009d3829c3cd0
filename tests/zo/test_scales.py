"""Steps of scales over codes that stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import QuantSpec, dequantize, quantize, zo
from optax_lowbit.zo.directions import split
from optax_lowbit.zo.rows import whole
from optax_lowbit.zo.scales import DescendKeepingSign
from optax_lowbit.zo.updates import Leaf
from tests.zo.cases import Given, drawn

spec = functools.partial(QuantSpec, bits=4, signed=True, scaling="block", block_size=16)
NF4 = spec(codebook="nf4")
SPECS = {
    "nf4": NF4,
    "double_quant": spec(codebook="dynamic_exponent", signed_scale=True, double_quant=True),
}
X = jax.random.normal(jax.random.key(1), (12, 20))


def low_bit_tree():
    weights = jax.random.normal(jax.random.key(0), (len(SPECS), 20, 24)) * 0.3
    tree = {name: quantize(w, spec) for w, (name, spec) in zip(weights, SPECS.items())}
    return {**tree, "norm": jnp.ones(24), "none": None}


TARGET = X @ sum(dequantize(low_bit_tree()[name]) for name in SPECS)


def loss(params):
    """Smallest for scales that are half of those of the tree."""
    total = sum(X @ dequantize(params[name]) for name in SPECS)
    return jnp.mean((total * params["norm"][None] - TARGET / 2) ** 2)


OPT = zo.qzo(1e-2, num_probes=2)
STEP = jax.jit(OPT.step, static_argnums=0)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_slopes_are_those_of_the_gradient_by_scales():
    params = low_bit_tree()
    state = OPT.init(params, 0)
    *_, info = STEP(loss, params, state)
    ours = split(params, part="scales")
    assert ours.paths == ("double_quant/scales/absmax", "nf4/scales")
    gradient = jax.jit(jax.grad(lambda leaves: loss(ours.tree(leaves))))(ours.leaves)
    z = split(jax.jit(functools.partial(drawn, OPT))(params, state), part="scales").leaves
    expected = sum(jnp.sum(g * d) for g, d in zip(gradient, z, strict=True))
    # The loss is a square: a central difference is exact but for rounding.
    np.testing.assert_allclose(info.coefficients[0], expected, rtol=2e-3)


def test_estimate_of_the_gradient_is_unbiased():
    params = quantize(jnp.linspace(0.1, 0.9, 48).reshape(2, 24), NF4)

    def loss(params):
        return jnp.sum((dequantize(params) - 0.2) ** 2)

    opt = zo.qzo(1e-3, eps=1e-2, num_probes=4096)
    state = opt.init(params, 0)
    new, *_ = jax.jit(opt.step, static_argnums=0)(loss, params, state)
    estimate = (params.scales - new.scales) / 1e-3
    (gradient,) = jax.grad(lambda leaves: loss(split(params).tree(leaves)))([params.scales])
    # The variance of c z_j, with signs for z, is the sum of the other components' squares.
    deviation = jnp.sqrt((jnp.sum(gradient**2) - gradient**2) / 4096)
    assert gradient.shape == (2, 2)
    assert (jnp.abs(estimate - gradient) < 5 * deviation + 1e-2).all()


def test_only_scales_train_and_the_loss_falls():
    params = low_bit_tree()
    state = OPT.init(params, 0)
    assert jax.tree.leaves(state.moments) == []

    def frozen(params):
        coded = params["double_quant"]
        return bits([params["nf4"].codes, coded.codes, coded.scales.codes, params["norm"]])

    before = loss(params), frozen(params)
    for _ in range(150):
        params, state, _ = STEP(loss, params, state)
    assert loss(params) < before[0] / 2
    assert frozen(params) == before[1]


def test_no_scale_crosses_zero():
    scales = jnp.array([[0.5, -0.5, 0.5, -0.5, 0.25, 0.0]])
    moved = jnp.array([[-0.25, 0.25, -0.75, 0.75, -0.25, 0.5]])
    leaf = Leaf(
        whole(0, scales),
        Given(lambda slopes, rows, each: moved),
        jnp.uint32(0),
        (jnp.uint32(0),) * 2,
        jnp.int32(0),
        False,
        {},
    )
    new, moments = DescendKeepingSign().update(jnp.zeros(2), leaf)
    np.testing.assert_array_equal(new, jnp.array([[0.25, -0.25, 0.25, -0.25, 0.125, 0.0]]))
    assert moments == {}


def test_by_default_scales_are_float_leaves_like_any_other():
    # Of the same names, and so with the same directions.
    paths = split(low_bit_tree()).paths
    assert paths == ("double_quant/scales/absmax", "nf4/scales", "norm")


def test_a_tree_without_low_bit_arrays_is_refused():
    with pytest.raises(ValueError, match=r"the scales of a QuantizedArray, and there are \['w'\]"):
        zo.qzo(1.0).init({"w": jnp.ones(3)}, 0)
    with pytest.raises(ValueError, match="trainable='head' must choose the scales"):
        zo.qzo(1.0, trainable="head").init(low_bit_tree(), 0)
