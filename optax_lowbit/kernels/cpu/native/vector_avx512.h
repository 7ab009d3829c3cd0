// Sixteen floats, or int32, in one AVX-512 register. Included inside the namespace of a target.

struct Floats { __m512 v; };
struct Ints { __m512i v; };

LOWBIT_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
LOWBIT_INLINE Floats load(const uint16_t* bf16) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)bf16));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
LOWBIT_INLINE Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
LOWBIT_INLINE Ints load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))};
}
LOWBIT_INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
LOWBIT_INLINE void store_low_halves(uint16_t* p, Ints x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x.v));
}
LOWBIT_INLINE void store_bytes(uint8_t* p, Ints x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x.v));
}

LOWBIT_INLINE Floats all(float x) { return {_mm512_set1_ps(x)}; }
LOWBIT_INLINE Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
LOWBIT_INLINE Ints bits(Floats x) { return {_mm512_castps_si512(x.v)}; }
LOWBIT_INLINE Floats from_bits(Ints x) { return {_mm512_castsi512_ps(x.v)}; }

LOWBIT_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
LOWBIT_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
LOWBIT_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
LOWBIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LOWBIT_INLINE Floats root(Floats x) { return {_mm512_sqrt_ps(x.v)}; }
// NaN if the second is.
LOWBIT_INLINE Floats lesser(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }

// num / (sqrt(w) + eps) for w >= 0 and an eps that is no less than 1e-30, to 3 units in the last
// place: the root by an estimate and a Newton step, for which the divider has no time left.
LOWBIT_INLINE Floats over_root(Floats num, Floats w, Floats eps) {
  // The root of zero and of infinity is itself.
  const __mmask16 is_usual = ~_mm512_fpclass_ps_mask(w.v, 0x02 | 0x04 | 0x08);
  const __m512 r = _mm512_rsqrt14_ps(w.v);
  const __m512 s = _mm512_mask_mul_ps(w.v, is_usual, w.v, r);
  const __m512 half_r = _mm512_mul_ps(r, _mm512_set1_ps(0.5f));
  const __m512 error = _mm512_fnmadd_ps(s, s, w.v);
  const __m512 d = _mm512_mask3_fmadd_ps(half_r, error, _mm512_add_ps(s, eps.v), is_usual);
  return {_mm512_div_ps(num.v, d)};
}

LOWBIT_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
LOWBIT_INLINE Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
LOWBIT_INLINE Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
LOWBIT_INLINE Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N> LOWBIT_INLINE Ints shift_left(Ints x) { return {_mm512_slli_epi32(x.v, N)}; }
template <int N> LOWBIT_INLINE Ints shift_right(Ints x) { return {_mm512_srli_epi32(x.v, N)}; }
LOWBIT_INLINE Ints greater(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
LOWBIT_INLINE int32_t largest(Ints x) { return _mm512_reduce_max_epi32(x.v); }

// scale * (values + gaps), rounded down, for 16 of each; the sum is exact.
LOWBIT_INLINE Floats product_below(const float* values, const float* gaps, float scale) {
  const __m512 s = _mm512_set1_ps(scale), gap = _mm512_mul_ps(s, _mm512_loadu_ps(gaps));
  const int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  return {_mm512_fmadd_round_ps(s, _mm512_loadu_ps(values), gap, down)};
}

// 1 where a > b, which is false for NaN; else 0.
LOWBIT_INLINE Ints is_above(Floats a, Floats b) {
  return {_mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), 1)};
}
LOWBIT_INLINE Ints is_above(Ints a, Ints b) {
  return {_mm512_maskz_set1_epi32(_mm512_cmpgt_epi32_mask(a.v, b.v), 1)};
}
// -1 where x is negative, else 0.
LOWBIT_INLINE Ints sign_fill(Ints x) { return {_mm512_srai_epi32(x.v, 31)}; }
LOWBIT_INLINE Ints where_nan(Floats x, Ints then, Ints otherwise) {
  return {_mm512_mask_mov_epi32(otherwise.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), then.v)};
}
// x where s is not zero, else zero.
LOWBIT_INLINE Floats zero_where_zero(Floats x, Floats s) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(s.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), x.v)};
}

// Towards zero, and 0 for what is negative or NaN.
LOWBIT_INLINE Ints truncated(Floats x) {
  return {_mm512_cvttps_epi32(_mm512_max_ps(x.v, _mm512_setzero_ps()))};
}

struct Table16 { __m512 v; };
// Looked up by the low four bits of an index.
LOWBIT_INLINE Table16 table16(const float* values) { return {_mm512_loadu_ps(values)}; }
LOWBIT_INLINE Floats look_up(Table16 table, Ints index) {
  return {_mm512_permutexvar_ps(index.v, table.v)};
}
LOWBIT_INLINE Table16 scaled(Table16 table, Floats x) { return {_mm512_mul_ps(table.v, x.v)}; }
LOWBIT_INLINE Floats look_up(const float* table, Ints index) {
  return {_mm512_i32gather_ps(index.v, table, 4)};
}
LOWBIT_INLINE Ints look_up(const int32_t* table, Ints index) {
  return {_mm512_i32gather_epi32(index.v, table, 4)};
}

// How many of 15 ascending boundaries lie strictly below x: a binary search in four steps.
LOWBIT_INLINE Ints count_below(Table16 boundaries, Floats x) {
  const __m512i eight = _mm512_set1_epi32(8);
  // The first two steps choose among three boundaries, which takes no permutation.
  const __m512 b3 = _mm512_permutexvar_ps(_mm512_set1_epi32(3), boundaries.v);
  const __m512 b7 = _mm512_permutexvar_ps(_mm512_set1_epi32(7), boundaries.v);
  const __m512 b11 = _mm512_permutexvar_ps(_mm512_set1_epi32(11), boundaries.v);
  const __mmask16 upper = _mm512_cmp_ps_mask(x.v, b7, _CMP_GT_OQ);
  __m512i count = _mm512_maskz_mov_epi32(upper, eight);
  const __m512 quarter = _mm512_mask_mov_ps(b3, upper, b11);
  __mmask16 above = _mm512_cmp_ps_mask(x.v, quarter, _CMP_GT_OQ);
  count = _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(4));
  for (int half = 2; half; half /= 2) {
    const __m512i middle = _mm512_add_epi32(count, _mm512_set1_epi32(half - 1));
    const __m512 boundary = _mm512_permutexvar_ps(middle, boundaries.v);
    above = _mm512_cmp_ps_mask(x.v, boundary, _CMP_GT_OQ);
    count = _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(half));
  }
  return {count};
}
