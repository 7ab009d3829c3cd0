"""Where a matrix in few bits lies on a mesh of devices: as its float form would, block by block."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowbit.kernels.meshes import mesh_axes
from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix
from optax_lowbit.quant.offset_scales import OffsetScales


def matrix_sharding(matrix: QuantizedMatrix, sharding: NamedSharding) -> QuantizedMatrix:
    """The shardings of a matrix's arrays, for `jax.device_put`, `jax.jit` or Orbax.

    Codes and block scales are spread as the elements that they belong to. What double quantization
    keeps for 256 scales at once is on every device: 0.002 bits an element.

    Args:
      matrix: Of arrays or of `jax.ShapeDtypeStruct`.
      sharding: Of the kernel ``(..., n, m)``.

    Returns:
      A :class:`QuantizedMatrix` of `jax.sharding.NamedSharding`.

    Raises:
      TypeError: If an argument has another type.
      ValueError: If the sharding has more axes than the kernel, or a shard would not hold whole
        blocks: along ``n`` shards must be multiples of the block.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from optax_lowbit import qlora
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> w = qlora.quantize_matrix(jnp.ones((64, 512)))
      >>> w = jax.device_put(w, qlora.matrix_sharding(w, NamedSharding(mesh, P(None, "model"))))
      >>> w.rows.codes.sharding.spec
      P('model',)
    """
    if not isinstance(matrix, QuantizedMatrix):
        raise TypeError(f"matrix must be a QuantizedMatrix, got {type(matrix).__name__}")
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"sharding must be a NamedSharding, got {type(sharding).__name__}")
    if len(sharding.spec) > matrix.ndim:
        raise ValueError(f"sharding has {sharding.spec}, and the matrix has {matrix.ndim} axes")
    *stack, along_n, along_m = _entries(matrix, sharding.spec)
    parts = _parts(sharding, along_n), _parts(sharding, along_m)
    group = matrix.spec.group_size
    if _is_flat(matrix) and parts == (1, 1):
        along_n = along_m = None
    elif not _is_flat(matrix) and (matrix.n % (parts[0] * group) or matrix.m % parts[1]):
        raise ValueError(
            f"sharding {sharding.spec} cuts a matrix {matrix.shape} into {parts[0]} x {parts[1]}; "
            f"the last axis but one must be a multiple of {parts[0]} x {group}, for shards of "
            f"whole blocks, and the last one of {parts[1]}"
        )
    specs = matrix_specs(matrix, PartitionSpec(*stack, along_n, along_m))

    def placed(spec):
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    return jax.tree.map(placed, specs)


def matrix_specs(matrix: QuantizedMatrix, spec: PartitionSpec) -> QuantizedMatrix:
    """As :func:`matrix_sharding`, of `PartitionSpec` and for any mesh.

    Raises:
      ValueError: If the columns of the matrix are no whole blocks, and an axis of it is spread.
    """
    *stack, along_n, along_m = _entries(matrix, spec)
    if _is_flat(matrix) and (along_n, along_m) != (None, None):
        raise ValueError(
            f"a matrix {matrix.shape} whose columns are no whole blocks of "
            f"{matrix.spec.group_size} is not sharded along its last two axes, got {spec}"
        )
    tail = () if _is_flat(matrix) else (along_m, along_n)
    codes: Any = _trimmed(*stack, *tail)
    alone: Any = _trimmed(*stack)
    scales = codes
    if isinstance(matrix.rows.scales, OffsetScales):
        scales = OffsetScales(codes, alone, alone)
    return dataclasses.replace(
        matrix, rows=dataclasses.replace(matrix.rows, codes=codes, scales=scales)
    )


def _entries(matrix: QuantizedMatrix, spec: PartitionSpec) -> tuple[Any, ...]:
    """One for each axis of the matrix."""
    return (*spec, *[None] * (matrix.ndim - len(spec)))


def _is_flat(matrix: QuantizedMatrix) -> bool:
    """Whether its columns, which are no whole blocks, lie one after the other."""
    return matrix.rows.ndim < matrix.ndim


def _trimmed(*entries: Any) -> PartitionSpec:
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return PartitionSpec(*entries)


def _parts(sharding: NamedSharding, entry: Any) -> int:
    return math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
