"""What the optimizers step over: shapes, and gradients of those shapes."""

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """Parameters by their shapes.

    Attributes:
      name: A few words, for titles.
      shapes: Of the parameters, all float32.
      batch: 0: an optimizer step alone, on gradients that are given. Otherwise a training step: the
        shapes are those of a multilayer perceptron (kernel, bias, kernel, bias, ...) and it is fed
        this many examples.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    batch: int = 0

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)


def square(size: int) -> Workload:
    """One square matrix."""
    return Workload(f"one {size}x{size} matrix", ((size, size),))


def power_of_two(exponent: int) -> Workload:
    """One matrix of ``2**exponent`` elements, square or with half as many columns as rows."""
    shape = (2 ** ((exponent + 1) // 2), 2 ** (exponent // 2))
    return Workload(f"2^{exponent} elements", (shape,))


def perceptron(layers: int, width: int, batch: int) -> Workload:
    """A training step of a multilayer perceptron."""
    name = f"perceptron of {layers} layers of {width}x{width}, batch {batch}"
    return Workload(name, ((width, width), (width,)) * layers, batch)


def decoder(
    name: str, layers: int, hidden: int, feed_forward: int, key_value: int, vocabulary: int
) -> Workload:
    """The parameters of a LLaMA-like decoder with tied embeddings, every layer its own leaves.

    Args:
      name: Of the model.
      layers, hidden, feed_forward, vocabulary: Its sizes.
      key_value: Width of all key heads together, and of all value heads.
    """
    layer = (
        (hidden,),  # norm before attention
        (hidden, hidden),  # query
        (hidden, key_value),
        (hidden, key_value),
        (hidden, hidden),  # output
        (hidden,),  # norm before the feed-forward block
        (hidden, feed_forward),  # gate
        (hidden, feed_forward),  # up
        (feed_forward, hidden),  # down
    )
    return Workload(name, ((vocabulary, hidden), *layer * layers, (hidden,)))


SMOLLM2 = decoder(
    "parameters of SmolLM2-135M",
    layers=30,
    hidden=576,
    feed_forward=1536,
    key_value=3 * 64,
    vocabulary=49152,
)


@functools.cache
def gradients(workload: Workload) -> list[np.ndarray]:
    """Gradients, float32, drawn once: all contestants step on copies of the same."""
    generator = np.random.default_rng(0)
    scale = np.float32(0.01)
    return [scale * generator.standard_normal(s, np.float32) for s in workload.shapes]


@functools.cache
def examples(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a training step, float32, ``(batch, width)``."""
    generator = np.random.default_rng(1)
    shape = (workload.batch, workload.shapes[0][0])
    return generator.standard_normal(shape, np.float32), generator.standard_normal(
        shape, np.float32
    )


def initial_parameters(workload: Workload) -> list[np.ndarray]:
    """Where all contestants start: normal, scaled by the square root of the number of rows."""
    generator = np.random.default_rng(2)
    return [
        np.float32(shape[0] ** -0.5) * generator.standard_normal(shape, np.float32)
        for shape in workload.shapes
    ]
