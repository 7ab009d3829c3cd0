"""How moments are stored unless the user says otherwise.

References:
  Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
  2023, Section 4.3; Dettmers et al, `8-bit Optimizers via Block-wise Quantization
  <https://arxiv.org/abs/2110.02861>`_, 2022 (blocks of 256 as in bitsandbytes 0.44 and later).
"""

from optax_lowbit.quant import QuantSpec

FIRST_MOMENT_4BIT = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block")
SECOND_MOMENT_4BIT = QuantSpec(codebook="linear", bits=4, signed=False, scaling="rank1")

FIRST_MOMENT_8BIT = QuantSpec(
    codebook="dynamic_exponent", bits=8, signed=True, scaling="block", block_size=256
)
SECOND_MOMENT_8BIT = QuantSpec(
    codebook="dynamic_exponent", bits=8, signed=False, scaling="block", block_size=256
)
