// Sixteen floats, or int32, in two AVX2 registers. Included inside the namespace of a target.

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };

LOWBIT_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LOWBIT_INLINE __m256 load8(const uint16_t* bf16) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)bf16));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
LOWBIT_INLINE Floats load(const uint16_t* bf16) { return {load8(bf16), load8(bf16 + 8)}; }
LOWBIT_INLINE Ints load(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
LOWBIT_INLINE Ints load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
LOWBIT_INLINE void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
// Both registers' int32 as 16 uint16 in their order.
LOWBIT_INLINE __m256i narrowed(Ints x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), _MM_SHUFFLE(3, 1, 2, 0));
}
LOWBIT_INLINE void store_low_halves(uint16_t* p, Ints x) {
  _mm256_storeu_si256((__m256i*)p, narrowed(x));
}
LOWBIT_INLINE void store_bytes(uint8_t* p, Ints x) {
  const __m256i halves = narrowed(x);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128((__m128i*)p, bytes);
}

LOWBIT_INLINE Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LOWBIT_INLINE Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LOWBIT_INLINE Ints bits(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
LOWBIT_INLINE Floats from_bits(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

LOWBIT_INLINE Floats operator+(Floats x, Floats y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
LOWBIT_INLINE Floats operator*(Floats x, Floats y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
LOWBIT_INLINE Floats operator/(Floats x, Floats y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
LOWBIT_INLINE Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
LOWBIT_INLINE Floats root(Floats x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
// NaN if the second is.
LOWBIT_INLINE Floats lesser(Floats x, Floats y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}

LOWBIT_INLINE Floats over_root(Floats num, Floats w, Floats eps) { return num / (root(w) + eps); }

LOWBIT_INLINE Ints operator+(Ints x, Ints y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
LOWBIT_INLINE Ints operator&(Ints x, Ints y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
LOWBIT_INLINE Ints operator^(Ints x, Ints y) {
  return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
}
LOWBIT_INLINE Ints operator|(Ints x, Ints y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
template <int N> LOWBIT_INLINE Ints shift_left(Ints x) {
  return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N> LOWBIT_INLINE Ints shift_right(Ints x) {
  return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
LOWBIT_INLINE Ints greater(Ints x, Ints y) {
  return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)};
}
LOWBIT_INLINE int32_t largest(Ints x) {
  const __m256i eight = _mm256_max_epi32(x.a, x.b);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(four);
}

// scale * (values + gaps), rounded down, for 16 of each; the sum is exact.
LOWBIT_INLINE __m128 product_below4(const float* values, const float* gaps, __m256d scale) {
  const __m256d factor =
      _mm256_add_pd(_mm256_cvtps_pd(_mm_loadu_ps(values)), _mm256_cvtps_pd(_mm_loadu_ps(gaps)));
  const __m256d exact = _mm256_mul_pd(scale, factor);
  const __m128 nearest = _mm256_cvtpd_ps(exact);
  const __m256d is_over = _mm256_cmp_pd(_mm256_cvtps_pd(nearest), exact, _CMP_GT_OQ);
  const __m256i words = _mm256_castpd_si256(is_over);
  const __m128i over = _mm_castps_si128(_mm_shuffle_ps(
      _mm_castsi128_ps(_mm256_castsi256_si128(words)),
      _mm_castsi128_ps(_mm256_extracti128_si256(words, 1)), _MM_SHUFFLE(2, 0, 2, 0)));
  // One down: the integers of negative floats ascend there.
  const __m128i word = _mm_castps_si128(nearest), sign = _mm_srai_epi32(word, 31);
  return _mm_castsi128_ps(_mm_add_epi32(word, _mm_sub_epi32(_mm_xor_si128(over, sign), sign)));
}
LOWBIT_INLINE Floats product_below(const float* values, const float* gaps, float scale) {
  const __m256d s = _mm256_set1_pd(scale);
  auto eight = [&](int i) LOWBIT_LAMBDA {
    return _mm256_set_m128(product_below4(values + i + 4, gaps + i + 4, s),
                           product_below4(values + i, gaps + i, s));
  };
  return {eight(0), eight(8)};
}

// 1 where x > y, which is false for NaN; else 0.
LOWBIT_INLINE __m256i is_above8(__m256 x, __m256 y) {
  return _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_GT_OQ)), 31);
}
LOWBIT_INLINE Ints is_above(Floats x, Floats y) { return {is_above8(x.a, y.a), is_above8(x.b, y.b)}; }
LOWBIT_INLINE Ints is_above(Ints x, Ints y) {
  return {_mm256_srli_epi32(_mm256_cmpgt_epi32(x.a, y.a), 31),
          _mm256_srli_epi32(_mm256_cmpgt_epi32(x.b, y.b), 31)};
}
// -1 where x is negative, else 0.
LOWBIT_INLINE Ints sign_fill(Ints x) {
  return {_mm256_srai_epi32(x.a, 31), _mm256_srai_epi32(x.b, 31)};
}
LOWBIT_INLINE __m256i where_nan8(__m256 x, __m256i then, __m256i otherwise) {
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(otherwise, then, is_nan);
}
LOWBIT_INLINE Ints where_nan(Floats x, Ints then, Ints otherwise) {
  return {where_nan8(x.a, then.a, otherwise.a), where_nan8(x.b, then.b, otherwise.b)};
}
// x where s is not zero, else zero.
LOWBIT_INLINE __m256 zero_where_zero8(__m256 x, __m256 s) {
  return _mm256_and_ps(x, _mm256_cmp_ps(s, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
LOWBIT_INLINE Floats zero_where_zero(Floats x, Floats s) {
  return {zero_where_zero8(x.a, s.a), zero_where_zero8(x.b, s.b)};
}

// Towards zero, and 0 for what is negative or NaN.
LOWBIT_INLINE __m256i truncated8(__m256 x) {
  return _mm256_cvttps_epi32(_mm256_max_ps(x, _mm256_setzero_ps()));
}
LOWBIT_INLINE Ints truncated(Floats x) { return {truncated8(x.a), truncated8(x.b)}; }

struct Table16 { __m256 low, high; };
// Looked up by the low four bits of an index.
LOWBIT_INLINE Table16 table16(const float* values) {
  return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}
LOWBIT_INLINE __m256 look_up8(Table16 table, __m256i index) {
  const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                          _mm256_permutevar8x32_ps(table.high, index), is_high);
}
LOWBIT_INLINE Floats look_up(Table16 table, Ints index) {
  return {look_up8(table, index.a), look_up8(table, index.b)};
}
LOWBIT_INLINE Table16 scaled(Table16 table, Floats x) {
  return {_mm256_mul_ps(table.low, x.a), _mm256_mul_ps(table.high, x.b)};
}
LOWBIT_INLINE Floats look_up(const float* table, Ints index) {
  return {_mm256_i32gather_ps(table, index.a, 4), _mm256_i32gather_ps(table, index.b, 4)};
}
LOWBIT_INLINE Ints look_up(const int32_t* table, Ints index) {
  return {_mm256_i32gather_epi32(table, index.a, 4), _mm256_i32gather_epi32(table, index.b, 4)};
}

// How many of 15 ascending boundaries lie strictly below x: a binary search in four steps, of which
// the first two choose among three boundaries and the last two look one up.
LOWBIT_INLINE __m256i count_below8(Table16 boundaries, __m256 x) {
  const __m256 b3 = _mm256_permutevar8x32_ps(boundaries.low, _mm256_set1_epi32(3));
  const __m256 b7 = _mm256_permutevar8x32_ps(boundaries.low, _mm256_set1_epi32(7));
  const __m256 b11 = _mm256_permutevar8x32_ps(boundaries.high, _mm256_set1_epi32(3));
  const __m256 upper = _mm256_cmp_ps(x, b7, _CMP_GT_OQ);
  const __m256 quarter = _mm256_blendv_ps(b3, b11, upper);
  const __m256 above = _mm256_cmp_ps(x, quarter, _CMP_GT_OQ);
  // A mask is -1.
  const __m256i twos = _mm256_add_epi32(_mm256_castps_si256(upper), _mm256_castps_si256(upper));
  const __m256i quarters = _mm256_add_epi32(twos, _mm256_castps_si256(above));
  const __m256i count = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), quarters), 2);
  // Of the eight boundaries of a half the permutation sees the three lowest bits of an index alone.
  auto in_half = [&](__m256i index) LOWBIT_LAMBDA {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(boundaries.low, index),
                            _mm256_permutevar8x32_ps(boundaries.high, index), upper);
  };
  const __m256 middle = in_half(_mm256_add_epi32(count, _mm256_set1_epi32(1)));
  const __m256i two = _mm256_castps_si256(_mm256_cmp_ps(x, middle, _CMP_GT_OQ));
  const __m256i finer = _mm256_sub_epi32(count, _mm256_add_epi32(two, two));
  const __m256i one = _mm256_castps_si256(_mm256_cmp_ps(x, in_half(finer), _CMP_GT_OQ));
  return _mm256_sub_epi32(finer, one);
}
LOWBIT_INLINE Ints count_below(Table16 boundaries, Floats x) {
  return {count_below8(boundaries, x.a), count_below8(boundaries, x.b)};
}
