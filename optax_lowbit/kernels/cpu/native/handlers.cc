// The custom calls: operands to leaves, leaves to pieces of work for XLA's threads.

#include <sstream>
#include <string>
#include <vector>

#include "parallel.h"
#include "step.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace lowbit {
namespace {

// Elements of one piece of work: some 50 microseconds.
constexpr int64_t kPiece = 1 << 16;

// Thrown, and returned as an error, before anything is read: what a caller should have refused.
struct Refused {
  std::string message;
};

template <auto kernel>
struct Refusing {
  template <class... Args>
  auto operator()(Args... args) const -> decltype(kernel(args...)) {
    try {
      return kernel(args...);
    } catch (const Refused& refused) {
      return ffi::Error::InvalidArgument(refused.message);
    }
  }
};

void refuse_unless(bool is_right, const ffi::AnyBuffer& buffer, const char* right) {
  if (is_right) return;
  std::ostringstream message;
  message << "the native kernels of optax_lowbit take " << right << " here, not "
          << buffer.element_type();
  throw Refused{message.str()};
}

Array array(const ffi::AnyBuffer& buffer) {
  const bool is_bf16 = buffer.element_type() == ffi::DataType::BF16;
  refuse_unless(is_bf16 || buffer.element_type() == ffi::DataType::F32, buffer, "F32 or BF16");
  return {buffer.untyped_data(), is_bf16};
}

template <class T> T* data(const ffi::AnyBuffer& buffer);

template <> float* data(const ffi::AnyBuffer& buffer) {
  refuse_unless(buffer.element_type() == ffi::DataType::F32, buffer, "F32");
  return static_cast<float*>(buffer.untyped_data());
}

template <> uint8_t* data(const ffi::AnyBuffer& buffer) {
  refuse_unless(buffer.element_type() == ffi::DataType::U8, buffer, "U8");
  return static_cast<uint8_t*>(buffer.untyped_data());
}

template <> uint32_t* data(const ffi::AnyBuffer& buffer) {
  refuse_unless(buffer.element_type() == ffi::DataType::U32, buffer, "U32");
  return static_cast<uint32_t*>(buffer.untyped_data());
}

int64_t last_dimension(const ffi::AnyBuffer& buffer) {
  return buffer.dimensions().size() ? buffer.dimensions().back() : 1;
}

int64_t rows_of(const ffi::AnyBuffer& buffer, size_t trailing) {
  const auto dimensions = buffer.dimensions();
  int64_t rows = 1;
  for (size_t i = 0; i + trailing < dimensions.size(); i++) rows *= dimensions[i];
  return rows;
}

// Operands and results, taken one after the other.
class Arguments {
 public:
  Arguments(ffi::RemainingArgs args, ffi::RemainingRets rets) : args_(args), rets_(rets) {}
  ffi::AnyBuffer in() { return *args_.get<ffi::AnyBuffer>(next_in_++); }
  ffi::AnyBuffer out() { return **rets_.get<ffi::AnyBuffer>(next_out_++); }
  template <class T> const T* read() { return data<T>(in()); }
  template <class T> T* write() { return data<T>(out()); }

