"""The shapes of transformers."""

from dataclasses import dataclass
from typing import Literal

from examples.llm.models.families import LLAMA, ROBERTA, Family
from examples.llm.models.rotary import UNSCALED, RotaryScaling


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes and constants that a stack of transformer layers has, whatever file it comes from.

    Attributes:
      family: the parts that it is built of.
      vocabulary_size: number of tokens.
      hidden_size: width of the residual stream.
      feed_forward_size: inner width of the feed-forward block.
      num_layers: number of layers.
      num_heads: query heads.
      num_key_value_heads: key and value heads; each serves `num_heads / num_key_value_heads`
        query heads.
      head_size: width of one head, even in a decoder, since rotary positions turn it in pairs.
      context_length: longest sequence the model was trained on.
      position_offset: row of the first position in a table of positions.
      norm_epsilon: added to the mean square, or the variance, before its root is taken.
      norm_first: whether blocks are normalized before them, or after they are added to their input.
      attention_bias: whether the linear layers of the attention have biases.
      feed_forward_bias: whether those of the feed-forward block have.
      scan_layers: whether the program has one layer, run by a scan, or all of them in a row. The
        parameters are the same, and the numbers but for rounding.
    """

    family: Family
    vocabulary_size: int
    hidden_size: int
    feed_forward_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    context_length: int
    position_offset: int = 0
    norm_epsilon: float
    norm_first: bool = True
    attention_bias: bool = False
    feed_forward_bias: bool = False
    scan_layers: bool = True

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


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
    """The shape of a decoder-only language model.

    Attributes:
      tied_embeddings: whether the output head is the transposed token embedding.
      embedding_size: width of the embedding and of the head, if it is not `hidden_size`.
      final_norm: whether what comes out of the layers is normalized.
      sliding_window: how many tokens a query sees at most, itself among them; None for all.
      rotary_base: base of the rotary frequencies.
      rotary_scaling: how these are stretched.
    """

    family: Family = LLAMA
    tied_embeddings: bool
    embedding_size: int | None = None
    final_norm: bool = True
    sliding_window: int | None = None
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling = UNSCALED

    def __post_init__(self):
        super().__post_init__()
        if self.head_size % 2:
            raise ValueError(f"head_size must be even, got {self.head_size}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(StackConfig):
    """The shape of an encoder.

    Attributes:
      num_token_types: how many kinds of sentences it tells apart.
      head: what it is asked for: the tokens that were masked, the class of a text, or None.
      num_classes: of texts.
    """

    family: Family = ROBERTA
    norm_first: bool = False
    attention_bias: bool = True
    feed_forward_bias: bool = True
    num_token_types: int = 1
    head: Literal["masked-lm", "classes"] | None = None
    num_classes: int = 2

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_token_types", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


ModelConfig = DecoderConfig | EncoderConfig
