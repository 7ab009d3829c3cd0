"""What the native kernels give on this processor, to set beside that of another: no test.

`step_results.py FILE` writes three steps of each optimizer, `step_results.py FILE OTHER` compares
what two processors wrote.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import optax_lowbit
from optax_lowbit.kernels.cpu import library

MAKERS = {
    "adam4bit": optax_lowbit.scale_by_adam4bit,
    "adam8bit": optax_lowbit.scale_by_adam8bit,
    "factor4bit": optax_lowbit.scale_by_factor4bit,
    "momentum": lambda **options: optax_lowbit.trace4bit(0.9, **options),
}
SHAPES = (96, 200), (3, 128, 256), (6000,)


def write(path: pathlib.Path) -> None:
    """All updates and states, by optimizer, shape and step."""
    rng = np.random.default_rng(0)
    results = {}
    for name, make in MAKERS.items():
        for shape in SHAPES:
            tx = make(backend="cpu", policy=optax_lowbit.Policy(min_size=0))
            grad = jnp.asarray(rng.normal(size=shape) ** 3, jnp.float32)
            state, update = tx.init(grad), jax.jit(tx.update)
            for step in range(3):
                result = update(grad, state)
                state = result[1]
                for number, leaf in enumerate(jax.tree.leaves(result)):
                    results[f"{name} {shape} {step} {number}"] = np.asarray(leaf)
    np.savez(path, **results)


def compare(path: pathlib.Path, other: pathlib.Path) -> int:
    """Checks that codes are equal and the rest is within rounding; returns how many codes."""
    codes = 0
    with np.load(path) as ours, np.load(other) as theirs:
        assert ours.files == theirs.files
        for name in ours.files:
            if ours[name].dtype == np.uint8:
                np.testing.assert_array_equal(ours[name], theirs[name], name)
                codes += ours[name].size
            else:
                np.testing.assert_allclose(ours[name], theirs[name], 1e-6, 1e-6, err_msg=name)
    return codes


if __name__ == "__main__":
    first, *second = map(pathlib.Path, sys.argv[1:])
    if second:
        print(f"{compare(first, *second):,} bytes of codes are equal")
    else:
        write(first)
        print(library.target_name())
