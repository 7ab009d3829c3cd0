import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowbit
from optax_lowbit import adapters, zo

LORA = adapters.LoRA(rank=3, alpha=6.0, targets="query|value")


@pytest.fixture
def params(rng):
    def matrix(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "query": matrix(13, 7),
        "value": matrix(7, 11),
        "bias_of_value": matrix(11),
        "output": matrix(11, 2),
        "step_of_query": jnp.int32(3),
        "nothing": None,
    }


def model(params, x):
    x = x @ params["query"] @ params["value"] + params["bias_of_value"][None]
    return x @ params["output"]


def moved(pairs, seed=1):
    """Adapters whose ``b`` is not zero any more."""
    leaves, treedef = jax.tree.flatten(pairs)
    generator = np.random.default_rng(seed)
    return treedef.unflatten(
        x + jnp.asarray(generator.normal(size=x.shape), x.dtype) for x in leaves
    )


def test_targets_are_float_matrices_that_the_pattern_finds(params):
    pairs = LORA.init(params, key=0)
    assert {path: (pair["a"].shape, pair["b"].shape) for path, pair in pairs.items()} == {
        "query": ((3, 13), (3, 7)),
        "value": ((3, 7), (3, 11)),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype("float32")}


def test_a_is_kaiming_uniform_and_b_is_zero():
    pair = LORA.init({"query": jnp.zeros((2, 400, 9))}, key=0)["query"]
    a = np.asarray(pair["a"])
    # torch.nn.init.kaiming_uniform_(a=sqrt(5)): gain sqrt(2 / 6), so bound sqrt(3) gain / sqrt(n).
    bound = np.sqrt(3) * np.sqrt(2 / 6) / np.sqrt(400)
    assert a.shape == (2, 3, 400) and np.abs(a).max() <= bound * (1 + 1e-6)
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(a.mean(), 0, atol=4 * bound / np.sqrt(3 * a.size))
    assert not np.array_equal(a[0], a[1]) and not np.any(pair["b"])


def test_adapters_of_a_leaf_depend_on_its_path_and_the_key_alone(params):
    pairs = LORA.init(params, key=5)
    alone = LORA.init({"value": params["value"]}, key=jax.random.key(5))
    np.testing.assert_array_equal(alone["value"]["a"], pairs["value"]["a"])
    assert not np.array_equal(LORA.init(params, key=6)["value"]["a"], pairs["value"]["a"])


@pytest.mark.parametrize("way", ["attach", "merge"])
def test_fresh_adapters_change_no_bit(params, way, rng):
    x = jnp.asarray(rng.normal(size=(5, 13)), jnp.float32)
    tree = getattr(LORA, way)(params, LORA.init(params, key=0))
    assert np.asarray(model(tree, x)).tobytes() == np.asarray(model(params, x)).tobytes()


@pytest.mark.parametrize("way", ["attach", "merge"])
def test_formula(params, way, rng):
    x = jnp.asarray(rng.normal(size=(5, 13)), jnp.float32)
    pairs = moved(LORA.init(params, key=0))

    def exact(name):
        a, b = (np.asarray(pairs[name][side], np.float64) for side in "ab")
        return np.asarray(params[name], np.float64) + 2.0 * a.T @ b  # alpha / rank = 6 / 3

    expected = np.asarray(x, np.float64) @ exact("query") @ exact("value")
    expected = (expected + np.asarray(params["bias_of_value"])) @ np.asarray(params["output"])
    result = model(getattr(LORA, way)(params, pairs), x)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_attached_matrix_is_never_formed(params):
    """Neither in the program nor in that of its gradient; merged, it is in both."""
    x = jnp.ones((5, 13), jnp.float32)
    pairs = LORA.init(params, key=0)

    def formed(way):
        def loss(pairs):
            return jnp.sum(jnp.square(model(getattr(LORA, way)(params, pairs), x)))

        shapes = {
            var.aval.shape
            for equation in jax.make_jaxpr(jax.grad(loss))(pairs).jaxpr.eqns
            for var in equation.outvars
        }
        return shapes & {(13, 7), (7, 13), (7, 11), (11, 7)}

    # Transposed frozen matrices are views that XLA folds into the product.
    assert formed("attach") <= {(7, 13), (11, 7)}
    assert {(13, 7), (7, 11)} <= formed("merge")