 private:
  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  size_t next_in_ = 0, next_out_ = 0;
};

using Table = ffi::Span<const float>;

Moment moment(int64_t bits, int64_t block, Table values, Table boundaries) {
  Moment result;
  if (!values.size()) return result;
  result.book = &codebook_of(values.begin(), values.size(), boundaries.begin(), int(bits));
  result.block = block;
  result.bytes_in_block = block * bits / 8;
  return result;
}

void take_codes(Moment& moment, const ffi::AnyBuffer& codes) {
  moment.codes = data<uint8_t>(codes);
  moment.bytes_in_row = last_dimension(codes);
}

void take_scales(Moment& moment, const ffi::AnyBuffer& scales) {
  moment.scales = data<float>(scales);
  moment.scales_in_row = last_dimension(scales);
}

void take_shape(Step& step, const ffi::AnyBuffer& grad) {
  step.columns = last_dimension(grad);
  step.all_rows = rows_of(grad, 1);
  step.rows = step.all_rows;
  step.grad = array(grad);
}

// Scales, shares or means: one for each row, and one for each column of each batch of rows.
void take_factors(Step& step, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& columns) {
  step.nu_rows = data<float>(rows);
  step.nu_columns = data<float>(columns);
  step.rows = step.all_rows / std::max<int64_t>(rows_of(columns, 1), 1);
}

template <class Work>
void in_pieces(ffi::ThreadPool& pool, int64_t count, int64_t elements_each, const Work& work) {
  const int64_t piece = std::max<int64_t>(kPiece / std::max<int64_t>(elements_each, 1), 1);
  run_all(pool, (count + piece - 1) / piece,
          [&](int64_t i) { work(i * piece, std::min((i + 1) * piece, count)); });
}

// coefficients, grad, mu codes, mu scales,
//   block: nu codes, nu scales; rank-1: nu codes, rows, columns, new rows, new columns;
//   factored: row shares, columns;
//   params, if it descends; words of a key, rows, columns, if it rounds stochastically
// -> update or params, mu codes, mu scales, [nu codes, [nu scales]]
ffi::Error step(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                int64_t second, bool descend, bool has_noise, int64_t mu_bits, int64_t mu_block,
                Table mu_values, Table mu_boundaries, int64_t nu_bits, int64_t nu_block, Table nu_values,
                Table nu_boundaries) {
  Arguments from(args, rets);
  Step step;
  step.second = Second(second);
  std::memcpy(&step.c, from.read<float>(), sizeof step.c);
  take_shape(step, from.in());
  step.block = mu_block;
  step.mu = moment(mu_bits, mu_block, mu_values, mu_boundaries);
  step.nu = moment(nu_bits, nu_block, nu_values, nu_boundaries);
  take_codes(step.mu, from.in());
  take_scales(step.mu, from.in());
  if (step.second == Second::kBlock || step.second == Second::kRank1) take_codes(step.nu, from.in());
  if (step.second == Second::kBlock) take_scales(step.nu, from.in());
  if (step.second == Second::kRank1 || step.second == Second::kFactored) {
    const ffi::AnyBuffer rows = from.in();
    take_factors(step, rows, from.in());
  }
  if (step.second == Second::kRank1) {  // read, but never written, by this call
    step.new_nu_rows = const_cast<float*>(from.read<float>());
    step.new_nu_columns = const_cast<float*>(from.read<float>());
  }
  if (descend) step.params = array(from.in());
  if (has_noise) {
    for (const uint32_t*& word : step.noise_key) word = from.read<uint32_t>();
    step.noise_rows = from.read<uint32_t>();
    step.noise_columns = from.read<uint32_t>();
  }
  step.result = array(from.out());
  step.mu.new_codes = from.write<uint8_t>();
  step.mu.new_scales = from.write<float>();
  if (step.second == Second::kBlock || step.second == Second::kRank1)
    step.nu.new_codes = from.write<uint8_t>();
  if (step.second == Second::kBlock) step.nu.new_scales = from.write<float>();
  in_pieces(pool, step.all_rows * step.blocks_in_row(), step.block,
            [&](int64_t first, int64_t last) { target().step(step, first, last); });
  return ffi::Error::Success();
}

// coefficients, grad, nu codes, rows, columns -> new rows, new columns
ffi::Error rank1_maxima(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                        int64_t nu_bits, int64_t nu_block, Table nu_values, Table nu_boundaries) {
  Arguments from(args, rets);
  Step step;
  std::memcpy(&step.c, from.read<float>(), sizeof step.c);
  take_shape(step, from.in());
  step.block = nu_block;
  step.nu = moment(nu_bits, nu_block, nu_values, nu_boundaries);
  take_codes(step.nu, from.in());
  const ffi::AnyBuffer rows_before = from.in();
  take_factors(step, rows_before, from.in());
  step.new_nu_rows = from.write<float>();
  step.new_nu_columns = from.write<float>();
  const int64_t batches = step.rows ? step.all_rows / step.rows : 0;
  std::memset(step.new_nu_columns, 0, batches * step.columns * sizeof(float));
  std::mutex mutex;
  // A piece adds its column maxima to all others' at its end, which many rows must pay for.
  const int64_t rows = std::min(std::max<int64_t>(kPiece / std::max<int64_t>(step.columns, 1), 64),
                                std::max<int64_t>(step.rows, 1));
  const int64_t in_batch = (step.rows + rows - 1) / rows;
  run_all(pool, batches * in_batch, [&](int64_t piece) {
    const int64_t batch = piece / in_batch, first = piece % in_batch * rows;
    const int64_t last = std::min(first + rows, step.rows);
    std::vector<float> columns((step.columns + 31) / 32 * 32);
    target().maxima(step, batch * step.rows + first, batch * step.rows + last, columns.data());
    float* merged = step.new_nu_columns + batch * step.columns;
    std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < step.columns; i++) {
      int32_t ours, theirs;
      std::memcpy(&ours, &columns[i], sizeof ours);
      std::memcpy(&theirs, &merged[i], sizeof theirs);
      merged[i] = ours > theirs ? columns[i] : merged[i];
    }
  });
  for (int64_t i = 0; i < batches * step.columns; i++)
    if (step.new_nu_columns[i] < std::numeric_limits<float>::min()) step.new_nu_columns[i] = 0;
  return ffi::Error::Success();
}

// Rows whose sums by column are added up one after the other.
constexpr int64_t kChunk = 256;

