"""The native CPU kernels against the reference: the same codes, scales, and updates to rounding."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowbit
from optax_lowbit import FactoredMoment, Policy, QuantSpec, dequantize, is_quantized, quantize
from optax_lowbit.kernels.cpu import library, ops
from optax_lowbit.kernels.means import ManualAxes, square_means
from optax_lowbit.moments.presets import (
    FIRST_MOMENT_4BIT,
    FIRST_MOMENT_8BIT,
    SECOND_MOMENT_4BIT,
)
from optax_lowbit.quant import codebooks
from tests.kernels import step_results

pytestmark = pytest.mark.skipif(
    library.library() is None, reason="the native kernels were not built: no C++ compiler"
)

ALL = Policy(min_size=0)
BLOCKS = dataclasses.replace(SECOND_MOMENT_4BIT, scaling="block")
NF4 = QuantSpec(codebook="nf4", bits=4, signed=True, scaling="block", block_size=64)
TRANSFORMS = {
    "adam-rank1": functools.partial(optax_lowbit.scale_by_adam4bit),
    "adam-block": functools.partial(optax_lowbit.scale_by_adam4bit, nu_spec=BLOCKS),
    "adam-nesterov": functools.partial(optax_lowbit.scale_by_adam4bit, nesterov=True),
    "adam-mixed": functools.partial(
        optax_lowbit.scale_by_adam4bit,
        mu_spec=FIRST_MOMENT_8BIT,
        nu_spec=dataclasses.replace(BLOCKS, block_size=256),
    ),
    "adam-nf4": functools.partial(
        optax_lowbit.scale_by_adam4bit,
        mu_spec=NF4,
        nu_spec=dataclasses.replace(SECOND_MOMENT_4BIT, block_size=64),
    ),
    "adam-8bit": functools.partial(optax_lowbit.scale_by_adam8bit),
    "factored": functools.partial(optax_lowbit.scale_by_factor4bit),
    "momentum": functools.partial(optax_lowbit.trace4bit, 0.9),
    "momentum-nesterov": functools.partial(optax_lowbit.trace4bit, 0.9, nesterov=True),
}
LEAVES = {
    "whole blocks": ((256, 512), jnp.float32),
    "ragged": ((65, 131), jnp.float32),
    "ragged, bfloat16": ((140, 70), jnp.bfloat16),
    "vector": ((4099,), jnp.float32),
    "stack": ((3, 300, 200), jnp.float32),
    "small kernels, bfloat16": ((2, 3, 64, 130), jnp.bfloat16),
}


def gradients(shape, dtype, steps=4):
    """Of one sign at each place: where a sum cancels, a product rounded once more decides it."""
    rng = np.random.default_rng(0)
    signed = rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape))
    return [jnp.asarray(signed * rng.uniform(0.5, 2, shape), dtype) for _ in range(steps)]


def trajectory(tx, grads):
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    steps = []
    for grad in grads:
        result, state = update(grad, state)
        steps.append((result, state))
    return steps


# Of means: at most 64 additions one after the other in the reference and 48 in the kernel, each
# of numbers that are not negative.
FACTOR_TOLERANCE = (64 + 48) * 2**-24


def assert_same_states(state, expected):
    """Codes equal, scales to one unit in the last place, factors to their sums' roundings."""
    if isinstance(getattr(state, "nu", None), FactoredMoment):
        for ours, theirs in zip(*map(jax.tree.leaves, (state.nu, expected.nu)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=FACTOR_TOLERANCE)
        state, expected = state._replace(nu=()), expected._replace(nu=())
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        if ours.dtype == jnp.float32:
            np.testing.assert_array_max_ulp(np.asarray(ours), np.asarray(theirs), maxulp=1)
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_step_equals_the_reference(name, leaf):
    shape, dtype = LEAVES[leaf]
    make = functools.partial(TRANSFORMS[name], policy=ALL)
    grads = gradients(shape, dtype)
    is_factored = name == "factored" and len(shape) > 1
    reference = make(backend="reference")
    kernel = make(backend="cpu")
    state = kernel.init(grads[0])
    step, expected_step = jax.jit(kernel.update), jax.jit(reference.update)
    for grad in grads:
        # Both from the same state: an element within rounding of a boundary would part the two.
        expected_update, expected = expected_step(grad, state)
        update, state = step(grad, state)
        assert update.dtype == grad.dtype
        assert_same_states(state, expected)
        np.testing.assert_allclose(
            np.asarray(update, np.float64),
            np.asarray(expected_update, np.float64),
            # Of shares, columns and the mean in the shares the square root is taken.
            rtol=2**-7 if dtype == jnp.bfloat16 else 1e-6 + 1.5 * FACTOR_TOLERANCE * is_factored,
        )


@pytest.mark.parametrize("target", ["generic", "avx2"])
def test_lesser_instruction_sets_agree(target, tmp_path):
    def written(name, path):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        if name:
            environment["LOWBIT_CPU_TARGET"] = name
        done = subprocess.run(
            [sys.executable, "-W", "ignore", step_results.__file__, str(path)],
            env=environment, check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return done.stdout.strip()

    best = written(None, tmp_path / "best.npz")
    if written(target, tmp_path / "lesser.npz") != target:
        pytest.skip(f"this processor has no {target}")
    assert best != "generic" or target == "generic"
    assert step_results.compare(tmp_path / "lesser.npz", tmp_path / "best.npz") > 2e5


@pytest.mark.parametrize("spec", [FIRST_MOMENT_4BIT, BLOCKS, NF4, FIRST_MOMENT_8BIT], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(96, 200), (4099,), (3, 64, 256)], ids=str)
def test_quantize_and_dequantize_equal_the_reference(shape, dtype, spec):
    (x,) = gradients(shape, dtype, 1)
    x = x if spec.signed else jnp.abs(x)
    q, expected = jax.jit(ops.quantize, static_argnums=1)(x, spec), quantize(x, spec)
    jax.tree.map(np.testing.assert_array_equal, q, expected)
    back = jax.jit(ops.dequantize)(q)
    np.testing.assert_array_equal(back, optax_lowbit.dequantize(expected))


@pytest.mark.parametrize("spec", [FIRST_MOMENT_4BIT, FIRST_MOMENT_8BIT], ids=["4", "8"])
def test_ties_tiny_and_huge_blocks_and_non_finite_values(spec):
    table = np.asarray(spec.values, np.float32)
    ties = (table[:-1] + table[1:]) / 2
    rows = []
    # Every boundary, and its neighbours, under scales from the least to the largest.
    for scale in (1e-37, 3e-31, 0.1, 1.0, 7.3, 1e30, 3e38):
        around = [ties, np.nextafter(ties, np.float32(2)), np.nextafter(ties, np.float32(-2))]
        values = np.concatenate([np.resize(x, 255) for x in around])
        rows += [np.append(part, 1.0) * scale for part in np.split(values, 3)]
    rows += [np.zeros(256), np.full(256, 1e-45), np.r_[np.ones(255), np.nan]]
    rows += [np.r_[np.ones(255), np.inf], np.r_[np.ones(255), -np.inf]]
    x = jnp.asarray(np.array(rows), jnp.float32)
    q, expected = jax.jit(ops.quantize, static_argnums=1)(x, spec), quantize(x, spec)
    np.testing.assert_array_equal(q.codes, expected.codes)
    flushed = np.where(np.abs(expected.scales) < np.finfo(np.float32).tiny, 0, expected.scales)
    np.testing.assert_array_equal(q.scales, flushed)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["adam-rank1", "adam-block", "adam-8bit", "momentum"])
