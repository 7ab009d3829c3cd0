"""Flax linen models whose parameters hold adapted matrices, or matrices in few bits."""

import contextlib
from typing import Any


def intercept_linen() -> contextlib.AbstractContextManager[None]:
    """A context in which linen layers take kernels that are not plain arrays.

    In it `nn.Dense` and `nn.DenseGeneral` take kernels and `nn.Embed` takes tables that are
    :class:`LoRAMatrix`, as :meth:`LoRA.attach` puts them into a model's parameters; a kernel may
    be a :class:`~optax_lowbit.qlora.QuantizedMatrix`, too. Either may be in the box of
    `nn.with_partitioning`. Layers with plain arrays are unchanged,
    and so are `nn.scan`, `nn.remat` and whatever else the model does. It acts when the model is
    traced: it stands inside the jitted function, around `model.apply`.

    Raises:
      ValueError: In the context, of an `nn.DenseGeneral` with ``batch_dims`` or a convolution with
        such a kernel, or of a layer with ``dot_general`` or ``promote_dtype`` of its own and a
        kernel in few bits.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from optax_lowbit import adapters
      >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(4)])
      >>> x = jnp.ones((2, 8))
      >>> frozen = model.init(jax.random.key(0), x)["params"]
      >>> lora = adapters.LoRA(rank=2, targets="all-linear")
      >>> trainable = lora.init(frozen, key=0)
      >>> def loss(trainable, frozen, x):
      ...     with adapters.intercept_linen():
      ...         return jnp.mean(model.apply({"params": lora.attach(frozen, trainable)}, x) ** 2)
      >>> sorted(jax.grad(loss)(trainable, frozen, x))
      ['layers_0/kernel', 'layers_2/kernel']
    """
    from optax_lowbit.adapters import linen_layers

    return linen_layers.intercepted()


def linen_kernel_axes(
    model: Any, variables: Any, *args: Any, **kwargs: Any
) -> dict[str, tuple[int, int]]:
    """The :class:`LoRA` field ``kernel_axes`` of a linen model with `nn.DenseGeneral` layers.

    The model is traced, and nothing is computed. `nn.MultiHeadDotProductAttention` has such layers.

    Args:
      model: An `nn.Module`.
      variables: What `model.apply` is given first: arrays or their shapes and dtypes.
      args: What it is given then.
      kwargs: The same, by name.

    Returns:
      From regular expressions, one for each kernel, to the numbers of axes that are summed over and
      that are not.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from optax_lowbit import adapters
      >>> model = nn.DenseGeneral((2, 8))
      >>> variables = model.init(jax.random.key(0), jnp.ones((3, 16)))
      >>> adapters.linen_kernel_axes(model, variables, jnp.ones((3, 16)))
      {'(^|/)kernel$': (1, 2)}
    """
    from optax_lowbit.adapters import linen_layers

    return linen_layers.kernel_axes(model, variables, *args, **kwargs)
