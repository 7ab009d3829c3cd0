"""What a transform keeps of each leaf, in how many bytes, and why."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax

from optax_lowbit.moments.policy import (
    Decision,
    Factored,
    KernelChoice,
    recorded_decisions,
)
from optax_lowbit.quant import QuantSpec


@dataclasses.dataclass(frozen=True)
class Description:
    """How a transform's state is stored; ``print`` it for a table.

    Attributes:
      decisions: One for each moment of each leaf, in the order of the leaves.
      kernels: One for each leaf with low-bit moments: the backend that steps it on this process's
        platform, and why it is the reference where it is.
      parameters: Number of parameters.
      other_bytes: Bytes of the state that belong to no low-bit moment: counters, and the states of
        other transforms in the chain.
    """

    decisions: tuple[Decision, ...]
    kernels: tuple[KernelChoice, ...]
    parameters: int
    other_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole state."""
        return sum(decision.nbytes for decision in self.decisions) + self.other_bytes

    def __str__(self) -> str:
        moments = list(dict.fromkeys(decision.moment for decision in self.decisions))
        rows = [["leaf", "shape", *moments, "bytes", "kernel", "remark"]]
        kernels = {(choice.path, choice.shape): choice for choice in self.kernels}
        by_leaf: dict[tuple[str, tuple[int, ...]], dict[str, Decision]] = {}
        for decision in self.decisions:
            by_leaf.setdefault((decision.path, decision.shape), {})[decision.moment] = decision
        for (path, shape), by_moment in by_leaf.items():
            stored = [_storage(by_moment[name]) if name in by_moment else "" for name in moments]
            nbytes = sum(decision.nbytes for decision in by_moment.values())
            size = "x".join(map(str, shape)) or "scalar"
            kernel, reason = _kernel(kernels.get((path, shape)))
            remark = "; ".join(filter(None, [_remark(by_moment), reason]))
            rows.append([path or ".", size, *stored, f"{nbytes:,}", kernel, remark])
        return "\n".join([*_aligned(rows), self._total()])

    def _total(self) -> str:
        each = self.nbytes / max(self.parameters, 1)
        return (
            f"total: {self.parameters:,} parameters, {self.nbytes:,} bytes of state, "
            f"{each:.3f} bytes a parameter"
        )


def describe(tx: optax.GradientTransformation, params: Any) -> Description:
    """Tells how a transform's state is stored, leaf by leaf, and why a leaf is left in float32.

    Nothing is computed or allocated.

    Args:
      tx: Any transform; the low-bit ones in it may be chained, masked, partitioned, or wrapped.
      params: The parameters, or `jax.ShapeDtypeStruct` in their place.

    Returns:
      A :class:`Description`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> params = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
      ...           "bias": jax.ShapeDtypeStruct((1024,), jnp.float32)}
      >>> print(optax_lowbit.describe(optax_lowbit.adamw4bit(1e-3), params))
      leaf    shape      mu        nu        bytes   kernel  remark
      bias    1024       float32   float32   8,192   optax   1024 elements, min_size 4096
      kernel  1024x1024  dynamic_exponent 4b block 128  linear 4b rank1     1,089,536  cpu
      total: 1,049,600 parameters, 1,097,732 bytes of state, 1.046 bytes a parameter
    """
    with recorded_decisions() as records:
        # A function of its own: eval_shape remembers what it has seen, and would not run it again.
        state = jax.eval_shape(lambda params: tx.init(params), params)
    decisions = tuple(record for record in records if isinstance(record, Decision))
    kernels = tuple(record for record in records if isinstance(record, KernelChoice))
    low_bit = sum(decision.nbytes for decision in decisions)
    total = sum(leaf_nbytes(leaf) for leaf in jax.tree.leaves(state))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return Description(decisions, kernels, parameters, total - low_bit)


def leaf_nbytes(leaf: Any) -> int:
    """Bytes of an array or `jax.ShapeDtypeStruct`, which may be of keys."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _storage(decision: Decision) -> str:
    spec = decision.spec
    if isinstance(spec, Factored):
        return "row and column means"
    if not isinstance(spec, QuantSpec):
        return decision.dtype
    table = spec.codebook if isinstance(spec.codebook, str) else f"{len(spec.codebook)} values"
    block = f" {spec.block_size}" if spec.scaling == "block" else ""
    scales = ", 8b scales" if spec.double_quant else ""
    return f"{table} {spec.bits}b {spec.scaling}{block}{scales}"


def _kernel(choice: KernelChoice | None) -> tuple[str, str]:
    if choice is None:
        return "optax", ""
    return choice.backend, choice.reason and f"no kernel: {choice.reason}"


def _remark(by_moment: dict[str, Decision]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, decision in by_moment.items():
        if decision.reason:
            reasons.setdefault(decision.reason, []).append(name)
    return "; ".join(
        reason if len(names) == len(by_moment) else f"{', '.join(names)}: {reason}"
        for reason, names in reasons.items()
    )


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
