"""`quantize_state` over everything that optax exports, against Algorithm 1 written plainly."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lowbit import dequantize, is_quantized, quantize, quantize_state
from optax_lowbit.optimizers import any_update
from tests.optimizers.any_state_cases import CASES, UNANNOTATED, exported, table, without_keys
from tests.optimizers.cases import (
    assert_bit_equal,
    assert_same_types,
    normal_tree,
    quantized_leaves,
    standard_promotion,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPES = {"matrix": (96, 128), "bias": (96,)}
ELEMENTS = 96 * 128
# 4-bit codes and a float32 for each block of 128, or for each row and each column.
SIGNED_BYTES = ELEMENTS // 2 + 4 * 96
NONNEGATIVE_BYTES = ELEMENTS // 2 + 4 * (96 + 128)

# A row of their own has the direction that they scale: `scale_by_adam`, `trace`, ...
ALIASES = frozenset(
    "acprop adabelief adadelta adagrad adam adamax adamaxw adamw adan ademamix adopt amsgrad "
    "galore lion nadam nadamw novograd radam rmsprop sgd signum simplified_ademamix sm3 "
    "yogi".split()
)
working = [case for case in CASES if case.moments and case.name not in ALIASES]
aliases = [case for case in CASES if case.name in ALIASES]
plain = [case for case in CASES if not case.moments and not case.refused]
by_name = {case.name: case for case in CASES}


def ids(case):
    return case.name


def loss_fn(params):
    return sum(0.5 * jnp.sum((p - 1) ** 2) for p in jax.tree.leaves(params))


def gradients(case, params):
    """Gradients as the case wants them, and its extra arguments."""
    value, grads = jax.value_and_grad(loss_fn)(params)
    if case.name in ("dpsgd", "differentially_private_aggregate"):  # of each example
        grads = jax.tree.map(lambda g: jnp.stack([g, g]), grads)
    known = {"value": value, "grad": grads, "value_fn": loss_fn, "obj_fn": loss_fn}
    return grads, {name: known[name] for name in case.needs if name in known}


def tree_for(case):
    # Muon's core is for matrices alone.
    shapes = {"matrix": SHAPES["matrix"]} if case.name == "scale_by_muon" else SHAPES
    return normal_tree(shapes)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def transform(case):
    made = case.make()
    return made.gradient_transformation() if isinstance(made, optax.MultiSteps) else made


def algorithm_1(case, grads, state, params, extra):
    """Dequantize all, let optax step, quantize all; what a step leaves alone keeps its codes."""
    tx = optax.with_extra_args_support(transform(case))
    floats = jax.tree.map(
        lambda x: dequantize(x) if is_quantized(x) else x, state, is_leaf=is_quantized
    )
    updates, new = tx.update(grads, floats, params, **extra)

    def stored(old, before, after):
        if not is_quantized(old) or (before == after).all():
            return old if is_quantized(old) else after
        return quantize(after, old.spec)

    return updates, jax.tree.map(stored, state, floats, new, is_leaf=is_quantized)


def assert_close(actual, expected, rtol=2e-5, atol=0.0):
    """Floats equal up to rounding; codes but for a few that lie on a border."""

    def compare(x, y):
        if is_quantized(x):
            assert np.mean(np.asarray(x.codes) != np.asarray(y.codes)) < 2e-3
            x, y = x.scales, y.scales
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
                largest = np.abs(np.asarray(b, np.float64)).max(initial=0)
                np.testing.assert_allclose(a, b, rtol=rtol, atol=atol + 1e-6 * largest)

    jax.tree.map(compare, actual, expected, is_leaf=is_quantized)


# Where rounding is magnified: bias correction by a difference of large numbers, which a compiler
# rounds otherwise; updates that are differences of iterates near 1.
TOLERANCES = {
    "radam": (2e-3, 0),
    "scale_by_radam": (2e-3, 0),
    "schedule_free": (2e-5, 1e-6),
    "schedule_free_adamw": (2e-5, 1e-6),
}


def assert_moments_are_low_bit(case, params, state):
    with standard_promotion():
        in_floats = nbytes(transform(case).init(params))
    assert len(quantized_leaves(state)) == len(case.moments)
    saved = 4 * ELEMENTS * len(case.moments)
    saved -= SIGNED_BYTES * len(case.signed) + NONNEGATIVE_BYTES * len(case.nonnegative)
    if "galore" not in case.name:  # whose moments have another shape
        assert nbytes(state) == in_floats - saved


@pytest.mark.parametrize("case", aliases, ids=ids)
def test_an_alias_keeps_the_moments_of_its_direction(case):
    tx, params = quantize_state(case.make()), tree_for(case)
    state = tx.init(params)
    assert_moments_are_low_bit(case, params, state)
    with standard_promotion():
        updates, new = jax.eval_shape(lambda s: tx.update(params, s, params), state)
    assert_same_types(updates, params)
    assert_same_types(new, state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # optax's own
@pytest.mark.parametrize("case", working, ids=ids)
def test_ten_steps_are_finite_and_the_last_is_algorithm_1(case, monkeypatch):
    tx, splits = quantize_state(case.make()), []

    def spy(*arguments):
        splits.append(split(*arguments))
        return splits[-1]

    split = any_update.split_by_leaf
    monkeypatch.setattr(any_update, "split_by_leaf", spy)
    params = tree_for(case)
    state = tx.init(params)
    assert_moments_are_low_bit(case, params, state)

    def step(carry, _):
        params, state, _, _ = carry
        grads, extra = gradients(case, params)
        updates, new_state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), new_state, params, state), updates

    with standard_promotion():
        carry, updates = jax.jit(lambda *c: jax.lax.scan(step, c, None, length=10))(
            params, state, params, state
        )
    _, last_state, last_params, before = carry
    assert_same_types(without_keys(last_state), without_keys(state))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert (splits[-1] is not None) == case.by_leaf
    grads, extra = gradients(case, last_params)
    with standard_promotion():
        expected = algorithm_1(case, grads, before, last_params, extra)
    last_updates = jax.tree.map(lambda u: u[-1], updates)
    assert_close((last_updates, last_state), expected, *TOLERANCES.get(case.name, ()))


@pytest.mark.parametrize("case", plain, ids=ids)
def test_without_moments_it_is_the_transform_itself(case):
    params = tree_for(case)
    grads, extra = gradients(case, params)
    tx, theirs = quantize_state(case.make()), optax.with_extra_args_support(transform(case))
    with standard_promotion(), jax.numpy_rank_promotion("allow"):
        state = theirs.init(params)
        expected = theirs.update(grads, state, params, **extra)
        assert_bit_equal(without_keys(tx.init(params)), without_keys(state))
        actual = tx.update(grads, state, params, **extra)
    assert_bit_equal(without_keys(actual), without_keys(expected))


@pytest.mark.parametrize("case", [case for case in CASES if case.refused], ids=ids)
def test_what_cannot_work_is_refused_at_init(case):
    params = normal_tree(SHAPES)
    if case.name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    with pytest.raises(ValueError, match=f"{case.refused}.*quantize_state"):
        quantize_state(case.make()).init(params)


def test_the_table_has_all_that_optax_exports():
    transforms, unannotated = exported()
    assert unannotated == UNANNOTATED.keys()
    transforms |= {name for name, is_transform in UNANNOTATED.items() if is_transform}
    assert sorted(by_name) == sorted(transforms)
    assert len(by_name) == len(CASES)


def test_the_page_has_this_table():
    assert table() in (ROOT / "docs" / "any_optimizer.md").read_text()
