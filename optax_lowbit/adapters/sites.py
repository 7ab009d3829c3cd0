"""Where adapters are: which leaves of a tree, and of which shapes."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from optax_lowbit.adapters.arrays import is_float, is_matrix, is_quantized_matrix

if TYPE_CHECKING:
    from optax_lowbit.adapters.lora import LoRA


# The output layer. Flax marks none, so it goes by its name, as PEFT's classifier heads do.
HEAD = r"(^|/)(lm_)?head/"
_CONVOLUTION = re.compile(r"(^|/)conv(local|transpose)?_?\d*/kernel$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Site:
    """A matrix that has adapters, or a stack of them.

    Attributes:
      path: Such as `layers/query/kernel`.
      stack: Leading axes, of layers that are stacked.
      n: Rows of the matrix.
      m: Columns of the matrix.
      rank: Of its adapters.
      scale: What their product is multiplied with.
      is_table: Whether its rows are looked up.
      has_magnitude: Whether DoRA's lengths of columns train, too.
    """

    path: str
    stack: tuple[int, ...]
    n: int
    m: int
    rank: int
    scale: float
    is_table: bool
    has_magnitude: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the adapters, by their names."""
        shapes: dict[str, tuple[int, ...]] = {
            "a": (*self.stack, self.rank, self.n),
            "b": (*self.stack, self.rank, self.m),
        }
        if self.has_magnitude:
            shapes["magnitude"] = (*self.stack, self.m)
        return shapes


def site_of(lora: "LoRA", path: str, leaf: Any, axes: tuple[int, int] | None = None) -> Site:
    """Where the adapters of ``leaf`` are.

    Args:
      lora: Which adapters.
      path: That of the leaf.
      leaf: An array, or what has its shape.
      axes: How many axes make ``n``, and how many ``m``; None for what ``lora`` says.

    Raises:
      ValueError: If the leaf has fewer axes.
    """
    if is_quantized_matrix(leaf):
        axes = (1, 1)
    inner, outer = axes or first_found(lora.kernel_axes, path, (1, 1))
    shape = tuple(leaf.shape)
    stacked = len(shape) - inner - outer
    if stacked < 0:
        raise ValueError(
            f"kernel_axes must fit {path!r}, got {(inner, outer)} for an array of shape {shape}"
        )
    rank = lora.rank_of(path)
    return Site(
        path=path,
        stack=shape[:stacked],
        n=math.prod(shape[stacked : stacked + inner]),
        m=math.prod(shape[stacked + inner :]),
        rank=rank,
        scale=lora.scale_of(path),
        is_table=re.search(lora.embeddings, path) is not None,
        has_magnitude=lora.use_dora,
    )


def rank_of(lora: "LoRA", path: str) -> int:
    """See :meth:`LoRA.rank_of`."""
    return first_found(lora.rank_pattern, path, lora.rank)


def scale_of(lora: "LoRA", path: str) -> float:
    """See :meth:`LoRA.scale_of`."""
    alpha = first_found(lora.alpha_pattern, path, lora.alpha)
    rank = rank_of(lora, path)
    return alpha / (math.sqrt(rank) if lora.use_rslora else rank)


def matrices_of(lora: "LoRA", leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a tree's leaves that can have adapters; under "all-linear" no convolutions."""

    def is_possible(path: str) -> bool:
        axes = first_found(lora.kernel_axes, path, (1, 1))
        return lora.targets != "all-linear" or not is_convolution(leaves, path, axes)

    return {path: leaf for path, leaf in leaves.items() if is_matrix(leaf) and is_possible(path)}


def chosen_matrices(lora: "LoRA", matrices: Mapping[str, Any]) -> list[str]:
    """The paths that have low-rank adapters.

    Args:
      lora: Which adapters.
      matrices: By path, whatever can have some.

    Raises:
      ValueError: If there are none, or a pattern of ranks or scales fits none of them.
    """
    paths = [path for path, leaf in matrices.items() if _is_chosen(lora, path, leaf)]
    if not paths:
        exclude = _excluded(lora)
        without = "" if exclude is None else f", but not exclude={exclude!r},"
        raise ValueError(
            f"targets={lora.targets!r} must be found{without} in the path of a matrix, and there "
            f"are {sorted(matrices)}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(lora, name):
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"{name} has {pattern!r}, which must be found in the path of an adapted "
                    f"matrix, and these are {sorted(paths)}"
                )
    return paths


def chosen_values(lora: "LoRA", leaves: Mapping[str, Any], adapted: Iterable[str]) -> list[str]:
    """The paths of leaves that train themselves: biases, and those of ``modules_to_save``.

    Raises:
      ValueError: If one is asked for and there is none, or it has no floats to train.
    """
    layers = {_parent(path) for path in adapted}
    biases = {
        path
        for path in leaves
        if path.split("/")[-1] == "bias"
        and (lora.bias == "all" or (lora.bias == "lora_only" and _parent(path) in layers))
    }
    if lora.bias != "none" and not biases:
        raise ValueError(f"bias={lora.bias!r} needs a leaf named bias, and there is none")
    saved = set()
    if lora.modules_to_save is not None:
        saved = {path for path in leaves if re.search(lora.modules_to_save, path)}
        if not saved:
            raise ValueError(
                f"modules_to_save={lora.modules_to_save!r} must be found in the path of a leaf, "
                f"and there are {sorted(leaves)}"
            )
    for path in saved | biases:
        if not is_float(leaves[path]) or is_quantized_matrix(leaves[path]):
            raise ValueError(
                f"{path!r} can't train: it must have floats, and is "
                f"{type(leaves[path]).__name__} of {jnp.dtype(leaves[path].dtype).name}"
            )
    return [path for path in leaves if path in saved | biases]


def is_saved(lora: "LoRA", path: str) -> bool:
    """Whether ``modules_to_save`` finds it, so that it needs no adapters."""
    return lora.modules_to_save is not None and re.search(lora.modules_to_save, path) is not None


def is_convolution(leaves: Mapping[str, Any], path: str, axes: tuple[int, int]) -> bool:
    """Whether a kernel is taken for a convolution's, and its first axes not for a stack's.

    A tree does not say. It is one if the bias beside it has no such axes, as those of stacked
    layers have; or by the names that Flax gives, such as `Conv_0` and `conv`.

    Args:
      leaves: All of the tree, by path.
      path: That of the kernel.
      axes: How many of its last axes would make ``n``, and how many ``m``.
    """
    inner, outer = axes
    stack = leaves[path].ndim - inner - outer
    *layer, name = path.split("/")
    if stack < 1 or name != "kernel" or is_quantized_matrix(leaves[path]):
        return False
    bias = leaves.get("/".join((*layer, "bias")))
    return (bias is not None and bias.ndim < stack + outer) or bool(_CONVOLUTION.search(path))


def _is_chosen(lora, path, leaf) -> bool:
    exclude = _excluded(lora)
    if is_saved(lora, path) or (exclude is not None and re.search(exclude, path)):
        return False
    if lora.targets == "all-linear":
        return is_quantized_matrix(leaf) or path.split("/")[-1] == "kernel"
    return re.search(lora.targets, path) is not None


def _excluded(lora) -> str | None:
    """The field ``exclude``, or what it is by default."""
    if lora.exclude is None and lora.targets == "all-linear":
        return HEAD
    return lora.exclude


def first_found(patterns: Any, path: str, default: Any) -> Any:
    """The value of the first of the pairs whose regular expression is found."""
    return next((value for pattern, value in patterns if re.search(pattern, path)), default)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
