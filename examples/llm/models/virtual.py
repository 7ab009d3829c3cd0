"""Virtual tokens, which were trained beside a model, in front of real ones."""

from typing import NamedTuple

import jax

from examples.llm.models.layers import KeysAndValues
from examples.llm.models.positions import SHARED, Places, joined, row_places, text_places
from optax_lowbit import adapters


class Input(NamedTuple):
    """What layers are given.

    Attributes:
      x: embeddings `(batch, length, size)`.
      places: of these.
      earlier: keys and values of tokens in front, of all layers, or None.
      earlier_places: of those.
    """

    x: jax.Array
    places: Places
    earlier: KeysAndValues | None
    earlier_places: Places


def with_virtual_tokens(
    x: jax.Array,
    segments: jax.Array | None,
    prompt: jax.Array | None,
    prefix: KeysAndValues | None,
) -> Input:
    """Put virtual tokens in front of embeddings, as if they were the beginning of each text.

    Args:
      x: embeddings of real tokens, `(batch, length, size)`.
      segments: int32 `(batch, length)`: the text of its row that a token is of, counted from 1, and
        0 for padding. None: a row is a text.
      prompt: embeddings `(n, size)`.
      prefix: keys and values `(num_layers, n, num_key_value_heads, head_size)`; they come first.
    """
    in_prefix = 0 if prefix is None else prefix["keys"].shape[1]
    in_prompt = 0 if prompt is None else len(prompt)
    first = in_prefix + in_prompt
    if segments is None:
        places = row_places(x.shape[1], first)
    else:
        places = text_places(segments, first)
    if prompt is not None:
        places = joined(row_places(in_prompt, in_prefix, SHARED), places)
        x = adapters.prepend(prompt, x)
    earlier = prefix and {name: heads[:, None] for name, heads in prefix.items()}
    return Input(x, places, earlier, row_places(in_prefix, segment=SHARED))


def check_length(given: Input, more: int, limit: int | None) -> None:
    """Raise a `ValueError` if there are more tokens, with `more` to come, than positions."""
    length = given.earlier_places.positions.shape[1] + given.x.shape[1] + more
    if limit is not None and length > limit:
        raise ValueError(f"the model has positions for at most {limit} tokens, got {length}")
