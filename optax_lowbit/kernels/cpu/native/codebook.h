// A code table as the kernels need it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

namespace lowbit {

// Elements of the largest block that a kernel takes.
constexpr int64_t kMostElements = 2048;

struct Codebook {
  int bits = 4;
  // What code i stands for.
  std::vector<float> values;
  // Ascending; a normalized value's code is the number of boundaries strictly below it.
  std::vector<float> boundaries;
  // From boundaries half way to the next floats.
  std::vector<float> half_gaps;
  // Whether there are such floats: 4 bits, and no boundary near zero.
  bool has_half_gaps = false;
  // Whether code i stands for (i + 1) / 16.
  bool is_linear16 = false;
  // 8 bits: for the upper half of a float32 as an index, the code of the least value with that
  // half. At most one boundary lies among the values of one index, so one comparison is left.
  std::vector<uint8_t> code_of_high_half;
};

inline std::vector<uint8_t> codes_of_high_halves(const std::vector<float>& boundaries) {
  std::vector<uint8_t> codes((1 << 16) + 3, 0);  // 3: a gather reads words
  for (uint32_t half = 0; half < (1 << 16); half++) {
    // The value of least magnitude for a positive sign, of largest for a negative one.
    const uint32_t word = (half << 16) | (half & 0x8000 ? 0xffff : 0);
    float least;
    std::memcpy(&least, &word, sizeof least);
    const bool is_nan = (half & 0x7f80) == 0x7f80 && !std::isinf(least);
    if (is_nan) continue;
    codes[half] = std::lower_bound(boundaries.begin(), boundaries.end(), least) - boundaries.begin();
  }
  return codes;
}

// The codebook with these values and boundaries, made once.
inline const Codebook& codebook_of(const float* values, size_t count, const float* boundaries,
                                   int bits) {
  using Table = std::vector<float>;
  static std::mutex mutex;
  static std::map<std::tuple<int, Table, Table>, std::unique_ptr<Codebook>> known;
  const Table codes(values, values + count), limits(boundaries, boundaries + count - 1);
  std::lock_guard<std::mutex> lock(mutex);
  auto& book = known[{bits, codes, limits}];
  if (!book) {
    const size_t size = size_t(1) << bits;
    book = std::make_unique<Codebook>();
    book->bits = bits;
    book->values = codes;
    book->values.resize(size, codes.back());
    book->boundaries = limits;
    book->boundaries.resize(size, std::numeric_limits<float>::infinity());
    book->is_linear16 = codes.size() == 16;
    for (size_t i = 0; i < codes.size(); i++)
      book->is_linear16 = book->is_linear16 && codes[i] == float(i + 1) / 16;
    for (size_t i = 0; i < limits.size(); i++)
      book->is_linear16 = book->is_linear16 && limits[i] == (float(i) + 1.5f) / 16;
    book->has_half_gaps = bits == 4;
    for (float boundary : book->boundaries) {
      const float next = std::nextafterf(boundary, std::numeric_limits<float>::infinity());
      book->half_gaps.push_back(std::isinf(boundary) ? 0.0f : (next - boundary) / 2);
      book->has_half_gaps = book->has_half_gaps && std::fabs(boundary) > 1e-6f;
    }
    if (bits == 8) book->code_of_high_half = codes_of_high_halves(book->boundaries);
  }
  return *book;
}

}  // namespace lowbit
