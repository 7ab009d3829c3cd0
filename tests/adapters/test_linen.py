"""Adapters and matrices in few bits in Flax linen models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from optax_lowbit import adapters, qlora
from optax_lowbit.adapters.arrays import is_quantized_matrix
from optax_lowbit.kernels.quantized_matrix import quantize_matrix

TOKENS = jnp.asarray([[1, 4, 0], [2, 2, 10]])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
        return x + nn.Dense(6, name="up")(y), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(11, 6, name="embedding")
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layers(name="layers")(embedding(tokens), None)
        return embedding.attend(x)


@pytest.fixture(scope="module")
def params():
    return jax.jit(Model().init)(jax.random.key(0), TOKENS)["params"]


@pytest.fixture(scope="module")
def axes(params):
    return adapters.linen_kernel_axes(Model(), {"params": params}, TOKENS)


def moved(pairs):
    leaves, treedef = jax.tree.flatten(pairs)
    generator = np.random.default_rng(1)
    return treedef.unflatten(
        x + jnp.asarray(generator.normal(size=x.shape) * 0.1, x.dtype) for x in leaves
    )


def test_axes_are_those_of_general_layers_alone(axes):
    assert axes == {
        "(^|/)layers/attention/query/kernel$": (1, 2),
        "(^|/)layers/attention/key/kernel$": (1, 2),
        "(^|/)layers/attention/value/kernel$": (1, 2),
        "(^|/)layers/attention/out/kernel$": (2, 1),
    }


@pytest.mark.parametrize("use_dora", [False, True])
def test_scanned_model_with_adapters_is_the_merged_one(use_dora, params, axes):
    lora = adapters.LoRA(
        rank=2, alpha=3.0, targets="kernel|embedding", kernel_axes=axes, use_dora=use_dora
    )

    @jax.jit
    def run(params, trainable):
        with adapters.intercept_linen():
            return Model().apply({"params": lora.attach(params, trainable)}, TOKENS)

    before = jax.jit(Model().apply)({"params": params}, TOKENS)
    trainable = lora.init(params, key=0)
    assert trainable["layers/attention/out/kernel"]["a"].shape == (2, 2, 6)
    np.testing.assert_allclose(run(params, trainable), before, rtol=1e-6, atol=1e-6)
    trainable = moved(trainable)
    merged = lora.merge(params, trainable)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    expected = jax.jit(Model().apply)({"params": merged}, TOKENS)
    assert np.abs(expected - before).max() > 0.01
    np.testing.assert_allclose(run(params, trainable), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_kernels_in_few_bits(dtype, rng):
    model = nn.Sequential([nn.Dense(12, dtype=dtype), nn.DenseGeneral((2, 3), dtype=dtype)])
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    frozen = {
        name: layer
        | {"kernel": quantize_matrix(layer["kernel"].reshape(layer["kernel"].shape[0], -1))}
        for name, layer in params.items()
    }
    lora = adapters.LoRA(rank=2, targets="all-linear")
    trainable = moved(lora.init(frozen, key=0))

    @jax.jit
    def run(tree):
        with adapters.intercept_linen():
            return model.apply({"params": tree}, x)

    @jax.jit
    def of_floats(pairs):
        floats = lora.merge(frozen, pairs)
        return model.apply(
            {"params": jax.tree.map(lambda x, y: x.reshape(y.shape), floats, params)}, x
        )

    none = jax.tree.map(jnp.zeros_like, trainable)
    tolerance = 1e-5 if dtype is None else 0.05
    for result, expected in (
        (run(frozen), of_floats(none)),
        (run(lora.attach(frozen, trainable)), of_floats(trainable)),
    ):
        assert result.dtype == expected.dtype and result.shape == (5, 2, 3)
        result, expected = (np.asarray(y, np.float32) for y in (result, expected))
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_of_adapters_alone(params):
    lora = adapters.LoRA(rank=2, targets="up/kernel", modules_to_save="up/bias")

    @jax.jit
    @jax.grad
    def gradient(trainable):
        with adapters.intercept_linen():
            logits = Model().apply({"params": lora.attach(params, trainable)}, TOKENS)
        return jnp.mean(jnp.square(logits))

    result = gradient(moved(lora.init(params, key=0)))
    assert result.keys() == {"layers/up/kernel", "layers/up/bias"}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(result))


def test_batched_kernels_are_refused():
    model = nn.DenseGeneral(4, batch_dims=(0,))
    x = jnp.ones((2, 3, 5))
    params = model.init(jax.random.key(0), x)["params"]
    lora = adapters.LoRA(rank=2, targets="kernel")
    tree = lora.attach(params, lora.init(params, key=0))
    assert adapters.linen_kernel_axes(model, {"params": params}, x) == {}
    with adapters.intercept_linen(), pytest.raises(ValueError, match="has batch_dims"):
        model.apply({"params": tree}, x)


class Convolutions(nn.Module):
    """A convolution with a bias, one without, and a linear layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (3,), name="stem")(x)
        return nn.Dense(4)(nn.Conv(64, (3,), use_bias=False)(x))


def test_convolutions_are_no_stacks(rng):
    x = jnp.asarray(rng.normal(size=(2, 10, 64)), jnp.float32)
    params = jax.jit(Convolutions().init)(jax.random.key(0), x)["params"]
    lora = adapters.LoRA(rank=2, targets="all-linear")
    trained = lora.init(params, 0)
    assert trained.keys() == {"Dense_0/kernel"}
    base = qlora.quantize_params(params)
    assert [name for name in base if is_quantized_matrix(base[name]["kernel"])] == ["Dense_0"]
    with adapters.intercept_linen():
        y = Convolutions().apply({"params": lora.attach(base, moved(trained))}, x)
    merged = Convolutions().apply({"params": lora.merge(base, moved(trained))}, x)
    np.testing.assert_allclose(y, merged, rtol=1e-4, atol=1e-4)
    # Of leaves with other names it is said nowhere.
    stack = qlora.quantize_params({"w": jnp.ones((2, 4, 4)), "bias": jnp.ones(4)}, targets="w")
    assert is_quantized_matrix(stack["w"])
    chosen = adapters.LoRA(rank=2, targets="stem/kernel")
    with adapters.intercept_linen(), pytest.raises(ValueError, match="'stem/kernel' is of a Conv,"):
        Convolutions().apply({"params": chosen.attach(params, chosen.init(params, 0))}, x)


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_parameters_in_boxes(box, rng):
    model = nn.Dense(4, kernel_init=box(nn.initializers.lecun_normal(), (None, "model")))
    x = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    lora = adapters.LoRA(rank=2, targets="all-linear")
    for base in (params, qlora.quantize_params(params)):
        trained = moved(lora.init(base, 0))
        with adapters.intercept_linen():
            y = model.apply({"params": lora.attach(base, trained)}, x)
        merged = lora.merge(base, trained)
        assert merged["kernel"].names == (None, "model")
        np.testing.assert_allclose(y, model.apply({"params": merged}, x), rtol=1e-4, atol=1e-4)


def test_products_of_linen_layers_with_matrices_in_few_bits(rng):
    x = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    own = nn.Dense(4, dot_general=lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs))
    base = qlora.quantize_params(own.init(jax.random.key(0), x)["params"])
    with adapters.intercept_linen(), pytest.raises(ValueError, match="'kernel' is of a layer with"):
        own.apply({"params": base}, x)
    with adapters.intercept_linen():
        exact = nn.Dense(4, precision="highest")
        program = jax.make_jaxpr(jax.grad(lambda x: exact.apply({"params": base}, x).sum()))(x)
    assert str(program).count("HIGHEST") == 4
