"""Attention and other layers with several axes in few bits; what is kept of parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_lowbit import adapters, qlora
from optax_lowbit.adapters.arrays import dequantized
from optax_lowbit.qlora.layers import FrozenParam, QLinear, QLinearGeneral


def normal(key, shape, dtype):
    """As initializers of Flax, and nothing is compiled."""
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape) / 8, dtype)


def attention(**kwargs):
    return nnx.MultiHeadAttention(
        4, 64, qkv_features=128, decode=False, kernel_init=normal, rngs=nnx.Rngs(0), **kwargs
    )


def general(*sizes, **kwargs):
    return nnx.LinearGeneral(*sizes, kernel_init=normal, rngs=nnx.Rngs(0), **kwargs)


@pytest.fixture(scope="module")
def model():
    return attention(bias_init=normal)


@pytest.fixture(scope="module")
def quantized(model):
    return qlora.quantize_model(model)


run = nnx.jit(lambda model, x: model(x))


def dense(model, names=("query", "key", "value", "out")):
    """The model with the values of its kernels in few bits, as floats in plain layers."""
    plain = nnx.clone(model)
    for name in names:
        kernel = getattr(plain, name).kernel
        flat = kernel[...].reshape(128 if name == "out" else 64, -1)
        kernel.set_value(qlora.quantize_matrix(flat).dequantize().reshape(kernel.shape))
    return plain


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.float32)


def test_projections_of_attention_are_in_few_bits(model, quantized, x):
    for name, shape in {"query": (64, 128), "out": (128, 64)}.items():
        layer = getattr(quantized, name)
        assert type(layer) is QLinearGeneral and layer.kernel.get_value().shape == shape
        assert type(getattr(model, name)) is nnx.LinearGeneral
    assert not jax.tree.leaves(nnx.state(quantized, nnx.Param))
    np.testing.assert_allclose(run(quantized, x), run(dense(model), x), rtol=1e-5, atol=1e-5)
    plain = quantized.query.dequantized()
    assert type(plain) is nnx.LinearGeneral and plain.kernel.shape == (64, 4, 32)
    np.testing.assert_allclose(run(plain, x), run(quantized.query, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_axes_and_dtypes_are_those_of_the_plain_layer(dtype, rng):
    model = nnx.Sequential(general((2, 32), (3, 4), axis=(-1, 0), dtype=dtype))
    x = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)
    layer = qlora.quantize_model(model).layers[0]
    expected = run(layer.dequantized(), x)
    result = run(layer, x)
    assert result.shape == (5, 3, 4) and result.dtype == expected.dtype
    tolerance = 1e-5 if dtype is None else 0.05
    result, expected = np.asarray(result, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def test_adapters_of_attention_in_few_bits_merge(quantized, x):
    lora = adapters.LoRA(rank=2, targets="all-linear", use_dora=True)
    wrapped = lora.wrap(quantized, key=0)
    trained = jax.tree.map(lambda x: x + 0.1, lora.extract(wrapped))
    assert trained["query/kernel"]["b"].shape == (2, 128)
    lora.update(wrapped, trained)
    merged = lora.unwrap(wrapped)
    assert type(merged.out) is nnx.LinearGeneral and merged.out.kernel.shape == (4, 32, 64)
    np.testing.assert_allclose(run(merged, x), run(wrapped, x), rtol=1e-4, atol=1e-4)
    again, errors = lora.requantized(wrapped)
    assert type(again.query) is QLinearGeneral and len(errors) == 4
    assert again.query.kernel.get_value().shape == (64, 128)


def test_loftq_starts_from_kernels_with_more_axes(model, quantized, x):
    lora = adapters.LoRA(rank=8, targets="all-linear", init_lora_weights="loftq")
    near = lora.wrap(quantized, key=0, weights=model)
    before, after = (
        float(jnp.abs(run(each, x) - run(model, x)).mean()) for each in (quantized, near)
    )
    assert after < 0.9 * before


class Stack(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: general(64, (4, 32)))
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return jnp.tanh(layer(x)[..., :2, :].reshape(x.shape))

        return run(x, self.layers)


def test_stacked_layers_stay_stacked_under_scan(x):
    quantized = qlora.quantize_model(Stack(nnx.Rngs(0)))
    assert quantized.layers.kernel.get_value().shape == (3, 64, 128)
    plain = nnx.clone(quantized)
    plain.layers = quantized.layers.dequantized()
    assert plain.layers.kernel.shape == (3, 64, 4, 32)
    np.testing.assert_allclose(run(quantized, x), run(plain, x), rtol=1e-5, atol=1e-5)


def test_attention_of_linen_is_in_few_bits(x):
    model = linen.MultiHeadDotProductAttention(4, qkv_features=128, kernel_init=normal)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    axes = adapters.linen_kernel_axes(model, {"params": params}, x)
    frozen = qlora.quantize_params(params, kernel_axes=axes)
    assert frozen["query"]["kernel"].shape == (64, 128) == frozen["out"]["kernel"].shape[::-1]
    lora = adapters.LoRA(rank=2, targets="query/kernel", kernel_axes=axes)
    trainable = jax.tree.map(lambda x: x + 0.1, lora.init(frozen, key=0))
    floats = {
        name: layer | {"kernel": dequantized(layer["kernel"]).reshape(params[name]["kernel"].shape)}
        for name, layer in lora.merge(frozen, trainable).items()
    }

    @jax.jit
    def few_bits(tree):
        with adapters.intercept_linen():
            return model.apply({"params": lora.attach(tree, trainable)}, x)

    expected = jax.jit(model.apply)({"params": floats}, x)
    np.testing.assert_allclose(few_bits(frozen), expected, rtol=1e-4, atol=1e-4)


def test_kernels_with_axes_of_their_own_may_be_stacked():
    params = {"layers": {"kernel": jnp.ones((3, 8, 2, 4)), "up": {"kernel": jnp.ones((8, 4))}}}
    tree = qlora.quantize_params(params, kernel_axes={"layers/kernel": (1, 2)})
    assert tree["layers"]["kernel"].shape == (3, 8, 8)
    assert tree["layers"]["up"]["kernel"].shape == (8, 4)
    with pytest.raises(ValueError, match="must be two ints of at least 1, got"):
        qlora.quantize_params(params, kernel_axes={"kernel": (1, 0)})


def test_matrices_of_other_sizes_are_named(model):
    graph, state = nnx.split(model)
    tree = qlora.quantize_params(nnx.to_pure_dict(state), targets="query/kernel")
    with pytest.raises(
        ValueError, match=r"'query/kernel' in few bits must be a matrix \(64, 128\)"
    ):
        qlora.quantize_model(nnx.merge(graph, nnx.State(tree)), targets="^$")
    tree = qlora.quantize_params(
        nnx.to_pure_dict(state), targets="query/kernel", kernel_axes={"query/kernel": (1, 2)}
    )
    mixed = qlora.quantize_model(nnx.merge(graph, nnx.State(tree)), targets="^$")
    assert type(mixed.query) is QLinearGeneral and type(mixed.key) is nnx.LinearGeneral


def test_layers_with_batch_axes_are_named():
    model = nnx.Sequential(general(64, 4, batch_axis={0: 2}))
    with pytest.raises(ValueError, match="'layers/0/kernel' of a LinearGeneral, which may do more"):
        qlora.quantize_model(model)


def mesh_of(axis_type):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


def annotated(mesh, spec, bias=("model",)):
    with jax.set_mesh(mesh):
        return nnx.Linear(
            128, 64, rngs=nnx.Rngs(0), kernel_init=normal,
            kernel_metadata={"out_sharding": spec, "tag": "up"},
            bias_metadata={"out_sharding": bias},
        )  # fmt: skip


def test_metadata_of_parameters_stay():
    model = nnx.Sequential(annotated(mesh_of(AxisType.Auto), ("data", "model")))
    before = model.layers[0].kernel.get_metadata()
    quantized = qlora.quantize_model(model)
    layer = quantized.layers[0]
    assert isinstance(layer.kernel, FrozenParam) and isinstance(layer.bias, FrozenParam)
    assert layer.kernel.get_metadata("out_sharding") == ("data", "model")
    assert layer.bias.get_metadata("out_sharding") == ("model",)
    plain = layer.dequantized()
    assert plain.kernel.get_metadata() == before and isinstance(plain.kernel, nnx.Param)
    lora = adapters.LoRA(rank=2, targets="kernel")
    merged = lora.unwrap(lora.wrap(quantized, key=0)).layers[0]
    assert merged.kernel.get_metadata() == before
    assert type(nnx.merge(*nnx.split(quantized)).layers[0]) is QLinear


def test_shardings_that_flax_gives_are_those_of_codes_and_scales():
    mesh = mesh_of(AxisType.Auto)
    quantized = qlora.quantize_model(nnx.Sequential(annotated(mesh, ("data", "model"))))
    graph, state = nnx.split(quantized)
    specs: Any = nnx.get_partition_spec(state)
    specs = specs["layers"][0]["kernel"].get_value()
    assert specs.rows.codes == P("model", "data") == specs.rows.scales.codes
    assert specs.rows.scales.offset == P() == specs.rows.scales.absmax
    placed = jax.device_put(state, nnx.get_named_sharding(state, mesh))
    matrix = placed["layers"][0]["kernel"].get_value()
    whole = state["layers"][0]["kernel"].get_value()
    expected = qlora.matrix_sharding(whole, NamedSharding(mesh, P("data", "model")))
    assert matrix.rows.codes.sharding == expected.rows.codes
    assert matrix.rows.codes.addressable_shards[0].data.shape == (16, 32)
    x = jnp.ones((3, 128))
    np.testing.assert_allclose(nnx.merge(graph, placed)(x), quantized(x), rtol=1e-5, atol=1e-5)


def test_several_axes_of_a_kernel_are_spread_as_their_first():
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        spec = {"out_sharding": ("data", "model", None)}
        quantized = qlora.quantize_model(attention(kernel_metadata=spec, use_bias=False))
    state = nnx.state(quantized)
    specs: Any = nnx.get_partition_spec(state)
    assert specs["query"]["kernel"].get_value().rows.codes == P("model", "data")
    # Of (heads, size, features) heads are "data".
    assert specs["out"]["kernel"].get_value().rows.codes == P(None, "data")
    assert quantized.query.dequantized().kernel.get_metadata("out_sharding") == spec["out_sharding"]


def test_columns_that_are_no_whole_blocks_are_not_spread():
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        metadata = {"out_sharding": (None, "model")}
        layer = nnx.Linear(96, 64, rngs=nnx.Rngs(0), kernel_init=normal, kernel_metadata=metadata)
    state = nnx.state(qlora.quantize_model(nnx.Sequential(layer)))
    with pytest.raises(ValueError, match="no whole blocks of 64 is not sharded along"):
        nnx.get_partition_spec(state)


def test_products_on_an_explicit_mesh(x):
    model = nnx.Sequential(general(64, (4, 32)))
    layer = qlora.quantize_model(model).layers[0]
    expected = layer(x)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        spread = NamedSharding(mesh, P("data", None, "model", None))
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))
        result = nnx.jit(lambda layer, x: layer(x, out_sharding=spread))(layer, rows)
        assert result.sharding.is_equivalent_to(spread, 4)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
        within = NamedSharding(mesh, P("data", None, None, "model"))
        with pytest.raises(ValueError, match=r"the first of the axes \(4, 32\) alone, got"):
            layer(rows, out_sharding=within)


def test_models_in_part_in_few_bits_go_through_pure_dicts(model, x):
    mixed = qlora.quantize_model(
        nnx.Sequential(model, nnx.Linear(64, 8, rngs=nnx.Rngs(0))), exclude="layers/1|key"
    )
    mixed = adapters.LoRA(rank=2, targets="all-linear").wrap(mixed, key=0)
    expected = run(mixed, x)
    graph, state = nnx.split(mixed)
    pure = nnx.to_pure_dict(state)
    for again in (state, pure, nnx.State(pure)):
        np.testing.assert_array_equal(run(nnx.merge(graph, again), x), expected)
    zeros = jax.tree.map(jnp.zeros_like, state)
    nnx.replace_by_pure_dict(zeros, pure)
    np.testing.assert_array_equal(run(nnx.merge(graph, zeros), x), expected)
