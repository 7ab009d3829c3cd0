import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_lowbit import adamw4bit, adapters, zo
from optax_lowbit.adapters.nnx_layers import LoRALinear

LORA = adapters.LoRA(rank=2, alpha=6, targets="(up|down)/kernel")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 9, rngs=rngs)
        self.down = nnx.Linear(9, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Unrolled(nnx.Module):
    def __init__(self, blocks):
        self.blocks = nnx.List(blocks)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Stacked(nnx.Module):
    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block))
        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


def adapter_state(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


def with_moved_adapters(model):
    """The model with no adapter at zero."""
    generator = np.random.default_rng(3)

    def move(leaf):
        return leaf + jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map(move, nnx.state(model, nnx.LoRAParam)))
    return model


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)


@pytest.fixture(scope="module")
def stacked():
    return Stacked(nnx.Rngs(0))


def test_fresh_adapters_change_no_bit_and_leave_the_model_alone(stacked, x):
    before = str(nnx.graphdef(stacked))
    wrapped = LORA.wrap(stacked, key=0)
    assert np.asarray(wrapped(x)).tobytes() == np.asarray(stacked(x)).tobytes()
    assert str(nnx.graphdef(stacked)) == before
    assert wrapped.blocks.up.base.kernel is stacked.blocks.up.kernel


def test_only_adapters_are_lora_params_and_they_are_those_of_the_tree(stacked):
    wrapped = LORA.wrap(stacked, key=7)
    params = nnx.to_pure_dict(nnx.state(stacked, nnx.Param))
    pairs = LORA.init(params, key=7)
    state = adapter_state(wrapped)["blocks"]
    assert pairs.keys() == {"blocks/up/kernel", "blocks/down/kernel"}
    assert state.keys() == {"up", "down"}
    for name in state:
        assert state[name].keys() == {"lora_a", "lora_b"}
        for side in "ab":
            expected = pairs[f"blocks/{name}/kernel"][side]
            np.testing.assert_array_equal(state[name][f"lora_{side}"], expected)
    assert state["up"]["lora_a"].shape == (3, 2, 6) and state["up"]["lora_b"].shape == (3, 2, 9)


def test_formula():
    base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    layer = with_moved_adapters(adapters.LoRA(rank=2, alpha=3, targets="kernel").wrap(base, key=0))
    x = jnp.arange(8, dtype=jnp.float32).reshape(2, 4)
    w, bias, a, b = (
        np.asarray(v[...], np.float64) for v in (base.kernel, base.bias, layer.lora_a, layer.lora_b)
    )
    expected = np.asarray(x) @ w + bias + 1.5 * (np.asarray(x) @ a.T) @ b
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_stack_under_scan_equals_unrolled_layers(stacked, x):
    wrapped = with_moved_adapters(LORA.wrap(stacked, key=0))
    graph, state = nnx.split(wrapped.blocks)
    slices = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(3)]
    unrolled = Unrolled([nnx.merge(graph, one) for one in slices])
    np.testing.assert_allclose(wrapped(x), unrolled(x), rtol=1e-5, atol=1e-5)
    assert not np.allclose(wrapped(x), stacked(x), atol=0.1)


def test_layers_in_a_list_have_adapters_of_their_own(x):
    model = Unrolled([Block(nnx.Rngs(i)) for i in range(2)])
    wrapped = adapters.LoRA(targets="blocks/1/up/kernel").wrap(model, key=0)
    assert isinstance(wrapped.blocks[0].up, nnx.Linear)
    assert isinstance(wrapped.blocks[1].up, LoRALinear)
    assert isinstance(wrapped.blocks[1].down, nnx.Linear)
    np.testing.assert_array_equal(wrapped(x), model(x))


def test_a_shared_layer_is_wrapped_once(x):
    block = Block(nnx.Rngs(0))
    wrapped = with_moved_adapters(LORA.wrap(Unrolled([block, block]), key=0))
    assert wrapped.blocks[0].up is wrapped.blocks[1].up
    assert len(jax.tree.leaves(adapter_state(wrapped))) == 4


