// Sixteen floats, or int32, as arrays: loops that a compiler vectorizes for any processor.
// Included inside the namespace of a target.

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };

template <class R, class F> inline R lanes(F f) {
  R result;
  for (int i = 0; i < 16; i++) result.v[i] = f(i);
  return result;
}

inline Floats load(const float* p) {
  return lanes<Floats>([=](int i) { return p[i]; });
}
inline Ints bits(Floats x) {
  Ints result;
  std::memcpy(&result, &x, sizeof x);
  return result;
}
inline Floats from_bits(Ints x) {
  Floats result;
  std::memcpy(&result, &x, sizeof x);
  return result;
}
inline Floats load(const uint16_t* bf16) {
  return from_bits(lanes<Ints>([=](int i) { return int32_t(uint32_t(bf16[i]) << 16); }));
}
inline Ints load_bytes(const uint8_t* p) {
  return lanes<Ints>([=](int i) { return int32_t(p[i]); });
}
inline void store(float* p, Floats x) { std::memcpy(p, x.v, sizeof x.v); }
inline void store_low_halves(uint16_t* p, Ints x) {
  for (int i = 0; i < 16; i++) p[i] = uint16_t(x.v[i]);
}
inline void store_bytes(uint8_t* p, Ints x) {
  for (int i = 0; i < 16; i++) p[i] = uint8_t(x.v[i]);
}

inline Floats all(float x) {
  return lanes<Floats>([=](int) { return x; });
}
inline Ints all(int32_t x) {
  return lanes<Ints>([=](int) { return x; });
}

inline Floats operator+(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats operator*(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats operator/(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] / b.v[i]; });
}
// Contracted by the compiler where the processor has the instruction.
inline Floats fma(Floats a, Floats b, Floats c) {
  return lanes<Floats>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Floats root(Floats x) {
  return lanes<Floats>([&](int i) { return __builtin_sqrtf(x.v[i]); });
}
// NaN if either is.
inline Floats lesser(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] < b.v[i] || a.v[i] != a.v[i] ? a.v[i] : b.v[i]; });
}

inline Floats over_root(Floats num, Floats w, Floats eps) { return num / (root(w) + eps); }

inline Ints operator-(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Ints operator^(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] ^ b.v[i]; });
}
// -1 where x is negative, else 0.
inline Ints sign_fill(Ints x) {
  return lanes<Ints>([&](int i) { return -int32_t(x.v[i] < 0); });
}
inline Ints operator+(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Ints operator&(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] & b.v[i]; });
}
inline Ints operator|(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] | b.v[i]; });
}
template <int N> inline Ints shift_left(Ints x) {
  return lanes<Ints>([&](int i) { return int32_t(uint32_t(x.v[i]) << N); });
}
template <int N> inline Ints shift_right(Ints x) {
  return lanes<Ints>([&](int i) { return int32_t(uint32_t(x.v[i]) >> N); });
}
inline Ints greater(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline int32_t largest(Ints x) {
  int32_t most = x.v[0];
  for (int i = 1; i < 16; i++) most = x.v[i] > most ? x.v[i] : most;
  return most;
}

// 1 where a > b, which is false for NaN; else 0.
inline Ints is_above(Floats a, Floats b) {
  return lanes<Ints>([&](int i) { return int32_t(a.v[i] > b.v[i]); });
}
// x where s is not zero, else zero.
inline Floats zero_where_zero(Floats x, Floats s) {
  return lanes<Floats>([&](int i) { return s.v[i] != 0.0f ? x.v[i] : 0.0f; });
}

// Towards zero, and 0 for what is negative or NaN.
inline Ints truncated(Floats x) {
  return lanes<Ints>([&](int i) { return x.v[i] > 0.0f ? int32_t(x.v[i]) : 0; });
}

struct Table16 { const float* values; };
inline Table16 table16(const float* values) { return {values}; }
inline Floats look_up(const float* table, Ints index) {
  return lanes<Floats>([&](int i) { return table[index.v[i]]; });
}
inline Floats look_up(Table16 table, Ints index) { return look_up(table.values, index); }
inline Ints look_up(const uint8_t* table, Ints index) {
  return lanes<Ints>([&](int i) { return int32_t(table[index.v[i]]); });
}

// How many of 15 ascending boundaries lie strictly below x.
inline Ints count_below(Table16 boundaries, Floats x) {
  Ints count = all(0);
  for (int k = 0; k < 15; k++) count = count + is_above(x, all(boundaries.values[k]));
  return count;
}