def test_gradients_are_those_of_merged_weights(params, rng):
    x = jnp.asarray(rng.normal(size=(5, 13)), jnp.float32)
    pairs = moved(LORA.init(params, key=0))

    def loss(pairs, way):
        return jnp.mean(jnp.square(model(getattr(LORA, way)(params, pairs), x)))

    ours, theirs = (jax.grad(loss)(pairs, way) for way in ("attach", "merge"))
    for path, gradient in jax.tree_util.tree_leaves_with_path(ours):
        assert np.any(np.asarray(gradient)), path
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-2), ours, theirs)


def test_stack_under_scan_equals_unrolled_layers(rng):
    stack = {"layers": {"kernel": jnp.asarray(rng.normal(size=(4, 9, 9)) / 3, jnp.float32)}}
    lora = adapters.LoRA(rank=2, alpha=2, targets="layers/kernel")
    pairs = moved(lora.init(stack, key=0))
    x = jnp.asarray(rng.normal(size=(5, 9)), jnp.float32)

    def layer(x, params):
        return jnp.tanh(x @ params["kernel"]), None

    scanned, _ = jax.lax.scan(layer, x, lora.attach(stack, pairs)["layers"])

    one = adapters.LoRA(rank=2, alpha=2, targets="kernel")
    for number in range(4):
        params = {"kernel": stack["layers"]["kernel"][number]}
        own = {"kernel": {side: pairs["layers/kernel"][side][number] for side in "ab"}}
        x, _ = layer(x, one.attach(params, own))
    np.testing.assert_allclose(scanned, x, rtol=1e-5, atol=1e-6)


def test_bfloat16_base_keeps_its_dtype_and_the_sum_is_rounded_once():
    lora = adapters.LoRA(rank=1, alpha=1.0, targets="w")
    # 1 + 2^-8 + 2^-16 lies just above the middle of 1 and the next bfloat16, 1 + 2^-7. Rounded
    # by itself first, what is added would be 2^-8, the sum a tie, and the result 1.
    params = {"w": jnp.ones((1, 1), jnp.bfloat16)}
    pairs = lora.init(params, key=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype("float32")}
    pairs["w"] = {"a": jnp.float32([[1]]), "b": jnp.float32([[2**-8 + 2**-16]])}
    x = jnp.ones((1, 1), jnp.bfloat16)
    for result in (x @ lora.attach(params, pairs)["w"], lora.merge(params, pairs)["w"]):
        assert result.dtype == jnp.bfloat16
        assert float(result[0, 0]) == 1 + 2**-7


def test_attached_matrix_answers_numpy_arrays_and_refuses_to_be_one(params):
    matrix = LORA.attach(params, moved(LORA.init(params, key=0)))["query"]
    x = np.ones((2, 13), np.float32)
    np.testing.assert_array_equal(x @ matrix, jnp.asarray(x) @ matrix)
    assert (matrix.shape, matrix.ndim, matrix.dtype) == ((13, 7), 2, jnp.float32)
    with pytest.raises(TypeError):
        jnp.sum(matrix)


def shrinking(lora, params, x):
    """The mean square of ``x @ w``."""

    def loss(trainable):
        y = x @ lora.attach(params, trainable)["w"]
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    return loss


