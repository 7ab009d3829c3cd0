"""What a zeroth-order optimizer keeps between steps, and what a step tells."""

from typing import Any, NamedTuple

import jax


class ZeroOrderState(NamedTuple):
    """State of a zeroth-order optimizer.

    Attributes:
      count: int32 ``()``: steps taken.
      key: uint32 ``(2,)``: the run's key.
      prepared: What the noise keeps between steps.
      moments: By name, a tuple with an array for each leaf that trains.
      scalars: By name, what the rule keeps beside.
    """

    count: jax.Array
    key: jax.Array
    prepared: Any
    moments: dict[str, tuple[Any, ...]]
    scalars: dict[str, jax.Array]


class StepInfo(NamedTuple):
    """What a step tells.

    Attributes:
      loss: float32 ``()``: at the parameters before the step if that was evaluated, else the mean
        of what was.
      coefficients: float32 ``(num_probes,)``: how steeply the loss rises along each direction; 0
        where ``eps`` is not above 0.
      record: float32 ``(k,)``: all that the update was made from; what was measured comes first.
      is_taken: bool ``()``: whether there was an update. There is none where a loss or a
        coefficient is not finite, ``eps`` is not above 0, or a conservative step is rejected.
    """

    loss: jax.Array
    coefficients: jax.Array
    record: jax.Array
    is_taken: jax.Array
