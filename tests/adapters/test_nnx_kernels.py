"""Adapters of NNX layers whose kernels have more axes, against layers with merged kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_lowbit import adapters
from optax_lowbit.adapters.nnx_einsum import LoRAEinsum, parsed
from optax_lowbit.adapters.nnx_layers import LoRAConv, LoRALinear

RNGS = nnx.Rngs(0)


def normal(key, shape, dtype):
    """As initializers of Flax, and nothing is compiled."""
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape) / 4, dtype)


def einsum(equation, kernel, bias=None):
    return nnx.Einsum(equation, kernel, bias, kernel_init=normal, rngs=RNGS)


def general(*sizes, **kwargs):
    return nnx.LinearGeneral(*sizes, kernel_init=normal, rngs=RNGS, **kwargs)


def conv(kernel_size, sizes=(3, 4), **kwargs):
    return nnx.Conv(sizes[0], sizes[1], kernel_size, kernel_init=normal, rngs=RNGS, **kwargs)


HEADS, EXPERTS = "BTD,NDH->BTNH", "ecd,edf->cef"
# What makes a layer, the shape of what it maps, and of its adapters: (..., n, m).
LAYERS = {
    HEADS: (lambda: einsum(HEADS, (3, 8, 2), (3, 2)), (2, 5, 8), (8, 6)),
    "BTNH,NHD->BTD": (lambda: einsum("BTNH,NHD->BTD", (3, 2, 8), (8,)), (2, 5, 3, 2), (6, 8)),
    "outputs in another order than the kernel": (
        lambda: einsum("BSD,CKDH->CBHSK", (2, 3, 8, 4), (2, 4, 3)), (2, 5, 8), (8, 24),
    ),
    "...D,DF->...F": (lambda: einsum("...D,DF->...F", (8, 6)), (2, 5, 8), (8, 6)),
    "summed over without a kernel": (
        lambda: einsum("btd,df->bf", (8, 6), (6,)), (2, 5, 8), (8, 6),
    ),
    EXPERTS: (lambda: einsum(EXPERTS, (3, 8, 6), (3, 6)), (3, 5, 8), (3, 8, 6)),
    "axes": (lambda: general((2, 3), (4, 5), axis=(1, -1)), (7, 2, 3), (6, 20)),
    # Flax takes axes in the order of the inputs, whatever is said.
    "axes out of order": (lambda: general((2, 3), (4,), axis=(-1, 0)), (2, 7, 3), (6, 4)),
    "conv": (lambda: conv((3, 2)), (2, 6, 5, 3), (18, 4)),
    "strides": (
        lambda: conv((3,), strides=2, kernel_dilation=2, padding="CIRCULAR", use_bias=False),
        (2, 9, 3), (9, 4),
    ),
    "causal, without a batch": (lambda: conv((3,), padding="CAUSAL"), (9, 3), (9, 4)),
}  # fmt: skip


def moved(lora, layer):
    """The layer with its adapters somewhere, and a bias that is not zero."""
    generator = np.random.default_rng(3)

    def move(x):
        return x + jnp.asarray(generator.normal(size=x.shape), x.dtype)

    if layer.base.bias is not None:
        layer.base.bias = nnx.Param(move(layer.base.bias[...]))
    lora.update(layer, jax.tree.map(move, lora.extract(layer)))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_adapters_is_that_with_the_merged_kernel(name, rng):
    make, shape, (*stack, n, m) = LAYERS[name]
    base = make()
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    # Lengths of columns need each element of `y` at its own column; biases of none are scaled.
    lora = adapters.LoRA(rank=2, alpha=3.0, targets="kernel", use_dora=True)
    layer = moved(lora, lora.wrap(base, key=0))
    assert layer.lora_a.shape == (*stack, 2, n) and layer.lora_b.shape == (*stack, 2, m)

    @nnx.jit
    def run(layer, base, x):
        plain = lora.unwrap(layer)
        return layer(x), plain(x), base(x), plain.kernel[...]

    result, expected, before, kernel = run(layer, base, x)
    assert kernel.shape == base.kernel.shape
    assert np.abs(result - before).max() > 0.1
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_a_merged_einsum_has_the_product_in_the_order_of_its_kernel():
    base = LAYERS[HEADS][0]()
    lora = adapters.LoRA(rank=2, alpha=3.0, targets="kernel")
    layer = moved(lora, lora.wrap(base, key=0))
    assert type(lora.unwrap(layer)) is nnx.Einsum
    a, b = layer.lora_a[...], layer.lora_b[...].reshape(2, 3, 2)
    expected = base.kernel[...] + 1.5 * jnp.einsum("rd,rnh->ndh", a, b)
    np.testing.assert_allclose(lora.unwrap(layer).kernel[...], expected, rtol=1e-5, atol=1e-5)


def test_a_merged_convolution_has_that_of_both_one_after_the_other(rng):
    base = conv((3, 2), use_bias=False)
    lora = adapters.LoRA(rank=2, alpha=3.0, targets="kernel")
    layer = moved(lora, lora.wrap(base, key=0))
    down = conv((3, 2), (3, 2), use_bias=False)
    down.kernel.set_value(layer.lora_a[...].T.reshape(3, 2, 3, 2))
    up = conv((1, 1), (2, 4), use_bias=False)
    up.kernel.set_value(layer.lora_b[...][None, None])
    x = jnp.asarray(rng.normal(size=(2, 6, 5, 3)), jnp.float32)
    np.testing.assert_allclose(layer(x), base(x) + 1.5 * up(down(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [HEADS, EXPERTS, "conv"])
def test_starts_from_the_base_keep_what_it_computes(name, rng):
    make, shape, _ = LAYERS[name]
    base = make()
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    lora = adapters.LoRA(rank=2, alpha=3.0, targets="kernel", init_lora_weights="olora")
    layer = lora.wrap(base, key=0)
    assert layer.base.kernel.shape == base.kernel.shape
    assert np.abs(layer.base.kernel[...] - base.kernel[...]).max() > 0.01
    result, expected = nnx.jit(lambda layer, base, x: (layer(x), base(x)))(layer, base, x)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.Einsum(HEADS, (2, 4, 3), kernel_init=normal, rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (2, 3, 4), kernel_init=normal, rngs=rngs)
        self.mix = nnx.Conv(4, 4, (3,), kernel_init=normal, rngs=rngs)

    def __call__(self, x):
        return x + self.mix(self.out(jnp.tanh(self.query(x))))


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


def test_stacked_layers_have_stacked_adapters_under_scan(rng):
    model = Stack(nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    lora = adapters.LoRA(rank=2, targets="kernel")
    wrapped = lora.wrap(model, key=0)
    kinds = {type(wrapped.blocks.query): LoRAEinsum, type(wrapped.blocks.mix): LoRAConv}
    assert all(kind is expected for kind, expected in kinds.items())
    given = lora.extract(wrapped)
    shapes = {path: entry["a"].shape for path, entry in given.items()}
    assert shapes == {
        "blocks/query/kernel": (3, 2, 4),
        "blocks/out/kernel": (3, 2, 6),
        "blocks/mix/kernel": (3, 2, 12),
    }
    lora.update(wrapped, jax.tree.map(lambda x: x + 0.1, given))

    @nnx.jit
    def run(model):
        def loss(model):
            outputs = model(x)
            return jnp.mean(jnp.square(outputs)), outputs

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        gradients, outputs = nnx.grad(loss, argnums=wrt, has_aux=True)(model)
        return gradients, outputs, lora.unwrap(model)(x)

    gradients, outputs, expected = run(wrapped)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert len(jax.tree.leaves(gradients)) == 6
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", [HEADS, "conv"])
def test_inputs_are_dropped_out_in_training_alone(name, rng):
    make, shape, _ = LAYERS[name]
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    lora = adapters.LoRA(rank=2, targets="kernel", dropout=0.5)
    base = make()
    layer = lora.wrap(base, key=0)
    run = nnx.jit(lambda layer: layer(x))
    np.testing.assert_allclose(run(layer), run(base), rtol=1e-6, atol=1e-6)
    before = run(moved(lora, layer))
    layer.train()
    one, another = run(layer), run(layer)
    assert np.any(one != before) and np.any(one != another)
    layer.eval()
    np.testing.assert_array_equal(run(layer), before)


def test_convolutions_are_no_linear_layers():
    model = Stack(nnx.Rngs(0))
    lora = adapters.LoRA(rank=2, targets="all-linear")
    paths = lora.extract(lora.wrap(model, key=0)).keys()
    assert paths == {"blocks/query/kernel", "blocks/out/kernel"}
    # Where the function of a tree says which axes are whose, its adapters are the same.
    lora = adapters.LoRA(rank=2, targets="mix/kernel", kernel_axes={"mix/kernel": (2, 1)})
    expected = lora.init(nnx.to_pure_dict(nnx.state(model, nnx.Param)), key=5)
    result = lora.extract(lora.wrap(model, key=5))
    assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_layers_that_are_no_product_with_a_matrix_have_none():
    model = nnx.Sequential(
        conv((3,), (4, 4), feature_group_count=2),
        conv((3,), (4, 4), mask=jnp.ones((3, 4, 4))),
        general(4, 4, batch_axis={0: 2}),
        einsum("bd,dd->bd", (4, 4)),
        nnx.Linear(4, 4, kernel_init=normal, rngs=RNGS),
    )
    lora = adapters.LoRA(rank=2, targets="kernel")
    wrapped = lora.wrap(model, key=0)
    assert lora.extract(wrapped).keys() == {"layers/4/kernel"}
    assert isinstance(wrapped.layers[4], LoRALinear)


@pytest.mark.parametrize(
    "equation",
    [
        "bd,dd->bd",
        "bd,dd->b",
        "bb,bd->d",
        "bd,dfg->bf",
        "bd,d->bd",
        "bd,d->b",
        "bd,f->bdf",
        "bd,...df->b...f",
    ],
)
def test_equations_without_a_matrix(equation):
    assert parsed(equation) is None


def test_another_einsum_at_a_call_is_refused():
    layer = adapters.LoRA(rank=2, targets="kernel").wrap(einsum("...D,DF->...F", (8, 6)), key=0)
    x = jnp.ones((2, 8))
    np.testing.assert_array_equal(layer(x, "...D,DF->...F"), layer(x))
    with pytest.raises(ValueError, match="einsum_str must be that of the layer"):
        layer(jnp.ones((2, 6)), "...F,DF->...D")
