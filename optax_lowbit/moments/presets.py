"""How moments are stored unless the user says otherwise.

References:
  Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
  2023, Section 4.3; Dettmers et al, `8-bit Optimizers via Block-wise Quantization
  <https://arxiv.org/abs/2110.02861>`_, 2022 (blocks of 256 as in bitsandbytes 0.44 and later).
"""

import dataclasses
import math

from optax_lowbit.quant import QuantSpec

FIRST_MOMENT_4BIT = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block")
SECOND_MOMENT_4BIT = QuantSpec(codebook="linear", bits=4, signed=False, scaling="rank1")

FIRST_MOMENT_8BIT = QuantSpec(
    codebook="dynamic_exponent", bits=8, signed=True, scaling="block", block_size=256
)
SECOND_MOMENT_8BIT = QuantSpec(
    codebook="dynamic_exponent", bits=8, signed=False, scaling="block", block_size=256
)

# For averages that a step changes by less than rounding to nearest can see.
SLOW_MOMENT_4BIT = dataclasses.replace(FIRST_MOMENT_4BIT, rounding="stochastic")
# For sums of many small terms, which rounding to nearest would lose. Signed squares have -1, 0 and
# 1, so the mean is kept to the ends of the table and zeros stay zeros; of one rounding of normal
# values the noise is 1.0% of their size, where the dynamic exponent, without a -1, has 1.5%.
UNBIASED_8BIT = QuantSpec(
    codebook=tuple(math.copysign((i / 127) ** 2, i) for i in range(-127, 128)),
    bits=8,
    signed=True,
    scaling="block",
    block_size=256,
    rounding="stochastic",
)
