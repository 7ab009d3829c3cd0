"""Which kernel takes a leaf: an explicit predicate of platform, shape, dtype and specs."""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.extend.backend

from optax_lowbit.kernels.meshes import is_explicit, is_shard
from optax_lowbit.quant import QuantSpec

Backend = Literal["auto", "reference", "cpu", "pallas_tpu", "pallas_gpu", "interpret"]

# The kernels of a platform, by what `jax.lax.platform_dependent` calls it.
KERNELS = {"cpu": "cpu", "tpu": "pallas_tpu", "cuda": "pallas_gpu"}


def checked(backend: Backend) -> Backend:
    """``backend``, or a ValueError if there is none of that name."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    return backend


def kernels(backend: str) -> ModuleType:
    """The functions of a backend; interpreted ones are those for a TPU."""
    folder = "pallas_tpu" if backend == "interpret" else backend
    return importlib.import_module(f"optax_lowbit.kernels.{folder}")


def options(backend: str) -> dict[str, bool]:
    """Keyword arguments of a backend's functions."""
    return {"interpret": True} if backend == "interpret" else {}


def why_not(
    backend: str, op: str, shape: tuple[int, ...], dtype: Any, *specs: QuantSpec | None
) -> str | None:
    """Why a backend's kernel cannot take a leaf; None if it can.

    Args:
      backend: Neither ``"auto"`` nor ``"reference"``.
      op: ``"adam"``, ``"momentum"``, ``"quantize"``, ``"dequantize"`` or ``"quantized_dot"``.
      shape: The leaf's; that of a product's matrix, transposed.
      dtype: The gradient's, or that of the array to be quantized, or multiplied by the matrix.
      specs: Of the op's moments, in their order; None for a factored one.
    """
    return kernels(backend).why_not(op, shape, dtype, *specs)


def why_not_spread(backend: str, op: str, x: Any) -> str | None:
    """Why a backend's kernel cannot take an array that is spread as ``x`` is; None if it can.

    ``x`` may be None, for one that is known to be on one device.
    """
    if x is None or is_shard(x):
        return None
    if op == "quantized_dot":
        return "on several devices a product needs jax.shard_map"
    if backend == "pallas_tpu" and not is_explicit(x):
        # https://github.com/jax-ml/jax/issues/38196
        return "on several TPUs a kernel needs explicit axes or jax.shard_map"
    return None


def platforms(
    backend: str,
    op: str,
    leaf: Any,
    shape: tuple[int, ...],
    dtype: Any,
    *specs: QuantSpec | None,
    task: str,
) -> dict[str, str]:
    """The backend of each platform of this process: the one that is named, or the best it has.

    To compile for a platform that the process does not have, its backend must be named: tracing
    kernels for every platform there is would take longer than compiling for one.

    Args:
      backend: A :data:`Backend`.
      op, shape, dtype, specs: Those of :func:`why_not`.
      leaf: An array that is spread as all are; None if they are known to be on one device.
      task: What is to be done, for the error: ``"quantize this array"``, say.

    Raises:
      ValueError: If the backend is named and cannot do it.
    """
    if backend == "reference":
        return everywhere(backend)
    if backend != "auto":
        if reason := why_not(backend, op, shape, dtype, *specs):
            raise ValueError(
                f"backend={backend!r} cannot {task}: {reason}; where no kernel can, "
                "backend='auto' takes the reference"
            )
        return everywhere(backend)
    chosen = {}
    for platform in jax.extend.backend.backends():
        name = KERNELS.get(platform, "reference")
        if name != "reference" and (
            why_not(name, op, shape, dtype, *specs) or why_not_spread(name, op, leaf)
        ):
            name = "reference"
        chosen[platform] = name
    return chosen


def everywhere(backend: str) -> dict[str, str]:
    """One backend for each platform of this process."""
    return dict.fromkeys(jax.extend.backend.backends(), backend)


def by_platform(
    chosen: Mapping[str, str], run: Callable[[str], Callable[..., Any]], *operands: Any
) -> Any:
    """``run(name)(*operands)`` with the backend of the platform that it is compiled for."""
    if len(set(chosen.values())) == 1:
        return run(next(iter(chosen.values())))(*operands)
    branches = {platform: run(name) for platform, name in chosen.items()}
    return jax.lax.platform_dependent(*operands, **branches)


def platform_backend() -> str | None:
    """The backend with the kernels of this process's default platform."""
    platform = jax.default_backend()
    return KERNELS.get("cuda" if platform == "gpu" else platform)
