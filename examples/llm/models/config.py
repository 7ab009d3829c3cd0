"""The shape of a decoder-only language model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants that determine a decoder, whatever file its weights come from.

    Attributes:
      vocabulary_size: number of tokens.
      hidden_size: width of the residual stream.
      feed_forward_size: inner width of the feed-forward block.
      num_layers: number of decoder layers.
      num_heads: query heads.
      num_key_value_heads: key and value heads; each serves `num_heads / num_key_value_heads`
        query heads.
      head_size: width of one head, even because rotary positions turn it in pairs.
      context_length: longest sequence the model was trained on.
      rotary_base: base of the rotary frequencies.
      norm_epsilon: added to the mean square before its root is taken.
      tied_embeddings: whether the output head is the transposed token embedding.
    """

    vocabulary_size: int
    hidden_size: int
    feed_forward_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    context_length: int
    rotary_base: float
    norm_epsilon: float
    tied_embeddings: bool

    def __post_init__(self):
        for name in (
            "vocabulary_size",
            "hidden_size",
            "feed_forward_size",
            "num_layers",
            "num_heads",
            "num_key_value_heads",
            "head_size",
            "context_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_heads} and {self.num_key_value_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size must be even, got {self.head_size}")

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Return `(in, out)` of a layer's matrices, by their paths in its parameters."""
        width, inner = self.hidden_size, self.feed_forward_size
        query = self.num_heads * self.head_size
        key = self.num_key_value_heads * self.head_size
        return {
            "attention/query/kernel": (width, query),
            "attention/key/kernel": (width, key),
            "attention/value/kernel": (width, key),
            "attention/output/kernel": (query, width),
            "feed_forward/gate/kernel": (width, inner),
            "feed_forward/up/kernel": (width, inner),
            "feed_forward/down/kernel": (inner, width),
        }