def test_overflow_stays_as_visible_as_in_the_reference(name, bad):
    (grad,) = gradients((64, 256), jnp.float32, 1)
    grad = grad.at[3, 130].set(bad)
    updates = []
    for update, state in (
        trajectory(TRANSFORMS[name](policy=ALL, backend=backend), [grad])[0]
        for backend in ("cpu", "reference")
    ):
        moments = [
            optax_lowbit.dequantize(leaf)
            for leaf in jax.tree.leaves(state, is_leaf=is_quantized)
            if is_quantized(leaf)
        ]
        updates.append(update[3, 130])
        assert not np.isfinite(update[3, 130])
        assert not any(np.isfinite(moment[3, 130]) for moment in moments)
        assert np.isfinite(np.delete(np.delete(np.asarray(update), 3, 0), 130, 1)).all()
    np.testing.assert_array_equal(*updates)


MAKERS = {
    "adamw4bit": lambda **kw: optax_lowbit.adamw4bit(1e-2, weight_decay=0.1, **kw),
    "adamw8bit": lambda **kw: optax_lowbit.adamw8bit(1e-2, weight_decay=0.1, **kw),
    "factor4bit": lambda **kw: optax_lowbit.factor4bit(1e-2, weight_decay=0.1, **kw),
    "sgd4bit": lambda **kw: optax_lowbit.sgd4bit(1e-2, momentum=0.9, **kw),
    "schedule": lambda **kw: optax_lowbit.adamw4bit(
        optax.linear_schedule(1e-2, 1e-3, 10), mask=lambda p: {"w": True, "b": False}, **kw
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MAKERS)
def test_fused_apply_equals_the_two_step_path(name, dtype, backend):
    params = dict(zip("wb", [gradients(s, dtype, 1)[0] for s in ((130, 257), (100,))]))
    tx = MAKERS[name](backend=backend)
    fused = jax.jit(functools.partial(optax_lowbit.fused_apply, tx))
    update = jax.jit(tx.update)
    state = tx.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda p, step=step: p * (step + 1), params)
        updates, expected_state = update(grads, state, params)
        expected = optax.apply_updates(params, updates)
        before = params
        params, state = fused(grads, state, params)
        assert_same_states(state, expected_state)
        # The two-step path rounds u, u + wd p, their product with the rate, and the sum.
        rounding = 2**-8 if dtype == jnp.bfloat16 else 2**-23
        for leaves in zip(*map(jax.tree.leaves, (params, expected, updates, before))):
            assert leaves[0].dtype == dtype
            ours, theirs, change, old = (np.asarray(x, np.float64) for x in leaves)
            bound = rounding * (np.abs(theirs) + np.abs(old) + 4 * np.abs(change))
            assert (np.abs(ours - theirs) <= bound).all(), (np.abs(ours - theirs) / bound).max()


