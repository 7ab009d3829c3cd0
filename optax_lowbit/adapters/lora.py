"""Low-rank adapters: ``W + (alpha / r) A^T B``; ``W`` is frozen, ``A`` and ``B`` train."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

from optax_lowbit.adapters import fields, merging, sites
from optax_lowbit.adapters.arrays import leaves_by_path
from optax_lowbit.adapters.entries import changes_base, new_entry
from optax_lowbit.adapters.merging import Adapters, map_adapted
from optax_lowbit.kernels.reference import widened


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

    The adapters are a tree of float32 arrays, whatever the model's dtype: by the path of each
    adapted leaf ``{"a": ..., "b": ...}``, with DoRA ``"magnitude"``, too, and ``{"value": ...}``
    of a leaf that trains itself. Only this tree is differentiated and has optimizer state. The
    frozen leaves may be a :class:`~optax_lowbit.qlora.QuantizedMatrix`.

    There are two ways. For a function of a parameter tree, :meth:`init` or :meth:`start` makes the
    adapters and :meth:`attach` or :meth:`merge` puts them in; with :func:`intercept_linen` the
    function may be a linen model. For a Flax NNX model, :meth:`wrap` puts them into its layers, as
    `nnx.LoRAParam`.

    **Memory.** ``r (n + m)`` float32 numbers for a matrix. Only :meth:`merge` forms the adapted
    matrix. DoRA dequantizes a matrix in few bits, one at a time, for its norms.

    Attributes:
      rank: ``r``. A rank above that of the matrix is allowed, and useless.
      alpha: The product of the adapters is scaled by ``alpha / r``.
      targets: A regular expression, searched for in paths such as `layers/query/kernel`. Of the
        leaves it finds, float ones with two axes or more are adapted; of an NNX model, kernels and
        tables of layers. Or "all-linear": leaves named `kernel`, as Flax names them, and matrices
        in few bits; of a tree not those of convolutions, as far as it shows them: a bias that is
        not stacked beside a kernel that would be, or a name such as `Conv_0`.
      exclude: A regular expression: paths that are no targets. By default none is, but for that of
        the output layer under "all-linear", if it is named `head` or `lm_head`: Flax marks none.
      use_rslora: Scale by ``alpha / sqrt(r)`` (`rsLoRA <https://arxiv.org/abs/2312.03732>`_).
      dropout: Share of the inputs of ``A`` that is dropped in training, if there is a key.
      rank_pattern: From regular expressions to ranks; the first that is found in a path counts.
      alpha_pattern: The same for ``alpha``.
      use_dora: Train the lengths of the columns of ``W + (alpha / r) A^T B`` apart
        (`DoRA <https://arxiv.org/abs/2402.09353>`_). Unlike in the released code, dropout leaves
        ``x W`` alone, which saves a second product with ``W``.
      init_lora_weights: How ``A`` and ``B`` start. "default": as above. "gaussian": ``A`` is normal
        with deviation ``1 / r``. The others start on another base, see :meth:`start`: "pissa" with
        the largest singular vectors, "pissa_niter_N" with these by N iterations from a random
        sketch, which is faster; "olora" with a QR decomposition; "loftq" with what 4 bits leave.
      loftq_iter: Turns of "loftq" between base and adapters.
      bias: "none"; "all": leaves named `bias` train, too; "lora_only": those beside adapted ones.
      modules_to_save: A regular expression: leaves that train themselves, instead of adapters.
      embeddings: A regular expression: adapted leaves whose rows are looked up. There ``A`` starts
        at zero and ``B`` is random, because a column of ``A`` is trained by its token alone.
      kernel_axes: From regular expressions to ``(i, o)``, for kernels of which the last ``i + o``
        axes are no stack: ``i`` make ``n`` and ``o`` make ``m``. NNX layers need none;
        :func:`linen_kernel_axes` finds it for a linen model.

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
      <https://arxiv.org/abs/2106.09685>`_, 2021, Section 4.1. Names of fields are those of
      `LoraConfig` in PEFT, without `lora_` where that says nothing.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str
    exclude: str | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    alpha_pattern: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    use_dora: bool = False
    init_lora_weights: str = "default"
    loftq_iter: int = 1
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: str | None = None
    embeddings: str = r"(^|/)embedding$"
    kernel_axes: Mapping[str, tuple[int, int]] | tuple[tuple[str, tuple[int, int]], ...] = ()

    def __post_init__(self):
        fields.check_fields(self)
        for name in ("rank_pattern", "alpha_pattern", "kernel_axes"):
            pairs = fields.hashable_patterns(name, getattr(self, name))
            object.__setattr__(self, name, pairs)

    def rank_of(self, path: str) -> int:
        """The rank of the adapters at a path."""
        return sites.rank_of(self, path)

    def scale_of(self, path: str) -> float:
        """What the product of the adapters at a path is multiplied with."""
        return sites.scale_of(self, path)

    def init(self, params: Any, key: jax.Array | int) -> dict[str, dict[str, jax.Array]]:
        """Adapters of a tree that change nothing, by the path of each adapted leaf.

        Args:
          params: Pytree of arrays.
          key: A `jax.random.key` of Threefry, its data, or a seed. Each entry follows from it and
            from the leaf's path alone.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If no leaf is a target, ``key`` is not one of Threefry, or the adapters
            start on another base, so that :meth:`start` is needed.
        """
        if changes_base(self):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} starts on another base than params: "
                "frozen, adapters = lora.start(params, key)"
            )
        return self.start(params, key)[1]

    def start(
        self, params: Any, key: jax.Array | int, *, weights: Any = None
    ) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
        r"""The tree to freeze and its adapters, for every ``init_lora_weights``.

        "default" and "gaussian" freeze ``params`` as they are. "pissa" and "olora" freeze
        ``W - (alpha / r) A^T B``, computed in float32: the sum is ``W`` but for rounding, once, to
        the dtype of ``W``, or to few bits if ``W`` is in these. "loftq" freezes matrices in few
        bits, and the sum is nearer to ``weights`` than they were.

        **Memory.** In float32, one leaf and its singular vectors at a time.

        Args:
          params: Pytree of arrays. For "loftq" its targets are in few bits.
          key: As in :meth:`init`.
          weights: The tree that ``params`` was quantized from. Needed for "loftq"; without it
            "pissa" and "olora" start from what ``params`` dequantizes to.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If no leaf is a target, ``key`` is not one of Threefry, or ``weights`` are
            missing or of other shapes.
        """
        leaves = leaves_by_path(params)
        matrices = sites.matrices_of(self, leaves)
        originals = {} if weights is None else leaves_by_path(weights)
        bases, adapters = {}, {}
        for path in sites.chosen_matrices(self, matrices):
            site = sites.site_of(self, path, matrices[path])
            original = originals.get(path)
            bases[path], adapters[path] = new_entry(self, site, matrices[path], key, original)
        for path in sites.chosen_values(self, leaves, list(adapters)):
            adapters[path] = {"value": widened(leaves[path])}
        if not changes_base(self):
            return params, adapters
        return map_adapted(lambda path, leaf, base: base, params, bases), adapters

    def attach(self, params: Any, adapters: Adapters, *, key: jax.Array | int | None = None) -> Any:
        """The tree with a :class:`LoRAMatrix` for each adapted leaf.

        For functions that use these leaves as ``x @ w`` alone, directly or as slices of a stack in
        `jax.lax.scan`; or as ``w[tokens]`` and ``x @ w.T``, if they are embeddings.

        Args:
          params: The frozen tree.
          adapters: What :meth:`init` or :meth:`start` gave, trained; or :func:`mix` of several.
          key: For dropout, another one for every step; None for none. The mask of a matrix follows
            from it, from the matrix's path and from the shape of ``x``; `jax.vmap` over ``x`` has
            the same mask for all.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If an adapter has no leaf, or its shape is not the leaf's.
        """
        return merging.attach(self, params, adapters, key)

    def merge(self, params: Any, adapters: Adapters) -> Any:
        """The tree with ``W + (alpha / r) A^T B`` for each adapted leaf, in the leaf's dtype.

        For any function, and for a model that is done. Matrices in few bits become floats, still
        ``(n, m)``: a kernel with more axes, such as that of linen's attention, is to be reshaped.
        Trained through, it holds the merged leaves and their gradients.

        Args:
          params: The frozen tree.
          adapters: As in :meth:`attach`.

        Raises:
          ValueError: If an adapter has no leaf, or its shape is not the leaf's.
        """
        return merging.merge(self, params, adapters)

    def requantize(self, params: Any, adapters: Adapters) -> tuple[Any, dict[str, jax.Array]]:
        """:meth:`merge`, with what was in few bits in few bits again, and the error of that.

        Returns:
          The tree, and by the path of each requantized leaf the Frobenius norm of what its few
          bits leave of the merged matrix, relative to that of the merged matrix.

        Raises:
          ValueError: If an adapter has no leaf, or its shape is not the leaf's.
        """
        return merging.requantize(self, params, adapters)

    def unmerge(self, params: Any, adapters: Adapters) -> Any:
        """The tree without what :meth:`merge` added: ``W' - (alpha / r) A^T B``.

        Where ``W`` and what was added were multiples of one power of two and the sum was exact,
        these are the bits of ``W``. Otherwise each number differs by at most half a unit in the
        last place of the merged one, and half of its own. The tree that was merged is untouched;
        whoever still has it needs no unmerging.

        Args:
          params: A merged tree.
          adapters: The same adapters.

        Raises:
          ValueError: If an adapter has no leaf, its shape is not the leaf's, or merging wrote over
            what it replaced: values of leaves, and matrices with DoRA.
        """
        return merging.unmerge(self, params, adapters)

    def wrap(self, model: Any, key: jax.Array | int, *, weights: Any = None) -> Any:
        """A Flax NNX model with adapters around each layer whose kernel or table is a target.

        Layers are `nnx.Linear`, `nnx.LinearGeneral` without batch axes, `nnx.Einsum`, `nnx.Embed`,
        and `nnx.Conv` without groups and mask, but not under "all-linear". Axes of a kernel that
        are summed over make ``n``, a convolution's size among them. Layers that `nnx.vmap` has
        stacked have stacked adapters, and run in `nnx.scan` as before. Only what trains is
        `nnx.LoRAParam`: adapters, biases and ``modules_to_save``. What they start as is what
        :meth:`start` gives. Unlike `nnx.Dropout`, dropout is off until `model.train()` turns it on;
        `model.eval()` turns it off.

        Args:
          model: An `nnx.Module`. It is left as it is; the new model shares its variables.
          key: As in :meth:`init`.
          weights: The model that ``model`` was quantized from, as in :meth:`start`.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If no layer is a target, ``key`` is not one of Threefry, or ``weights`` are
            missing or of other shapes.
        """
        from optax_lowbit.adapters import nnx_models

        return nnx_models.wrap_layers(self, model, key, weights)

    def unwrap(self, model: Any) -> Any:
        """The model that :meth:`wrap` gave with its adapters merged: plain layers again.

        Layers in few bits become layers of floats.

        Args:
          model: An `nnx.Module`. It is left as it is; the variables of layers without
            adapters are shared.
        """
        from optax_lowbit.adapters import nnx_models

        return nnx_models.unwrap_layers(model)

    def requantized(self, model: Any) -> tuple[Any, dict[str, jax.Array]]:
        """:meth:`unwrap`, with what was in few bits in few bits again.

        Returns:
          The model, and errors by path as of :meth:`requantize`.
        """
        from optax_lowbit.adapters import nnx_models

        return nnx_models.requantize_layers(model)

    def unmerged(self, model: Any, adapters: Adapters) -> Any:
        """A model of :meth:`unwrap` without what was merged into it, as :meth:`unmerge` has it.

        Args:
          model: An `nnx.Module` of plain layers. It is left as it is.
          adapters: What :meth:`extract` gave of the model before :meth:`unwrap`.

        Raises:
          ValueError: As :meth:`unmerge` does.
        """
        from optax_lowbit.adapters import nnx_models

        return nnx_models.unmerge_layers(self, model, adapters)

    def extract(self, model: Any) -> dict[str, dict[str, jax.Array]]:
        """The adapters of a model that :meth:`wrap` gave, as :meth:`init` gives them for a tree."""
        from optax_lowbit.adapters import nnx_models

        return nnx_models.extract_adapters(model)

    def update(self, model: Any, adapters: Adapters) -> None:
        """Puts adapters into a model that :meth:`wrap` gave, in place.

        Args:
          model: An `nnx.Module`.
          adapters: What :meth:`extract` gave of such a model, :meth:`init` of its parameters, or
            :func:`mix` of several: then the ranks are those of all together, until others are put
            in.

        Raises:
          ValueError: If these are not the paths of the model's adapters, or neither the shapes that
            these have nor those that they started with.
        """
        from optax_lowbit.adapters import nnx_models

        nnx_models.update_adapters(self, model, adapters)
