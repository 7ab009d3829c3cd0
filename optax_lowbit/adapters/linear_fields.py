"""What linear layers of Flax may have, and products with matrices in few bits have not."""

from typing import Any

import jax

_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "dot_general": (None, jax.lax.dot_general),
    "dot_general_cls": (None,),
    "preferred_element_type": (None,),
}


def check_fields(name: str, layer: Any, promote_dtype: Any) -> None:
    """Raise a ValueError if a layer computes its product in a way of its own.

    Args:
      name: The path of its kernel.
      layer: A linear layer of NNX or linen.
      promote_dtype: Flax's own, for such layers.
    """
    for field, defaults in {**_DEFAULTS, "promote_dtype": (promote_dtype,)}.items():
        value = getattr(layer, field, defaults[0])
        if value not in defaults:
            raise ValueError(
                f"{name!r} is of a layer with {field}={value!r}, which products in few bits do not "
                "have: exclude it"
            )
