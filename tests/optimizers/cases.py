"""The optimizers under contract, the trees they are run on, and how results are compared."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowbit
from optax_lowbit import QuantSpec, is_quantized

FOUR = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block")


@dataclasses.dataclass(frozen=True)
class Case:
    """One public optimizer with the arguments that it is tested with."""

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    arguments: tuple[tuple[str, Any], ...]
    moments: tuple[str, ...] = ("mu", "nu")
    # The constant learning rate that reaches small targets, if not that of Adam or of momentum.
    small_rate: float | None = None

    def make(self, **overrides) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**dict(self.arguments), **overrides})

    def make_descending(self, learning_rate) -> optax.GradientTransformation:
        """An optimizer that goes downhill, also for a core without a learning rate."""
        if self.has("learning_rate"):
            return self.make(learning_rate=learning_rate)
        return optax.chain(self.make(), optax.scale_by_learning_rate(learning_rate))

    def has(self, argument: str) -> bool:
        return argument in dict(self.arguments)

    @property
    def is_momentum(self) -> bool:
        return self.has("momentum") or self.has("decay")

    @property
    def has_count(self) -> bool:
        """Whether its core counts its steps, as most of optax's do."""
        return self.factory not in (optax_lowbit.rmsprop8bit, optax_lowbit.adagrad8bit)


def _case(factory, suffix="", moments=("mu", "nu"), small_rate=None, **arguments) -> Case:
    if "momentum" in arguments or "decay" in arguments:
        moments = ("trace",)
    name = factory.__name__ + suffix
    return Case(name, factory, tuple(arguments.items()), moments, small_rate)


OPTIMIZERS = [
    _case(optax_lowbit.adamw4bit, learning_rate=1e-2),
    _case(optax_lowbit.adam4bit, learning_rate=1e-2),
    _case(optax_lowbit.sgd4bit, learning_rate=1e-3, momentum=0.9),
    _case(optax_lowbit.sgd4bit, "-nesterov", learning_rate=1e-3, momentum=0.9, nesterov=True),
    _case(optax_lowbit.factor4bit, learning_rate=1e-2),
    _case(optax_lowbit.adamw8bit, learning_rate=1e-2),
    _case(optax_lowbit.adam8bit, learning_rate=1e-2),
    _case(optax_lowbit.sgd8bit, learning_rate=1e-3, momentum=0.9),
    _case(optax_lowbit.lion8bit, moments=("mu",), small_rate=3e-3, learning_rate=1e-2),
    # An average of 100 steps: that of 10,000 does not converge in hundreds, with optax's either.
    _case(
        optax_lowbit.ademamix4bit,
        moments=("m1", "m2", "nu"),
        learning_rate=1e-2,
        b3=0.99,
        alpha=1.0,
    ),
    _case(optax_lowbit.rmsprop8bit, moments=("nu",), learning_rate=1e-2),
    _case(optax_lowbit.rmsprop8bit, "-centered", learning_rate=1e-2, centered=True),
    _case(optax_lowbit.adagrad8bit, moments=("sum_of_squares",), small_rate=1.0, learning_rate=1.0),
]
CORES = [
    _case(optax_lowbit.scale_by_adam4bit),
    _case(optax_lowbit.scale_by_adam8bit),
    _case(optax_lowbit.scale_by_factor4bit),
    _case(optax_lowbit.trace4bit, decay=0.9),
]
# One for each way to store moments: wrappers see no more of the others.
FAMILIES = [
    case for case in OPTIMIZERS if case.name in ("adamw4bit", "sgd4bit", "factor4bit", "adamw8bit")
]

each_case = pytest.mark.parametrize("case", OPTIMIZERS + CORES, ids=lambda case: case.name)
each_optimizer = pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
each_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


# Leaves that are quantized by default, one of every rank, and leaves that are not.
SHAPES = {
    "matrix": (64, 128),
    "vector": (8192,),
    "kernel": (3, 3, 16, 64),
    "bias": (64,),
    "scalar": (),
}
SMALL_SHAPES = {"matrix": (64, 128), "bias": (64,)}


def normal_tree(shapes=None, seed=0, dtype=jnp.float32, scale=1.0):
    """A dict of normally distributed arrays."""
    rng = np.random.default_rng(seed)
    shapes = SMALL_SHAPES if shapes is None else shapes
    return {
        name: jnp.asarray(rng.normal(size=shape, scale=scale), dtype)
        for name, shape in shapes.items()
    }


def abstract_tree(shapes, dtype):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


@functools.cache
def jitted_update(case: Case):
    """The case's transform and its jitted update, compiled once for all tests of a module."""
    tx = case.make()
    return tx, jax.jit(tx.update)


def standard_promotion():
    """For optax's own schedules and accumulation, whose arithmetic strict promotion refuses."""
    return jax.numpy_dtype_promotion("standard")


def run_steps(update, state, params, grads):
    """All updates, and the last state, for a list of gradients; the parameters stay."""
    all_updates = []
    for step_grads in grads:
        updates, state = update(step_grads, state, params)
        all_updates.append(updates)
    return all_updates, state


@functools.cache
def trained(case: Case):
    """Parameters, gradients and a state after two steps."""
    tx, update = jitted_update(case)
    params, grads = normal_tree(seed=0), normal_tree(seed=1)
    _, state = run_steps(update, tx.init(params), params, [grads, grads])
    return params, grads, state


def quantized_leaves(tree) -> list[optax_lowbit.QuantizedArray]:
    return [q for q in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(q)]


def assert_bit_equal(actual, expected):
    """The same structure, static fields included, dtypes and bits (NaN equals NaN)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert jnp.result_type(x) == jnp.result_type(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_equal_up_to_rounding(actual, expected):
    """Floats nearly equal, and codes but for a few values that lie on a border."""

    def compare(x, y):
        if is_quantized(x):
            assert x.spec == y.spec
            assert np.mean(np.asarray(x.codes) != np.asarray(y.codes)) < 1e-3
            x, y = x.scales, y.scales
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), x, y)

    jax.tree.map(compare, actual, expected, is_leaf=is_quantized)


def assert_same_types(actual, expected):
    """The same structure, shapes, dtypes and weak types; of abstract trees too."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.leaves(jax.tree.map(_type, actual)) == jax.tree.leaves(
        jax.tree.map(_type, expected)
    )


def _type(x) -> str:
    weak = getattr(x, "weak_type", False)
    return f"{np.dtype(x.dtype)}{tuple(x.shape)}{' weak' if weak else ''}"
