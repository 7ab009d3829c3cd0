"""Which elements masks leave out, and how many."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_lowbit import zo
from optax_lowbit.zo.selection import threshold
from tests.zo.cases import moved_by

SIGNS = zo.Rademacher()


def values():
    """Leaves of many sizes and scales."""
    keys = jax.random.split(jax.random.key(5), 3)
    return {
        "large": jax.random.normal(keys[0], (10, 50)),
        "small": jax.random.normal(keys[1], (31,)) * 0.02,
        "scalar": jnp.asarray(0.5),
    }


def steps(noise, count, params=None):
    """The masks of some steps: True where an element takes part."""
    opt = zo.zo_sgd(1.0, noise=noise)
    params = values() if params is None else params
    move = jax.jit(functools.partial(moved_by, opt, params))
    state, masks = opt.init(params, 1), []
    for _ in range(count):
        new, state = move(state)
        masks.append(jax.tree.map(lambda x, y: np.asarray(x != y), new, params))
    return masks


@pytest.mark.parametrize("make", [zo.RandomMask, zo.MagnitudeMask])
def test_share_left_out_is_exact_and_masks_live_for_an_interval(make):
    # The reference leaves out Phi(0.1) = 0.54 of what 0.1 names.
    masks = steps(make(SIGNS, 0.1, 3), 7)
    for mask in masks:
        left_out = {name: int((~x).sum()) for name, x in mask.items()}
        assert left_out == {"large": 50, "small": 3, "scalar": 0}
    kept = [mask["large"].ravel().tolist() for mask in masks]
    is_new = [a != b for a, b in itertools.pairwise(kept)]
    assert is_new == [False, False, make is zo.RandomMask] * 2


def test_magnitude_mask_keeps_the_small_weights():
    params = values()
    (mask,) = steps(zo.MagnitudeMask(SIGNS, 0.75, 1), 1)
    for name, leaf in params.items():
        size = np.sort(np.abs(np.asarray(leaf)).ravel())
        largest_kept = size[leaf.size - round(0.75 * leaf.size) - 1] if leaf.ndim else -1
        np.testing.assert_array_equal(mask[name], np.abs(leaf) <= largest_kept)


def test_threshold_lives_for_an_interval_while_weights_move():
    opt = zo.zo_sgd(1.0, noise=zo.MagnitudeMask(SIGNS, 0.5, 2))
    weights = jnp.array([1.0, 2.0, 3.0, 4.0])
    move = jax.jit(functools.partial(moved_by, opt))
    state, masks = opt.init(weights, 0), []
    for scale in (1, 2, 2):
        new, state = move(weights * scale, state)
        masks.append((new != weights * scale).tolist())
    assert masks == [[True, True, False, False], [True] + [False] * 3, [True, True, False, False]]


def test_global_masks_have_one_share_for_all_leaves():
    params = values()
    (by_size,) = steps(zo.MagnitudeMask(SIGNS, 0.3, 1, "global"), 1)
    sizes = np.concatenate([np.abs(np.asarray(x)).ravel() for x in params.values()])
    left_out = round(0.3 * 532)
    bound = np.sort(sizes)[::-1][left_out - 1]
    for name, leaf in params.items():
        np.testing.assert_array_equal(by_size[name], np.abs(leaf) < bound)
    (at_random,) = steps(zo.RandomMask(SIGNS, 0.3, 1, "global"), 1)
    bound = np.sort(sizes)[left_out - 1]  # the small weights now decide how many of a leaf
    for name, leaf in params.items():
        assert (~at_random[name]).sum() == (np.abs(leaf) <= bound).sum()
    assert not at_random["small"].any()
    assert (at_random["large"] != (np.abs(params["large"]) > bound)).any()


def test_equal_weights_take_part_together():
    # An adapter's factor that starts as zeros, and values of which a share is equal.
    params = {"zeros": jnp.zeros((4, 5)), "steps": jnp.array([1.0, 2.0, 2.0, -2.0, 3.0])}
    (mask,) = steps(zo.MagnitudeMask(SIGNS, 0.6, 1), 1, params)
    assert mask["zeros"].all()
    assert mask["steps"].tolist() == [True, True, True, True, False]


def test_random_mask_has_no_pattern():
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))}
    first, second = steps(zo.RandomMask(SIGNS, 0.5, 1), 2, params)
    samples = np.stack([2.0 * x.ravel() - 1 for m in (first, second) for x in m.values()])
    products = samples @ samples.T / 4096 - np.eye(4)
    assert np.abs(products).max() < 5 / 64
    for x in samples.reshape(4, 64, 64):  # five standard deviations of 64 signs
        assert max(np.abs(x.mean(0)).max(), np.abs(x.mean(1)).max()) < 5 / 8


@pytest.mark.parametrize("kind", ["spread", "equal", "two", "crowded", "extremes"])
def test_threshold_has_as_many_below_it(kind):
    rng = np.random.default_rng(0)
    scores = {
        "spread": rng.integers(0, 2**31, 999),
        "equal": np.full(999, 12345),
        "two": np.array([0, 2**31 - 1] * 500)[:999],
        "crowded": rng.integers(10**6, 10**6 + 300, 999),
        "extremes": np.array([0, 1, 2**31 - 2, 2**31 - 1] * 250)[:999],
    }[kind].astype(np.uint32)
    passes = []

    def below(bound):
        jax.debug.callback(lambda: passes.append(1))
        return jnp.sum(jnp.asarray(scores) < bound, dtype=jnp.int32)

    find = jax.jit(lambda wanted: threshold(below, wanted, 999))
    for wanted in (0, 1, 2, 498, 500, 998, 999):
        passes.clear()
        bound = int(find(jnp.int32(wanted)))
        jax.effects_barrier()
        assert len(passes) <= 62
        count = (scores < bound).sum()
        # More only if the highest of them are equal, and then all of those are needed.
        ties = (scores[scores < bound] == bound - 1).sum() if count else 0
        assert count == wanted or (count > wanted and count - ties < wanted)


def test_impossible_arguments_are_refused():
    for make in (zo.RandomMask, zo.MagnitudeMask):
        for ratio in (-0.1, 1.0, 1.5, "0.5", float("nan")):
            with pytest.raises(ValueError, match="ratio must be the share left out"):
                make(SIGNS, ratio, 1)
        with pytest.raises(ValueError, match="interval must be an int of at least 1"):
            make(SIGNS, 0.5, 0)
        with pytest.raises(ValueError, match="scope must be 'leaf' or 'global'"):
            make(SIGNS, 0.5, 1, "layer")
        with pytest.raises(TypeError, match="noise must be a Noise, got float"):
            make(0.5, 0.5, 1)
        opt = zo.zo_sgd(1.0, noise=make(SIGNS, 0.5, 1, "global"))
        leaf = jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32)
        with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements, got 2147483648"):
            jax.eval_shape(functools.partial(opt.init, key=0), [leaf, leaf])
