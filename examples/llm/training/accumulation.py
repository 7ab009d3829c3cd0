"""A batch in several pieces that go through the model one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Loss = Callable[..., jax.Array]


@dataclass(frozen=True)
class AccumulatedLoss:
    """A loss over microbatches, which need the memory of one.

    Called with `(parameters, frozen, batches)`, where arrays of `batches` have a leading axis over
    the microbatches. A mean over all that they hold: each counts by its weight, so that it is the
    loss of the whole batch, where a mean of the microbatches' means is not if they have unlike
    numbers of tokens.

    Attributes:
      loss: `(parameters, frozen, batch) -> float32 ()`, a mean.
      weight: `(batch) -> float32 ()`, the number that it is a mean of.
    """

    loss: Loss
    weight: Callable[[Any], jax.Array]

    def __call__(self, parameters: Any, frozen: Any, batches: Any) -> jax.Array:
        """The loss of the whole batch."""

        def add(total, batch):
            share = self.weight(batch) / whole
            return total + share * self.loss(parameters, frozen, batch), None

        whole = self._whole(batches)
        return jax.lax.scan(add, jnp.float32(0), batches)[0]

    def value_and_grad(self, parameters: Any, frozen: Any, batches: Any) -> tuple[jax.Array, Any]:
        """The loss of the whole batch, and its gradient, summed up microbatch by microbatch."""

        def add(totals, batch):
            share = self.weight(batch) / whole
            found = jax.value_and_grad(self.loss)(parameters, frozen, batch)
            return jax.tree.map(lambda t, x: t + share.astype(x.dtype) * x, totals, found), None

        whole = self._whole(batches)
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
        return jax.lax.scan(add, zeros, batches)[0]

    def _whole(self, batches: Any) -> jax.Array:
        return jnp.sum(jax.vmap(self.weight)(batches))


def loss_and_gradients(loss_fn: Loss, parameters: Any, *args: Any) -> tuple[jax.Array, Any]:
    """Return a loss and its gradient by backpropagation."""
    if isinstance(loss_fn, AccumulatedLoss):
        return loss_fn.value_and_grad(parameters, *args)
    return jax.value_and_grad(loss_fn)(parameters, *args)