@pytest.mark.parametrize("name", ["adamw4bit", "adamw8bit"])
def test_squares_beyond_float32_give_no_update(name):
    """As in Optax: a number over infinity. An estimate of the root of infinity would be NaN."""
    grad = jnp.ones((64, 256)).at[3, 5].set(1e20)
    results = {}
    for backend in ("cpu", "reference"):
        tx = MAKERS[name](backend=backend)
        params = jnp.ones((64, 256))
        results[backend] = jax.jit(tx.update)(grad, tx.init(params), params)[0]
    np.testing.assert_allclose(results["cpu"], results["reference"], rtol=1e-5)
    assert np.isfinite(results["cpu"][3, 5])


def test_parameters_of_other_dtypes_are_stepped_by_the_kernel_and_then_written():
    tx = MAKERS["adamw4bit"]()
    params, grad = jnp.ones((64, 256), jnp.float16), jnp.ones((64, 256))
    state = tx.init(params)
    new, _ = jax.jit(functools.partial(optax_lowbit.fused_apply, tx))(grad, state, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grad, state, params)
    assert new.dtype == jnp.float16
    np.testing.assert_allclose(new, 1 + updates, rtol=2**-10)


@pytest.mark.parametrize("scale", [2e-38, 3e-30, 1e-27, 1e-24, 1.0, 1e30])
def test_values_next_to_boundaries(scale):
    """Thresholds instead of quotients: every boundary of every scale, two units around it."""
    boundaries = codebooks.decision_table(FIRST_MOMENT_4BIT.values).boundaries
    rng = np.random.default_rng(0)
    scales = np.float32(scale) * rng.uniform(1, 2, (40, 1)).astype(np.float32)
    near = (boundaries * scales).astype(np.float32)
    steps = [near]
    for direction in (-np.inf, np.inf):
        step = near
        for _ in range(2):
            step = np.nextafter(step, np.float32(direction))
            steps.append(step)
    x = np.concatenate([scales, *steps], axis=1)
    x = np.pad(x, ((0, 0), (0, 128 - x.shape[1])))
    spec = dataclasses.replace(FIRST_MOMENT_4BIT, scaling="block", block_size=128)
    ours = jax.jit(ops.quantize, static_argnums=1)(jnp.asarray(x), spec)
    np.testing.assert_array_equal(ours.codes, quantize(jnp.asarray(x), spec).codes)