def test_unwrapped_model_is_plain_and_gives_the_same(stacked, x):
    wrapped = with_moved_adapters(LORA.wrap(stacked, key=0))
    merged = LORA.unwrap(wrapped)
    assert str(nnx.graphdef(merged)) == str(nnx.graphdef(stacked))
    np.testing.assert_allclose(merged(x), wrapped(x), rtol=1e-4, atol=1e-4)
    assert not np.array_equal(merged.blocks.up.kernel[...], stacked.blocks.up.kernel[...])
    np.testing.assert_array_equal(wrapped.blocks.up.base.kernel[...], stacked.blocks.up.kernel[...])
    params = nnx.to_pure_dict(nnx.state(stacked, nnx.Param))
    state = adapter_state(wrapped)["blocks"]
    pairs = {
        f"blocks/{name}/kernel": {side: state[name][f"lora_{side}"] for side in "ab"}
        for name in state
    }
    tree = LORA.merge(params, pairs)
    np.testing.assert_array_equal(merged.blocks.up.kernel[...], tree["blocks"]["up"]["kernel"])


def test_float32_adapters_over_a_bfloat16_base():
    low = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    base = nnx.Linear(4, 3, rngs=nnx.Rngs(0), **low)
    layer = adapters.LoRA(rank=2, targets="kernel").wrap(base, key=0)
    x = jnp.asarray([[1, 2, 3, 4]], jnp.bfloat16)
    assert layer.lora_a.dtype == layer.lora_b.dtype == jnp.float32
    assert layer(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer(x), base(x))

    def loss(layer):
        return jnp.sum(layer(x).astype(jnp.float32))

    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("factory", [optax.adam, adamw4bit])
def test_nnx_optimizer_trains_adapters_alone(factory, x):
    model = LORA.wrap(Stacked(nnx.Rngs(0)), key=0)
    base = jax.tree.map(np.array, nnx.to_pure_dict(nnx.split(model, nnx.LoRAParam, ...)[2]))
    wrt = nnx.DiffState(0, nnx.LoRAParam)

    def loss(model):
        return jnp.mean(jnp.square(model(x)))

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, gradients)
        return value, nnx.to_pure_dict(gradients)

    with jax.numpy_dtype_promotion("standard"):
        optimizer = nnx.Optimizer(model, factory(0.05), wrt=nnx.LoRAParam)
        results = [step(model, optimizer) for _ in range(10)]
    assert float(results[-1][0]) < 0.7 * float(results[0][0])
    after = nnx.to_pure_dict(nnx.split(model, nnx.LoRAParam, ...)[2])
    jax.tree.map(np.testing.assert_array_equal, after, base)
    gradients = results[-1][1]
    assert jax.tree.structure(gradients) == jax.tree.structure(adapter_state(model))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(np.asarray(gradient)), path


def test_zeroth_order_steps_train_a_state_of_adapters(stacked, x):
    graph, trainable, frozen = nnx.split(LORA.wrap(stacked, key=0), nnx.LoRAParam, ...)

    def loss(trainable, frozen):
        # A copy, because variables may not be used in another trace, and probes are in one.
        model = nnx.merge(graph, trainable, frozen, copy=True)
        return jnp.mean(jnp.square(model(x)))

    opt = zo.zo_sgd(2e-3)
    before, state = loss(trainable, frozen), opt.init(trainable, 0)
    step = jax.jit(opt.step, static_argnums=0)
    for _ in range(100):
        trainable, state, _ = step(loss, trainable, state, frozen)
    assert float(loss(trainable, frozen)) < float(before)


@pytest.mark.parametrize("targets", ["norm", "attention", "bias"])
def test_a_pattern_that_finds_no_layer_is_refused(targets, stacked):
    message = r"there are \['blocks/down/kernel', 'blocks/up/kernel'\]"
    with pytest.raises(ValueError, match=message):
        adapters.LoRA(targets=targets).wrap(stacked, key=0)
