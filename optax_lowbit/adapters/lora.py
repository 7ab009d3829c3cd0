"""Low-rank adapters: ``W + (alpha / r) A^T B``; ``W`` is frozen, ``A`` and ``B`` train."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.reference import float_dtype, name_hash
from optax_lowbit.moments.policy import path_name
from optax_lowbit.quant import random_bits

# The path of an adapted leaf -> "a" and "b".
Adapters = Mapping[str, Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    r"""Which matrices have low-rank adapters, and which. Hashable.

    .. math::
      y = x W + \frac{\alpha}{r}\, (x A^T) B, \qquad
      A_{ij} \sim U(-1/\sqrt{n}, 1/\sqrt{n}), \quad B = 0

    ``W`` is ``(n, m)``, ``A`` is ``(r, n)`` and ``B`` is ``(r, m)``; leading axes, of layers that
    are stacked, are those of ``W``. At first ``B`` is zero, so nothing is changed. ``A`` lies on
    its side, as in PEFT's files: with ``r`` numbers in a row the scales of a 4-bit moment would
    cost more than its codes, and the rows would be padded on a TPU.

    There are two ways. For a function of a parameter tree, :meth:`init` makes the adapters, a tree
    of their own, and :meth:`attach` or :meth:`merge` puts them in. For a Flax NNX model,
    :meth:`wrap` puts them into its layers, as `nnx.LoRAParam`.

    **Memory.** ``r (n + m)`` float32 numbers for a matrix, whatever its own dtype. But for
    :meth:`merge`, the adapted matrix is never formed.

    Raises:
      TypeError, ValueError: At construction, if a field is impossible.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_lowbit import adapters
      >>> params = {"query": jnp.ones((64, 64)), "output": jnp.ones((64, 8))}
      >>> lora = adapters.LoRA(rank=4, alpha=8, targets="query")
      >>> trainable = lora.init(params, key=0)
      >>> {path: (pair["a"].shape, pair["b"].shape) for path, pair in trainable.items()}
      {'query': ((4, 64), (4, 64))}
      >>> def model(params, x):
      ...     return x @ params["query"] @ params["output"]
      >>> def loss(trainable, frozen, x):
      ...     return jnp.mean(model(lora.attach(frozen, trainable), x) ** 2)
      >>> state = optax.adam(1e-3).init(trainable)

    References:
      Hu et al, `LoRA: Low-Rank Adaptation of Large Language Models
      <https://arxiv.org/abs/2106.09685>`_, 2021, Section 4.1. ``A`` starts as in its released code
      and in PEFT: Kaiming's uniform distribution with ``a = sqrt(5)``.
    """

    # r. A rank above that of the matrix is allowed, and useless.
    rank: int = 8
    # The product of the adapters is scaled by alpha / rank.
    alpha: float = 16.0
    # A regular expression, searched for in paths such as `layers/attention/query/kernel`. Of the
    # leaves it finds, float ones with two axes or more are adapted; of a model, kernels of layers.
    targets: str

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be an int of at least 1, got {self.rank!r}")
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not is_number or not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be a finite number above 0, got {self.alpha!r}")
        if not isinstance(self.targets, str):
            raise TypeError(f"targets must be a regular expression, got {self.targets!r}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets={self.targets!r} is no regular expression: {error}"
            ) from error

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied with."""
        return self.alpha / self.rank

    def init(self, params: Any, key: jax.Array | int) -> dict[str, dict[str, jax.Array]]:
        """Adapters of a tree: by the path of each adapted leaf, ``{"a": ..., "b": ...}``.

        Args:
          params: Pytree of arrays.
          key: A `jax.random.key` of Threefry, its data, or a seed. Each ``a`` follows from it and
            from the leaf's path alone.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If no leaf is a target, or ``key`` is not one of Threefry.
        """
        pairs, _ = jax.tree_util.tree_flatten_with_path(params)
        matrices = {path_name(path): leaf for path, leaf in pairs if is_matrix(leaf)}
        return {path: self.init_pair(path, matrices[path], key) for path in self.chosen(matrices)}

    def attach(self, params: Any, adapters: Adapters) -> Any:
        """The tree with a :class:`LoRAMatrix` for each adapted leaf.

        For functions that use these leaves as ``x @ w`` alone, directly or as slices of a stack in
        `jax.lax.scan`.

        Args:
          params: The frozen tree.
          adapters: What :meth:`init` gave, trained.

        Raises:
          ValueError: If an adapter has no leaf, or its shape is not the leaf's.
        """
        return self._map_adapted(lambda matrix: matrix, params, adapters)

    def merge(self, params: Any, adapters: Adapters) -> Any:
        """The tree with ``W + (alpha / r) A^T B`` for each adapted leaf, in the leaf's dtype.

        For any function, and for a model that is done. Trained through, it holds the merged
        leaves and their gradients.

        Args:
          params: The frozen tree.
          adapters: What :meth:`init` gave, trained.

        Raises:
          ValueError: If an adapter has no leaf, or its shape is not the leaf's.
        """
        return self._map_adapted(LoRAMatrix.merged, params, adapters)

    def wrap(self, model: Any, key: jax.Array | int) -> Any:
        """A Flax NNX model with a `LoRALinear` around each `nnx.Linear` whose kernel is a target.

        Layers that `nnx.vmap` has stacked have stacked adapters, and run in `nnx.scan` as before.
        Only the adapters are `nnx.LoRAParam`. What they start as is what :meth:`init` gives.

        Args:
          model: An `nnx.Module`. It is left as it is; the new model shares its variables.
          key: As in :meth:`init`.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If no layer is a target, or ``key`` is not one of Threefry.
        """
        from optax_lowbit.adapters import nnx_layers

        return nnx_layers.wrap_layers(self, model, key)

    def unwrap(self, model: Any) -> Any:
        """The model that :meth:`wrap` gave with its adapters merged: plain layers again.

        Args:
          model: An `nnx.Module`. It is left as it is; the variables of layers without
            adapters are shared.
        """
        from optax_lowbit.adapters import nnx_layers

        return nnx_layers.unwrap_layers(model)

    def chosen(self, matrices: Mapping[str, Any]) -> list[str]:
        """The paths that ``targets`` finds."""
        paths = [path for path in matrices if re.search(self.targets, path)]
        if not paths:
            raise ValueError(
                f"targets={self.targets!r} must be found in the path of a matrix, and there are "
                f"{sorted(matrices)}"
            )
        return paths

    def init_pair(self, path: str, matrix: Any, key: jax.Array | int) -> dict[str, jax.Array]:
        """The adapters of one matrix, or of a stack."""
        shapes = self._shapes(matrix)
        words = random_bits.fold_in(random_bits.key_words(key), name_hash(path))
        uniform = random_bits.uniform(words, *random_bits.element_indices(shapes["a"]))
        bound = jnp.float32(1 / math.sqrt(matrix.shape[-2]))
        return {"a": (2 * uniform - 1) * bound, "b": jnp.zeros(shapes["b"], jnp.float32)}

    def _shapes(self, matrix: Any) -> dict[str, tuple[int, ...]]:
        *stack, n, m = matrix.shape
        return {"a": (*stack, self.rank, n), "b": (*stack, self.rank, m)}

    def _map_adapted(
        self, fun: Callable[["LoRAMatrix"], Any], params: Any, adapters: Adapters
    ) -> Any:
        left = dict(adapters)

        def visit(path, leaf):
            pair = left.pop(path_name(path), None)
            if pair is None:
                return leaf
            self._check_pair(path_name(path), leaf, pair)
            return fun(LoRAMatrix(leaf, pair["a"], pair["b"], self.scale))

        tree = jax.tree_util.tree_map_with_path(visit, params)
        if left:
            raise ValueError(f"adapters must be of leaves of params, which has no {sorted(left)}")
        return tree

    def _check_pair(self, path: str, matrix: Any, pair: Mapping[str, jax.Array]) -> None:
        expected = self._shapes(matrix) if is_matrix(matrix) else {}
        shapes = {name: jnp.shape(x) for name, x in pair.items()}
        if shapes != expected:
            raise ValueError(
                f"adapters[{path!r}] must have shapes {expected}, as params has {path!r} of shape "
                f"{jnp.shape(matrix)} and the rank is {self.rank}; got {shapes}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoRAMatrix:
    """A matrix ``W + scale A^T B`` that is not formed: ``x @ w`` is ``x W + scale (x A^T) B``.

    A pytree, so `jax.lax.scan` slices a stack of them. It can't be used as an array otherwise; that
    raises a TypeError, and :meth:`merged` is the array.

    Attributes:
      base: ``(..., n, m)``.
      a: float32 ``(..., r, n)``.
      b: float32 ``(..., r, m)``.
      scale: A number.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    # NumPy arrays, too, leave `x @ w` to this class.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of ``base``."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """That of ``base``."""
        return self.base.ndim

    @property
    def dtype(self) -> Any:
        """That of ``base``."""
        return self.base.dtype

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return add_low_rank(x @ self.base, x, self.a, self.b, self.scale)

    def merged(self) -> jax.Array:
        """The matrix, in the dtype of ``base``, rounded once."""
        dtype = float_dtype(self.base.dtype)
        moved = self.scale * (self.a.mT.astype(dtype) @ self.b.astype(dtype))
        return (self.base.astype(dtype) + moved).astype(self.base.dtype)


def add_low_rank(y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """``y + scale (x a^T) b`` in the dtype of ``y``, computed in float32 or wider, rounded once."""
    dtype = float_dtype(y.dtype)
    moved = scale * (x.astype(dtype) @ a.mT.astype(dtype) @ b.astype(dtype))
    return (y.astype(dtype) + moved).astype(y.dtype)


def is_matrix(leaf: Any) -> bool:
    """Whether it can have adapters: floats with two axes or more."""
    return getattr(leaf, "ndim", 0) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
