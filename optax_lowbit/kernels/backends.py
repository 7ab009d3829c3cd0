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


def checked(backend: str) -> str:
    """``backend``, or a ValueError if there is none of that name."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    return backend


def kernels(backend: str) -> ModuleType:
    """The functions of a backend; interpreted ones are those for a TPU."""
    folder = {"cpu": "cpu.ops", "interpret": "pallas_tpu"}.get(backend, backend)
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
      op: ``"adam"``, ``"momentum"``, ``"quantize"`` or ``"dequantize"``.
      shape: The leaf's.
      dtype: The gradient's, or that of the array to be quantized.
      specs: Of the op's moments, in their order; None for a factored one.
    """
    return kernels(backend).why_not(op, shape, dtype, *specs)


def why_not_spread(backend: str, x: Any) -> str | None:
    """Why a backend's kernel cannot take an array that is spread as ``x`` is; None if it can."""
    if backend == "pallas_tpu" and not is_shard(x) and not is_explicit(x):
        # https://github.com/jax-ml/jax/issues/38196
        return "on several TPUs a kernel needs explicit axes or jax.shard_map"
    return None


def platforms(
    backend: str, op: str, leaf: Any, shape: tuple[int, ...], dtype: Any, *specs: QuantSpec | None
) -> dict[str, str]:
    """The backend of each platform of this process: the one that is named, or the best it has.

    The arguments are those of :func:`why_not`, and ``leaf``, an array that is spread as all are.

    To compile for a platform that the process does not have, its backend must be named: tracing
    kernels for every platform there is would take longer than compiling for one.
    """
    if backend != "auto":
        return dict.fromkeys(jax.extend.backend.backends(), backend)
    chosen = {}
    for platform in jax.extend.backend.backends():
        name = KERNELS.get(platform, "reference")
        if name != "reference" and (
            why_not(name, op, shape, dtype, *specs) or why_not_spread(name, leaf)
        ):
            name = "reference"
        chosen[platform] = name
    return chosen


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