// x -> sums of squares by row, of equal parts of it, and by column
ffi::Error square_sums(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> by_row,
                       ffi::Result<ffi::AnyBuffer> by_column) {
  const int64_t columns = last_dimension(x), row_parts = last_dimension(*by_row);
  const int64_t bands = rows_of(*by_column, 1), band = rows_of(x, 1) / bands;
  const int64_t chunks = (band + kChunk - 1) / kChunk, n = columns / row_parts;
  float* row_sums = data<float>(*by_row);
  float* column_sums = data<float>(*by_column);
  const Array values = array(x);
  std::vector<float> sums(chunks > 1 ? bands * chunks * columns : 0);
  float* sums_of_chunks = chunks > 1 ? sums.data() : column_sums;
  run_all(pool, bands * chunks, [&](int64_t i) {
    const int64_t first = i / chunks * band + i % chunks * kChunk;
    const int64_t last = std::min(first + kChunk, (i / chunks + 1) * band);
    std::vector<float> squares(columns + 32);  // 32: whole vectors are added, zeros at the end
    for (int64_t row = first; row < last; row++)
      for (int64_t part = 0; part < row_parts; part++)
        target().square_sums(values, row * columns + part * n, n,
                             row_sums + row * row_parts + part, squares.data() + part * n);
    std::memcpy(sums_of_chunks + i * columns, squares.data(), columns * sizeof(float));
  });
  if (chunks == 1) return ffi::Error::Success();
  for (int64_t i = 0; i < bands * columns; i++) {
    column_sums[i] = 0;
    const float* of_band = sums_of_chunks + i / columns * chunks * columns + i % columns;
    for (int64_t chunk = 0; chunk < chunks; chunk++) column_sums[i] += of_band[chunk * columns];
  }
  return ffi::Error::Success();
}

// x -> codes, scales
ffi::Error quantize(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> codes,
                    ffi::Result<ffi::AnyBuffer> scales, int64_t bits, int64_t block, Table values,
                    Table boundaries) {
  Moment to = moment(bits, block, values, boundaries);
  take_codes(to, *codes);
  take_scales(to, *scales);
  to.new_codes = const_cast<uint8_t*>(to.codes);
  to.new_scales = const_cast<float*>(to.scales);
  const int64_t columns = last_dimension(x);
  const Array from = array(x);
  in_pieces(pool, rows_of(x, 1) * to.scales_in_row, block, [&](int64_t first, int64_t last) {
    target().quantize(from, to, columns, first, last);
  });
  return ffi::Error::Success();
}

// codes, scales -> x
ffi::Error dequantize(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                      ffi::Result<ffi::AnyBuffer> x, int64_t bits, int64_t block, Table values,
                      Table boundaries) {
  Moment from = moment(bits, block, values, boundaries);
  take_codes(from, codes);
  take_scales(from, scales);
  const int64_t columns = last_dimension(*x);
  const Array to = array(*x);
  in_pieces(pool, rows_of(*x, 1) * from.scales_in_row, block, [&](int64_t first, int64_t last) {
    target().dequantize(from, to, columns, first, last);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lowbit

#define LOWBIT_CODES(binding, name)                                            \
  binding.Attr<int64_t>(name "_bits").Attr<int64_t>(name "_block")             \
      .Attr<ffi::Span<const float>>(name "_values")                            \
      .Attr<ffi::Span<const float>>(name "_boundaries")

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LowbitStep, lowbit::Refusing<lowbit::step>(),
    LOWBIT_CODES(LOWBIT_CODES(ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("second")
                                  .Attr<bool>("descend")
                                  .Attr<bool>("has_noise"),
                              "mu"),
                 "nu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LowbitRank1Maxima, lowbit::Refusing<lowbit::rank1_maxima>(),
    LOWBIT_CODES(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets(), "nu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LowbitSquareSums, lowbit::Refusing<lowbit::square_sums>(),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(LowbitQuantize, lowbit::Refusing<lowbit::quantize>(),
                              LOWBIT_CODES(ffi::Ffi::Bind()
                                               .Ctx<ffi::ThreadPool>()
                                               .Arg<ffi::AnyBuffer>()
                                               .Ret<ffi::AnyBuffer>()
                                               .Ret<ffi::AnyBuffer>(),
                                           "x"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LowbitDequantize, lowbit::Refusing<lowbit::dequantize>(),
                              LOWBIT_CODES(ffi::Ffi::Bind()
                                               .Ctx<ffi::ThreadPool>()
                                               .Arg<ffi::AnyBuffer>()
                                               .Arg<ffi::AnyBuffer>()
                                               .Ret<ffi::AnyBuffer>(),
                                           "x"));

extern "C" const char* lowbit_target() { return lowbit::target().name; }
