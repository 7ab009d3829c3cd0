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
  // 8 bits: a cell of all values with the same upper half, by that half. Its lowest 8 bits are the
  // code of the least value; above them is the lower half of the boundary among its values, if
  // there is one: at most one does lie there.
  std::vector<int32_t> cells;
};

// The lower half of a float, ascending with the float.
inline uint32_t ascending_low_half(uint32_t word) {
  return (word >> 31 ? ~word : word) & 0xffff;
}

inline std::vector<int32_t> cells_of(const std::vector<float>& boundaries) {
  std::vector<int32_t> cells(1 << 16, 0xffff << 8);
  for (uint32_t half = 0; half < (1 << 16); half++) {
    // The value of least magnitude for a positive sign, of largest for a negative one.
    const uint32_t word = (half << 16) | (half & 0x8000 ? 0xffff : 0);
    float least;
    std::memcpy(&least, &word, sizeof least);
    const bool is_nan = (half & 0x7f80) == 0x7f80 && !std::isinf(least);
    if (is_nan) continue;
    const auto next = std::lower_bound(boundaries.begin(), boundaries.end(), least);
    uint32_t boundary = 0;
    if (next != boundaries.end()) std::memcpy(&boundary, &*next, sizeof boundary);
    const bool is_inside = next != boundaries.end() && boundary >> 16 == half;
    const uint32_t low_half = is_inside ? ascending_low_half(boundary) : 0xffff;
    cells[half] = int32_t(low_half << 8 | uint32_t(next - boundaries.begin()));
  }
  return cells;
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
    if (bits == 8) book->cells = cells_of(limits);
  }
  return *book;
}

}  // namespace lowbit
