"""A tiny LLaMA model file with random weights, so that whole programs run in seconds."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from examples.llm.models.config import DecoderConfig

# Large enough for the low-bit optimizers to quantize the layers' moments.
TINY = DecoderConfig(
    vocabulary_size=264,
    hidden_size=64,
    feed_forward_size=128,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    head_size=16,
    context_length=64,
    rotary_base=10000.0,
    norm_epsilon=1e-5,
    tied_embeddings=True,
)


def write_tiny_gguf(path: Path, seed: int = 0, config: DecoderConfig = TINY) -> Path:
    """Write a LLaMA of that shape with random weights and a tokenizer of single bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.feed_forward_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)

    special = [f"<|special{index}|>" for index in range(8)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(special + sorted(pre_tokenizers.ByteLevel.alphabet()))
    writer.add_token_types([gguf.TokenType.CONTROL] * 8 + [gguf.TokenType.NORMAL] * 256)

    generator = np.random.default_rng(seed)

    def add(name: str, *shape: int):
        weights = generator.normal(0, 0.1, shape) if len(shape) == 2 else np.ones(shape)
        writer.add_tensor(name, weights.astype(np.float32))

    hidden, inner = config.hidden_size, config.feed_forward_size
    add("token_embd.weight", config.vocabulary_size, hidden)
    add("output_norm.weight", hidden)
    for layer in range(config.num_layers):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", hidden)
        add(f"{block}.ffn_norm.weight", hidden)
        add(f"{block}.attn_q.weight", config.num_heads * config.head_size, hidden)
        add(f"{block}.attn_k.weight", config.num_key_value_heads * config.head_size, hidden)
        add(f"{block}.attn_v.weight", config.num_key_value_heads * config.head_size, hidden)
        add(f"{block}.attn_output.weight", hidden, config.num_heads * config.head_size)
        add(f"{block}.ffn_gate.weight", inner, hidden)
        add(f"{block}.ffn_up.weight", inner, hidden)
        add(f"{block}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
