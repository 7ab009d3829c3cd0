// What a kernel is given: one leaf, as rows of the last axis, and how its moments are stored.
#pragma once

#include <cstdint>

#include "codebook.h"

namespace lowbit {

struct Array {
  void* data = nullptr;
  bool is_bf16 = false;  // else float32
};

// Packed codes and, but for rank-1, block scales; all row by row.
struct Moment {
  const Codebook* book = nullptr;
  int64_t block = 0;
  int64_t bytes_in_block = 0;
  int64_t bytes_in_row = 0;
  int64_t scales_in_row = 0;
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  uint8_t* new_codes = nullptr;
  float* new_scales = nullptr;

  int64_t code_at(int64_t row, int64_t index) const {
    return row * bytes_in_row + index * bytes_in_block;
  }
  int64_t scale_at(int64_t row, int64_t index) const { return row * scales_in_row + index; }
};

// In the order of the operand; kernels/adam.py has the formula.
struct Coefficients {
  float b1, one_minus_b1, b2, one_minus_b2, moment, gradient, correction, eps_root, eps;
  float learning_rate, weight_decay;
};

// How the second moment is kept. Momentum has none.
enum class Second : int64_t { kNone, kBlock, kRank1, kFactored };

struct Step {
  int64_t rows = 1;  // of one batch
  int64_t all_rows = 1;
  int64_t columns = 0;
  int64_t block = 0;
  Coefficients c{};
  Second second = Second::kNone;
  Array grad;
  Array params;  // null: the result is the update, else new parameters
  Array result;
  Moment mu, nu;
  // For stochastic rounding of parameters, if there is a key: numbers of rows, and of the columns at
  // which blocks begin, in the whole leaf of which this may be a part.
  const uint32_t* noise_key[2] = {nullptr, nullptr};
  const uint32_t* noise_rows = nullptr;
  const uint32_t* noise_columns = nullptr;
  // Rank-1: scales, (all_rows) and (batches, columns). Factored: shares of rows, means of columns.
  const float* nu_rows = nullptr;
  const float* nu_columns = nullptr;
  float* new_nu_rows = nullptr;
  float* new_nu_columns = nullptr;

  int64_t blocks_in_row() const { return (columns + block - 1) / block; }
};

// The entries of one target.
struct Target {
  const char* name;
  void (*step)(const Step&, int64_t first, int64_t last);
  void (*maxima)(const Step&, int64_t first_row, int64_t last_row, float* columns);
  void (*square_sums)(const Array&, int64_t start, int64_t n, float* row, float* columns);
  void (*quantize)(const Array&, const Moment&, int64_t columns, int64_t first, int64_t last);
  void (*dequantize)(const Moment&, const Array&, int64_t columns, int64_t first, int64_t last);
};

// The best target that this processor has; LOWBIT_CPU_TARGET may ask for a lesser one by name.
const Target& target();

}  // namespace lowbit