def test_values_of_a_table_that_is_not_sorted(rng):
    spec = QuantSpec(codebook="fp4", bits=4, signed=True, scaling="block", block_size=64)
    q = quantize(jnp.asarray(rng.normal(size=(256, 128)), jnp.float32), spec)
    assert ops.why_not("dequantize", q.shape, q.dtype, spec) is None
    assert ops.why_not("quantized_dot", (4096, 4096), q.dtype, spec) is None
    assert "not sorted" in ops.why_not("quantize", q.shape, q.dtype, spec)
    np.testing.assert_array_equal(ops.dequantize(q), dequantize(q))


def test_fused_apply_refuses_what_it_cannot_see_into():
    tx = optax.chain(optax.clip(1.0), optax_lowbit.adamw4bit(1e-3))
    with pytest.raises(ValueError, match="tx must be what an optimizer of this library"):
        optax_lowbit.fused_apply(tx, {}, tx.init({}), {})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rounding": "stochastic"}, "stochastic rounding"),
        ({"signed_scale": True}, "signed scales"),
        ({"bits": 3}, "3 bits"),
        ({"scaling": "row"}, "row scaling"),
        ({"block_size": 100}, "blocks of 100"),
        ({"block_size": 4096}, "blocks of 4096"),
        ({"codebook": (1.0, -1.0)}, "not sorted"),
    ],
    ids=str,
)
def test_the_predicate_names_its_reason(changes, reason):
    spec = dataclasses.replace(FIRST_MOMENT_4BIT, **changes)
    found = ops.why_not("momentum", (64, 128), jnp.dtype(jnp.float32), spec)
    assert found is not None and reason in found
    assert ops.why_not("momentum", (64, 128), jnp.dtype(jnp.float32), FIRST_MOMENT_4BIT) is None


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # of gradients: no output is like them
@pytest.mark.parametrize("name", ["adamw4bit", "adamw8bit", "sgd4bit"])
def test_an_update_needs_no_memory_of_its_own(name):
    params = {f"w{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(4)}

    def temporaries(backend):
        tx = MAKERS[name](backend=backend)

        def step(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, state, params).compile()
        sizes = compiled.memory_analysis()
        state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert sizes.alias_size_in_bytes >= state_bytes + 4 * 4 * 1024**2
        return sizes.temp_size_in_bytes / (4 * 4 * 1024**2)

    assert temporaries("cpu") < 0.005


def test_the_state_is_stepped_in_place():
    tx = optax_lowbit.scale_by_adam4bit(backend="cpu")
    leaf = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = update.lower(leaf, jax.eval_shape(tx.init, leaf)).compile()
    text = compiled.as_text()
    assert "optax_lowbit_step" in text
    copied = re.findall(r"= \w+\[(\d+),(\d+)\]\S* copy\(", text)
    assert all("1" in shape for shape in copied), copied  # rank-1 scales alone, before the new ones


@pytest.mark.parametrize(("shape", "parts"), [((600, 96), (2, 3)), ((2, 65, 2500), (1, 1))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_sums_of_squares(shape, parts, dtype):
    (x,) = gradients(shape, dtype, 1)
    rows, columns = jax.jit(ops.square_sums, static_argnums=(1, 2))(x, *parts)
    squares = np.square(np.asarray(x, np.float64))
    *leading, height, width = shape
    by_row = squares.reshape(*leading, height, parts[1], -1).sum(-1)
    by_column = squares.reshape(*leading, parts[0], -1, width).sum(-2)
    # 2**-24 for every sum of 16 lanes and of 256 rows, were all rounded one way.
    np.testing.assert_allclose(rows, by_row, rtol=2**-24 * width / 16)
    np.testing.assert_allclose(columns, by_column, rtol=2**-24 * min(height, 256))


def test_means_of_squares_that_are_not_finite():
    x = jnp.ones((64, 300)).at[5, 7].set(jnp.nan).at[9, 299].set(jnp.inf)
    rows, columns = square_means(x, 1e-30, "cpu", ManualAxes())
    for means, size, nan, infinite in (rows[:, 0], 64, 5, 9), (columns[0], 300, 7, 299):
        expected = np.ones(size)
        expected[nan], expected[infinite] = np.nan, np.inf
        np.testing.assert_allclose(means, expected, rtol=1e-6)
