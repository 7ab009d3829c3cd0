// Sixteen floats, or int32, in four vectors that GCC and Clang know on any processor.
// Included inside the namespace of a target.

typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef uint16_t Halves4 __attribute__((vector_size(8)));
typedef uint8_t Bytes4 __attribute__((vector_size(4)));

struct Floats { Floats4 v[4]; };
struct Ints { Ints4 v[4]; };

template <class R, class F> LOWBIT_INLINE R quarters(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <class To, class From> LOWBIT_INLINE To copied_to(const From* from) {
  To result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
// `then` where the mask is -1, `otherwise` where it is 0.
LOWBIT_INLINE Ints4 choose(Ints4 mask, Ints4 then, Ints4 otherwise) {
  return (then & mask) | (otherwise & ~mask);
}
LOWBIT_INLINE Floats4 choose(Ints4 mask, Floats4 then, Floats4 otherwise) {
  return (Floats4)choose(mask, (Ints4)then, (Ints4)otherwise);
}

LOWBIT_INLINE Floats load(const float* p) {
  return quarters<Floats>([=](int i) { return copied_to<Floats4>(p + 4 * i); });
}
LOWBIT_INLINE Floats load(const uint16_t* bf16) {
  return quarters<Floats>([=](int i) {
    return (Floats4)(__builtin_convertvector(copied_to<Halves4>(bf16 + 4 * i), Words4) << 16);
  });
}
LOWBIT_INLINE Ints load(const int32_t* p) { return copied_to<Ints>(p); }
LOWBIT_INLINE Ints load_bytes(const uint8_t* p) {
  return quarters<Ints>([=](int i) {
    return __builtin_convertvector(copied_to<Bytes4>(p + 4 * i), Ints4);
  });
}
LOWBIT_INLINE void store(float* p, Floats x) { std::memcpy(p, x.v, sizeof x.v); }
LOWBIT_INLINE void store_low_halves(uint16_t* p, Ints x) {
  for (int i = 0; i < 4; i++) {
    const Halves4 halves = __builtin_convertvector(x.v[i], Halves4);
    std::memcpy(p + 4 * i, &halves, sizeof halves);
  }
}
LOWBIT_INLINE void store_bytes(uint8_t* p, Ints x) {
  for (int i = 0; i < 4; i++) {
    const Bytes4 bytes = __builtin_convertvector(x.v[i], Bytes4);
    std::memcpy(p + 4 * i, &bytes, sizeof bytes);
  }
}

LOWBIT_INLINE Floats all(float x) {
  return quarters<Floats>([=](int) { return Floats4{} + x; });
}
LOWBIT_INLINE Ints all(int32_t x) {
  return quarters<Ints>([=](int) { return Ints4{} + x; });
}
LOWBIT_INLINE Ints bits(Floats x) {
  return quarters<Ints>([=](int i) { return (Ints4)x.v[i]; });
}
LOWBIT_INLINE Floats from_bits(Ints x) {
  return quarters<Floats>([=](int i) { return (Floats4)x.v[i]; });
}

LOWBIT_INLINE Floats operator+(Floats a, Floats b) {
  return quarters<Floats>([=](int i) { return a.v[i] + b.v[i]; });
}
LOWBIT_INLINE Floats operator*(Floats a, Floats b) {
  return quarters<Floats>([=](int i) { return a.v[i] * b.v[i]; });
}
LOWBIT_INLINE Floats operator/(Floats a, Floats b) {
  return quarters<Floats>([=](int i) { return a.v[i] / b.v[i]; });
}
// Contracted by the compiler where the processor has the instruction.
LOWBIT_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return quarters<Floats>([=](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
LOWBIT_INLINE Floats root(Floats x) {
  for (int i = 0; i < 16; i++) x.v[i / 4][i % 4] = __builtin_sqrtf(x.v[i / 4][i % 4]);
  return x;
}
// NaN if the second is.
LOWBIT_INLINE Floats lesser(Floats a, Floats b) {
  return quarters<Floats>([=](int i) { return choose(a.v[i] < b.v[i], a.v[i], b.v[i]); });
}

LOWBIT_INLINE Floats over_root(Floats num, Floats w, Floats eps) { return num / (root(w) + eps); }

LOWBIT_INLINE Ints operator+(Ints a, Ints b) {
  return quarters<Ints>([=](int i) { return a.v[i] + b.v[i]; });
}
LOWBIT_INLINE Ints operator&(Ints a, Ints b) {
  return quarters<Ints>([=](int i) { return a.v[i] & b.v[i]; });
}
LOWBIT_INLINE Ints operator^(Ints a, Ints b) {
  return quarters<Ints>([=](int i) { return a.v[i] ^ b.v[i]; });
}
LOWBIT_INLINE Ints operator|(Ints a, Ints b) {
  return quarters<Ints>([=](int i) { return a.v[i] | b.v[i]; });
}
template <int N> LOWBIT_INLINE Ints shift_left(Ints x) {
  return quarters<Ints>([=](int i) { return (Ints4)((Words4)x.v[i] << N); });
}
template <int N> LOWBIT_INLINE Ints shift_right(Ints x) {
  return quarters<Ints>([=](int i) { return (Ints4)((Words4)x.v[i] >> N); });
}
LOWBIT_INLINE Ints greater(Ints a, Ints b) {
  return quarters<Ints>([=](int i) { return choose(a.v[i] > b.v[i], a.v[i], b.v[i]); });
}
LOWBIT_INLINE int32_t largest(Ints x) {
  int32_t most = x.v[0][0];
  for (int i = 1; i < 16; i++) most = std::max(most, int32_t(x.v[i / 4][i % 4]));
  return most;
}

// scale * (values + gaps), rounded down, for 16 of each; the sum is exact.
LOWBIT_INLINE Floats product_below(const float* values, const float* gaps, float scale) {
  float products[16];
  for (int i = 0; i < 16; i++) {
    const double exact = double(scale) * (double(values[i]) + double(gaps[i]));
    products[i] = float(exact);
    if (double(products[i]) > exact)
      products[i] = std::nextafterf(products[i], -std::numeric_limits<float>::infinity());
  }
  return load(products);
}

// 1 where a > b, which is false for NaN; else 0.
LOWBIT_INLINE Ints is_above(Floats a, Floats b) {
  return quarters<Ints>([=](int i) { return -(Ints4)(a.v[i] > b.v[i]); });
}
LOWBIT_INLINE Ints is_above(Ints a, Ints b) {
  return quarters<Ints>([=](int i) { return -(Ints4)(a.v[i] > b.v[i]); });
}
// -1 where x is negative, else 0.
LOWBIT_INLINE Ints sign_fill(Ints x) {
  return quarters<Ints>([=](int i) { return x.v[i] >> 31; });
}
LOWBIT_INLINE Ints where_nan(Floats x, Ints then, Ints otherwise) {
  return quarters<Ints>([=](int i) {
    return choose(x.v[i] != x.v[i], then.v[i], otherwise.v[i]);
  });
}
// x where s is not zero, else zero.
LOWBIT_INLINE Floats zero_where_zero(Floats x, Floats s) {
  return quarters<Floats>([=](int i) {
    return choose(s.v[i] != Floats4{}, x.v[i], Floats4{});
  });
}

// Towards zero, and 0 for what is negative or NaN.
LOWBIT_INLINE Ints truncated(Floats x) {
  return quarters<Ints>([=](int i) {
    return __builtin_convertvector(choose(x.v[i] > Floats4{}, x.v[i], Floats4{}), Ints4);
  });
}

struct Table16 { float values[16]; };
// Looked up by the low four bits of an index.
LOWBIT_INLINE Table16 table16(const float* values) { return copied_to<Table16>(values); }
LOWBIT_INLINE Table16 scaled(Table16 table, Floats x) {
  store(table.values, load(table.values) * x);
  return table;
}
template <class T, class To> LOWBIT_INLINE void look_up_each(const T* table, Ints index, To* result) {
  int32_t places[16];
  std::memcpy(places, index.v, sizeof places);
  for (int i = 0; i < 16; i++) result[i] = table[places[i]];
}
LOWBIT_INLINE Floats look_up(const float* table, Ints index) {
  float values[16];
  look_up_each(table, index, values);
  return load(values);
}
LOWBIT_INLINE Floats look_up(const Table16& table, Ints index) {
  return look_up(table.values, index & all(15));
}
LOWBIT_INLINE Ints look_up(const int32_t* table, Ints index) {
  int32_t values[16];
  look_up_each(table, index, values);
  return copied_to<Ints>(values);
}

// How many of 15 ascending boundaries lie strictly below x.
LOWBIT_INLINE Ints count_below(const Table16& boundaries, Floats x) {
  Ints count = all(0);
  for (int k = 0; k < 15; k++) count = count + is_above(x, all(boundaries.values[k]));
  return count;
}
