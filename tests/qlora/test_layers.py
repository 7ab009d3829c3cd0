"""Flax models whose linear layers are in few bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_lowbit import adapters, qlora


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(16, 64, rngs=rngs)
        self.up = nnx.Linear(64, 96, rngs=rngs)
        self.down = nnx.Linear(96, 64, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.down(nnx.relu(self.up(x))))


@pytest.fixture
def model():
    model = Model(nnx.Rngs(0))
    model.up.bias.set_value(jnp.arange(96.0) / 96)
    return model


TOKENS = jnp.arange(16)


def test_all_linear_layers_but_the_head(model):
    quantized = qlora.quantize_model(model)
    assert [type(layer) for layer in (quantized.up, quantized.down)] == [
        qlora.QLinear,
        qlora.QLinear,
    ]
    assert type(quantized.head) is nnx.Linear and type(model.up) is nnx.Linear
    assert quantized.embedding.embedding is model.embedding.embedding
    left = nnx.to_flat_state(nnx.state(quantized, nnx.Param))
    assert sorted("/".join(path) for path, _ in left) == [
        "embedding/embedding", "head/bias", "head/kernel",
    ]  # fmt: skip
    some = qlora.quantize_model(model, targets="up|head", exclude="^$")
    assert [type(getattr(some, name)) for name in ("up", "down", "head")] == [
        qlora.QLinear, nnx.Linear, qlora.QLinear,
    ]  # fmt: skip
    assert type(qlora.quantize_model(quantized, targets="head", exclude="^$").up) is qlora.QLinear


def test_a_layer_is_that_of_its_dequantized_kernel(model):
    quantized = qlora.quantize_model(model)
    dense = quantized.up.dequantized()
    assert type(dense) is nnx.Linear
    x = jax.random.normal(jax.random.key(0), (3, 64))
    np.testing.assert_allclose(quantized.up(x), dense(x), rtol=1e-5, atol=1e-5)
    with jax.numpy_dtype_promotion("standard"):
        assert quantized.up(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_layers_that_may_do_more_are_named(model):
    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model.up = Doubled(64, 96, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"finds 'up/kernel' of a Doubled, which may do more"):
        qlora.quantize_model(model)
    assert type(qlora.quantize_model(model, exclude="up|head").up) is Doubled


@pytest.mark.parametrize(
    "field",
    [
        {"dot_general": lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)},
        {"preferred_element_type": jnp.float32},
        {"promote_dtype": lambda args, dtype: args},
    ],
)
def test_products_of_their_own_are_not_dropped(field):
    model = nnx.Sequential(nnx.Linear(64, 8, **field, rngs=nnx.Rngs(0)))
    (name,) = field
    with pytest.raises(ValueError, match=f"'layers/0/kernel' is of a layer with {name}="):
        qlora.quantize_model(model)
    with pytest.raises(ValueError, match="must be found in the path of a layer"):
        qlora.quantize_model(model, exclude="layers")


@pytest.mark.parametrize("dtypes", ["bfloat16 float32", "float32 bfloat16", "bfloat16 bfloat16"])
def test_the_dtype_is_that_of_inputs_kernel_and_bias(dtypes):
    plain = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    for variable, dtype in zip((plain.kernel, plain.bias), dtypes.split()):
        variable.set_value(variable.get_value().astype(dtype))
    x = jnp.ones((2, 64), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        layer = qlora.quantize_model(nnx.Sequential(plain)).layers[0]
        assert layer(x).dtype == plain(x).dtype


@pytest.mark.parametrize(
    "precision", [jax.lax.Precision.HIGHEST, "highest", (jax.lax.Precision.HIGHEST,) * 2, None]
)
def test_precision_is_that_of_forward_and_backward_pass(precision):
    def precisions(layer):
        gradient = jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))
        found = re.findall(r"precision=(\w+|\([\w., ]+\))", str(gradient(jnp.ones((2, 64)))))
        return set(found) - {"None"}

    plain = nnx.Linear(64, 8, use_bias=False, precision=precision, rngs=nnx.Rngs(0))
    layer = qlora.quantize_model(nnx.Sequential(plain)).layers[0]
    assert precisions(layer) == precisions(plain)
    # A context counts where the product is, and not where its derivative is taken.
    y, pullback = jax.vjp(layer, jnp.ones((2, 64)))
    with jax.default_matmul_precision("bfloat16"):
        program = str(jax.make_jaxpr(pullback)(y))
    assert "DEFAULT" not in program


def test_a_precision_of_each_factor_is_refused():
    pair = (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT)
    plain = nnx.Linear(64, 8, precision=pair, rngs=nnx.Rngs(0))
    layer = qlora.quantize_model(nnx.Sequential(plain)).layers[0]
    with pytest.raises(ValueError, match=r"precision must be .* the same for both factors, got"):
        layer(jnp.ones((2, 64)))


def test_backends_are_told_to_matrices(model):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    base = jax.eval_shape(lambda x: qlora.quantize_params(x, backend="pallas_tpu"), params)
    assert base["up"]["kernel"].backend == "pallas_tpu"
    quantized = qlora.quantize_model(model, backend="reference")
    assert quantized.up.kernel.get_value().backend == "reference"
    with pytest.raises(ValueError, match="backend"):
        qlora.quantize_model(model, backend="abacus")


def test_kernels_from_files_stay_as_they_are(model):
    kernel = qlora.quantize_matrix(model.up.kernel.get_value())
    model.up.kernel.set_value(kernel)
    quantized = qlora.quantize_model(model)
    assert quantized.up.kernel.get_value().rows.codes is kernel.rows.codes
    assert quantized(TOKENS).shape == (16, 16)


def test_trees_in_part_in_few_bits_become_models(model):
    graph, state = nnx.split(model)
    tree = qlora.quantize_params(nnx.to_pure_dict(state), targets="down/kernel")
    mixed = qlora.quantize_model(nnx.merge(graph, nnx.State(tree)), targets="^$")
    assert [type(layer) for layer in (mixed.up, mixed.down)] == [nnx.Linear, qlora.QLinear]
    assert type(qlora.quantize_model(nnx.merge(graph, nnx.State(tree))).up) is qlora.QLinear
    expected = qlora.quantize_model(model, targets="down")
    np.testing.assert_array_equal(mixed(TOKENS), expected(TOKENS))
    graph, state = nnx.split(mixed)
    again = nnx.merge(graph, nnx.State(nnx.to_pure_dict(state)))
    np.testing.assert_array_equal(again(TOKENS), expected(TOKENS))


def test_biases_that_train_go_on_training(model):
    wrapped = adapters.LoRA(rank=2, targets="up", bias="all").wrap(model, key=0)
    count = len(jax.tree.leaves(nnx.state(wrapped, nnx.LoRAParam)))
    quantized = qlora.quantize_model(wrapped, targets="up")
    assert len(jax.tree.leaves(nnx.state(quantized, nnx.LoRAParam))) == count


def test_adapters_are_put_in_once(model):
    lora = adapters.LoRA(rank=2, targets="up|down")
    wrapped = lora.wrap(qlora.quantize_model(model), key=0)
    with pytest.raises(ValueError, match=r"model has adapters already, at '(up|down)'"):
        lora.wrap(wrapped, key=1)
    assert wrapped.up(jnp.ones((0, 64))).shape == (0, 96)


def test_only_adapters_train(model):
    wrapped = adapters.LoRA(rank=4, targets="up|down").wrap(qlora.quantize_model(model), key=0)
    optimizer = nnx.Optimizer(wrapped, optax.adam(1e-2), wrt=nnx.LoRAParam)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(wrapped)))

    @nnx.jit
    def step(wrapped, optimizer):
        def loss(wrapped):
            return optax.softmax_cross_entropy_with_integer_labels(wrapped(TOKENS), TOKENS).mean()

        wanted = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=wanted)(wrapped)
        optimizer.update(wrapped, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):
        losses = [float(step(wrapped, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    after = nnx.to_pure_dict(nnx.state(wrapped))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, old, new: None if np.array_equal(old, new) else str(path), before, after
    )
    assert all("lora_" in path for path in jax.tree.leaves(moved))
    assert len(jax.tree.leaves(moved)) == 4


def test_merged_models_are_floats_or_in_few_bits_again(model):
    lora = adapters.LoRA(rank=4, targets="up|down")
    quantized = qlora.quantize_model(model)
    wrapped = lora.wrap(quantized, key=0)
    trained = {
        path: pair | {"b": jnp.ones_like(pair["b"]) / 50}
        for path, pair in lora.extract(wrapped).items()
    }
    lora.update(wrapped, trained)
    merged = lora.unwrap(wrapped)
    assert type(merged.up) is nnx.Linear
    np.testing.assert_allclose(merged(TOKENS), wrapped(TOKENS), rtol=1e-4, atol=1e-4)
    again, errors = lora.requantized(wrapped)
    assert type(again.up) is qlora.QLinear and errors.keys() == trained.keys()
    assert all(0.02 < float(error) < 0.15 for error in errors.values())


def test_trees_and_wrong_arguments(model):
    params = {"a": {"kernel": jnp.ones((8, 8))}, "lm_head": {"kernel": jnp.ones((8, 8))}}
    base = qlora.quantize_params(params)
    assert isinstance(base["a"]["kernel"], qlora.QuantizedMatrix)
    assert base["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    assert qlora.quantize_params(base, targets="lm_head", exclude="^$")["a"] == base["a"]
    for function, argument in ((qlora.quantize_params, params), (qlora.quantize_model, model)):
        with pytest.raises(ValueError, match="targets='none' must be found in the path"):
            function(argument, targets="none")
        with pytest.raises(ValueError, match=r"exclude='\(' is no regular expression"):
            function(argument, exclude="(")
        with pytest.raises(TypeError, match="targets must be a regular expression, got 3"):
            function(argument, targets=3)
        with pytest.raises(TypeError, match="spec must be a QuantSpec, got str"):
            function(argument, "nf4")