@pytest.mark.parametrize("factory", [optax.adam, optax_lowbit.adamw4bit])
def test_optax_transforms_train_adapters(factory, rng):
    tx = factory(0.02)
    lora = adapters.LoRA(rank=8, alpha=16, targets="w")
    params = {"w": jnp.asarray(rng.normal(size=(640, 640)) / 25, jnp.bfloat16)}
    # Four rows: adapters of rank 8 can bring the loss to zero.
    loss = shrinking(lora, params, jnp.asarray(rng.normal(size=(4, 640)), jnp.bfloat16))

    @jax.jit
    def step(trainable, state):
        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    with jax.numpy_dtype_promotion("standard"):
        trainable = lora.init(params, key=0)
        state, losses = tx.init(trainable), []
        for _ in range(10):
            trainable, state, value = step(trainable, state)
            losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    if factory is optax_lowbit.adamw4bit:
        # Rows of 640 numbers are long enough for 4 bits; rows of 8 would not be.
        moments = optax.tree.get(state, "mu")["w"]
        assert all(optax_lowbit.is_quantized(moments[side]) for side in "ab")


def test_zeroth_order_steps_train_adapters(rng):
    lora = adapters.LoRA(rank=3, alpha=6, targets="w")  # can bring the loss to zero
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    loss = shrinking(lora, params, jnp.eye(4, dtype=jnp.float32))
    opt = zo.zo_sgd(0.05)
    trainable = lora.init(params, key=0)
    state, before = opt.init(trainable, 0), float(loss(trainable))
    step = jax.jit(opt.step, static_argnums=0)
    for _ in range(200):
        trainable, state, _ = step(loss, trainable, state)
    assert float(loss(trainable)) < 0.5 * before


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"rank": 0}, "rank must be an int of at least 1, got 0"),
        (ValueError, {"rank": 2.0}, r"rank must be an int of at least 1, got 2\.0"),
        (ValueError, {"rank": True}, "rank must be an int of at least 1, got True"),
        (ValueError, {"alpha": 0}, "alpha must be a finite number above 0, got 0"),
        (ValueError, {"alpha": float("nan")}, "alpha must be a finite number above 0, got nan"),
        (ValueError, {"alpha": "16"}, "alpha must be a finite number above 0, got '16'"),
        (TypeError, {"targets": ["query"]}, r"targets must be a regular expression, got \['query"),
        (ValueError, {"targets": "query("}, r"targets='query\(' is no regular expression"),
    ],
)
def test_impossible_fields_are_refused(error, changes, message):
    with pytest.raises(error, match=message):
        adapters.LoRA(**({"targets": "query"} | changes))


@pytest.mark.parametrize("params", [{}, {"bias": jnp.ones(4)}, {"key": jnp.ones((4, 4))}])
def test_a_pattern_that_finds_nothing_is_refused(params):
    there = sorted(path for path, leaf in params.items() if leaf.ndim == 2)
    message = rf"targets='query\|value' must be found .* there are \[{', '.join(map(repr, there))}]"
    with pytest.raises(ValueError, match=message):
        LORA.init(params, key=0)


def test_keys_are_checked(params):
    with pytest.raises(TypeError, match="key must be a jax"):
        LORA.init(params, key=None)
    with pytest.raises(ValueError, match="threefry2x32"):
        LORA.init(params, key=jax.random.key(0, impl="rbg"))


@pytest.mark.parametrize("way", ["attach", "merge"])
def test_adapters_of_another_tree_are_refused(params, way):
    pairs = LORA.init(params, key=0)
    fun = getattr(LORA, way)
    with pytest.raises(ValueError, match=r"params, which has no \['query']"):
        fun({"value": params["value"]}, pairs)
    with pytest.raises(ValueError, match=r"adapters\['query'] must have shapes .*\(3, 9\).*13"):
        fun(params | {"query": jnp.ones((9, 7))}, pairs)
    with pytest.raises(ValueError, match=r"'query' of shape \(7,\)"):
        fun(params | {"query": jnp.ones(7)}, pairs)
    with pytest.raises(ValueError, match="the rank is 4"):
        getattr(adapters.LoRA(rank=4, targets="query|value"), way)(params, pairs)
