import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import adapters


@pytest.fixture
def embedding(rng):
    return jnp.asarray(rng.normal(size=(31, 5)), jnp.bfloat16)


def test_prompt_is_rows_of_the_embedding_in_float32(embedding):
    prompt = adapters.Prompt(num_tokens=40).init(embedding, key=0)
    assert prompt.shape == (40, 5) and prompt.dtype == jnp.float32
    rows = {row.tobytes() for row in np.asarray(embedding, np.float32)}
    drawn = {row.tobytes() for row in np.asarray(prompt)}
    assert drawn <= rows and len(drawn) > 15
    assert adapters.Prompt().init(embedding, key=0).shape == (10, 5)


def test_every_row_can_be_drawn():
    prompt = adapters.Prompt(num_tokens=7000).init(jnp.arange(7.0)[:, None], key=1)
    counts = np.bincount(np.asarray(prompt[:, 0], int), minlength=7)
    # Seven binomial counts of mean 1000 and deviation 29.
    assert counts.shape == (7,) and np.all(np.abs(counts - 1000) < 150)


def test_keys_decide(embedding):
    prompts = [adapters.Prompt().init(embedding, key) for key in (3, jax.random.key(3), 4)]
    np.testing.assert_array_equal(prompts[0], prompts[1])
    assert not np.array_equal(prompts[0], prompts[2])


def test_prefix_is_what_the_model_computes_of_random_tokens():
    seen = []

    def keys_and_values(tokens):
        seen.append(tokens)
        heads = tokens[:, None].astype(jnp.bfloat16)
        return [{"keys": heads, "values": -heads}, {"keys": heads + 1, "values": -heads}]

    prefix = adapters.Prefix().init(keys_and_values, key=0, vocabulary_size=100)
    (tokens,) = seen
    assert tokens.shape == (5,) and tokens.dtype == jnp.int32
    assert np.all((tokens >= 0) & (tokens < 100)) and len(set(tokens.tolist())) > 1
    assert {leaf.dtype for leaf in jax.tree.leaves(prefix)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(prefix[1]["keys"][:, 0], tokens.astype(jnp.float32) + 1)
    three = adapters.Prefix(num_tokens=3).init(keys_and_values, 0, vocabulary_size=100)
    assert len(three[0]["keys"]) == 3


@pytest.mark.parametrize("rest", [(), (4,), (2, 3)])
def test_prepend_is_the_same_for_every_sequence(rest, rng):
    virtual = jnp.asarray(rng.normal(size=(3, *rest)), jnp.float32)
    real = jnp.asarray(rng.normal(size=(2, 5, *rest)), jnp.bfloat16)
    both = adapters.prepend(virtual, real)
    assert both.shape == (2, 8, *rest) and both.dtype == jnp.bfloat16
    for sequence in range(2):
        np.testing.assert_array_equal(both[sequence, :3], virtual.astype(jnp.bfloat16))
        np.testing.assert_array_equal(both[sequence, 3:], real[sequence])


def test_gradient_of_virtual_tokens_sums_over_the_batch():
    def total(virtual):
        weights = jnp.arange(14, dtype=jnp.float32).reshape(2, 7, 1)
        return jnp.sum(weights * adapters.prepend(virtual, jnp.zeros((2, 4, 1))))

    gradient = jax.grad(total)(jnp.ones((3, 1)))
    np.testing.assert_array_equal(gradient[:, 0], [0 + 7, 1 + 8, 2 + 9])


@pytest.mark.parametrize(("n", "length"), [(0, 3), (2, 1), (5, 4)])
def test_mask_lets_see_the_prefix_and_the_past(n, length):
    expected = [[j < n or j - n <= i for j in range(n + length)] for i in range(length)]
    np.testing.assert_array_equal(adapters.prefix_mask(n, length), expected)


def test_impossible_arguments_are_refused(embedding):
    with pytest.raises(ValueError, match="num_tokens must be an int of at least 1, got 0"):
        adapters.Prompt(num_tokens=0)
    with pytest.raises(ValueError, match=r"num_tokens must be an int of at least 1, got 5\.0"):
        adapters.Prefix(num_tokens=5.0)
    with pytest.raises(ValueError, match="vocabulary_size must be an int of at least 1, got 0"):
        adapters.Prefix().init(lambda tokens: tokens, 0, vocabulary_size=0)
    with pytest.raises(ValueError, match=r"embedding must be \(vocabulary, hidden\), got \(3, 31"):
        adapters.Prompt().init(jnp.stack([embedding] * 3), 0)
    with pytest.raises(ValueError, match=r"embedding must be \(vocabulary, hidden\), got \(0, 4\)"):
        adapters.Prompt().init(jnp.ones((0, 4)), 0)
    with pytest.raises(TypeError, match="key must be a jax"):
        adapters.Prompt().init(embedding, None)
    with pytest.raises(ValueError, match=r"got \(10, 5\) and \(2, 7, 6\)"):
        adapters.prepend(jnp.ones((10, 5)), jnp.ones((2, 7, 6)))
    with pytest.raises(ValueError, match=r"got \(5,\) and \(5,\)"):
        adapters.prepend(jnp.ones(5), jnp.ones(5))


def test_settings_are_hashable_and_equal_by_value():
    settings = {adapters.Prefix(num_tokens=4), adapters.Prefix(num_tokens=4), adapters.Prompt()}
    assert settings == {adapters.Prefix(num_tokens=4), adapters.Prompt(num_tokens=10)}
