// Grouped matrix products on CPU: rows sorted by group, a weight matrix for each group.
//
//   forward:  y[r]   = x[r] w[g] + b[g]          for the rows r of group g
//   inputs:   dx[r]  = dy[r] w[g]^T
//   weights:  dw[g]  = sum_r x[r]^T dy[r],  db[g] = sum_r dy[r]
//
// Rows in no group (before start[0] or from start[G] on) are never read; their outputs are zero.
//
// One blocked product serves all three (Goto and van de Geijn 2008): panels of both sides are copied into cache in the
// order in which the innermost loop reads them, and a tile of the result stays in registers over K_BLOCK steps. Every
// element is summed in the same order wherever its row stands, so results depend neither on the other rows nor on the
// number of threads.
//
// Rows are float32 or, where the processor multiplies bfloat16 (AVX512_BF16), bfloat16: then weights, which stay float32
// in memory, are rounded to it as they are copied into panels, and sums are float32 all the same. A panel is made of
// units of 32 bits: a float, or two neighbours along k in bfloat16.
//
// Letters: R rows, G groups, A inputs, Z outputs of a product; m, n, k its rows, columns and the summed axis, k in units.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 12;
#else
constexpr int LANES = 8, TILE_ROWS = 4;
#endif
#if defined(__AVX512BF16__)
constexpr bool HAS_HALF = true;
#else
constexpr bool HAS_HALF = false;
#endif
constexpr int VECTORS = 2, TILE_COLS = LANES * VECTORS;
constexpr int64_t K_BLOCK = 256, K_BLOCK_PLAIN = 16, K_BLOCK_TURNED = 2048, M_BLOCK = 16 * TILE_ROWS;
constexpr int QUARTER = TILE_ROWS / 4;
constexpr int64_t CACHE_BYTES = 32 << 20;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(2), may_alias));

#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int Order __attribute__((vector_size(16)));
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Order{__VA_ARGS__})
#endif

// What becomes of a tile: it replaces what the result holds, or is added to it, or replaces it past the caches, which
// spares a large result that is written once from being read first.
enum class Store { replace, add, stream };

void write(Vector value, float* to, bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_ps(to, (__m512)value);
#endif
  *(Vector*)to = value;
}

// Makes what was streamed visible before the work counts as done.
void finish_streaming() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// A matrix in memory, float32 or bfloat16 (half): element (i, j) is `i * rows + j * cols` elements after the first; one
// of the two strides is 1.
struct Matrix {
  const char* data;
  bool half;
  int64_t rows, cols;
  int64_t bytes() const { return half ? 2 : 4; }
  Matrix at(int64_t i, int64_t j) const { return {data + (i * rows + j * cols) * bytes(), half, rows, cols}; }
};

// A unit of a panel, whatever it holds, at an address that may be odd to it.
float unit_at(const char* from) {
  float unit;
  std::memcpy(&unit, from, sizeof(unit));
  return unit;
}

// Copies `lines` lines of `length` units, line l `l * stride` bytes on, so that unit e of line l lands at
// to[e * width + l]: a transpose. Lines up to `width` are filled with zeros.
void copy_transposed(const char* from, int64_t stride, int64_t lines, int64_t length, float* to, int64_t width) {
  int64_t l = 0;
  for (; l + 4 <= lines; l += 4) {
    const char* a = from + l * stride;
    int64_t e = 0;
    for (; e + 4 <= length; e += 4) {
      const char* at = a + 4 * e;
      Four r0 = *(const Four*)at, r1 = *(const Four*)(at + stride);
      Four r2 = *(const Four*)(at + 2 * stride), r3 = *(const Four*)(at + 3 * stride);
      Four t0 = SHUFFLED(r0, r1, 0, 4, 1, 5), t1 = SHUFFLED(r0, r1, 2, 6, 3, 7);
      Four t2 = SHUFFLED(r2, r3, 0, 4, 1, 5), t3 = SHUFFLED(r2, r3, 2, 6, 3, 7);
      float* out = to + e * width + l;
      *(Four*)out = SHUFFLED(t0, t2, 0, 1, 4, 5);
      *(Four*)(out + width) = SHUFFLED(t0, t2, 2, 3, 6, 7);
      *(Four*)(out + 2 * width) = SHUFFLED(t1, t3, 0, 1, 4, 5);
      *(Four*)(out + 3 * width) = SHUFFLED(t1, t3, 2, 3, 6, 7);
    }
    for (; e < length; e++)
      for (int64_t i = 0; i < 4; i++) to[e * width + l + i] = unit_at(a + i * stride + 4 * e);
  }
  for (; l < width; l++)
    for (int64_t e = 0; e < length; e++) to[e * width + l] = l < lines ? unit_at(from + l * stride + 4 * e) : 0.0f;
}

// Copies `length` lines of `lines` floats side by side: to[e * width + l] = from[e * stride + l], zeros up to `width`.
void copy_plain(const char* from, int64_t stride, int64_t lines, int64_t length, float* to, int64_t width) {
  for (int64_t e = 0; e < length; e++) {
    std::memcpy(to + e * width, from + e * stride, lines * sizeof(float));
    std::memset(to + e * width + lines, 0, (width - lines) * sizeof(float));
  }
}

#if defined(__AVX512BF16__)
// Sixteen elements as bfloat16 in the low halves of the lanes; those that `some` leaves out are zero and not read.
__m512i halves(const char* from, bool half, __mmask16 some) {
  __m256i found = half ? _mm256_maskz_loadu_epi16(some, from)
                       : (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, from));
  return _mm512_cvtepu16_epi32(found);
}

// Pairs of lines along k: unit e holds elements 2e and 2e + 1, which stand `along_k` bytes apart; k counts elements.
void pair_plain(const char* from, bool half, int64_t along_k, int64_t lines, int64_t k, float* to, int64_t width) {
  for (int64_t e = 0; 2 * e < k; e++) {
    const char* at = from + 2 * e * along_k;
    for (int64_t l = 0; l < width; l += LANES) {
      int64_t left = std::clamp<int64_t>(lines - l, 0, LANES), kept = std::min<int64_t>(LANES, width - l);
      __mmask16 some = (1u << left) - 1;
      __m512i low = halves(at + l * (half ? 2 : 4), half, some);
      __m512i high = 2 * e + 1 < k ? halves(at + along_k + l * (half ? 2 : 4), half, some) : _mm512_setzero_si512();
      __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      _mm512_mask_storeu_epi32(to + e * width + l, (1u << kept) - 1, pairs);
    }
  }
}

// The same from lines along which k runs: pairs stand side by side there already, once they are bfloat16.
void pair_transposed(const char* from, bool half, int64_t stride, int64_t lines, int64_t k, float* to, int64_t width) {
  constexpr int64_t CHUNK = 64;
  alignas(64) uint16_t rounded[TILE_COLS * CHUNK];
  if (half && k % 2 == 0) return copy_transposed(from, stride, lines, k / 2, to, width);
  for (int64_t first = 0; first < k; first += CHUNK) {
    int64_t count = std::min(CHUNK, k - first);
    for (int64_t l = 0; l < lines; l++)
      for (int64_t e = 0; e < CHUNK; e += LANES) {
        __mmask16 some = (1u << std::clamp<int64_t>(count - e, 0, LANES)) - 1;
        __m512i found = halves(from + l * stride + (first + e) * (half ? 2 : 4), half, some);
        _mm256_store_si256((__m256i*)(rounded + l * CHUNK + e), _mm512_cvtepi32_epi16(found));
      }
    copy_transposed((const char*)rounded, CHUNK * 2, lines, (count + 1) / 2, to + first / 2 * width, width);
  }
}
#endif

// The panel [k, width] of `elements` along the axis k, which are `along_k` apart, and `lines` along the other axis, which
// are `along_line` apart.
void copy_panel(Matrix from, int64_t along_k, int64_t along_line, int64_t lines, int64_t elements, bool pairs, float* to,
                int64_t width) {
  int64_t bytes = from.bytes();
#if defined(__AVX512BF16__)
  if (pairs) {
    if (along_line == 1) return pair_plain(from.data, from.half, along_k * bytes, lines, elements, to, width);
    return pair_transposed(from.data, from.half, along_line * bytes, lines, elements, to, width);
  }
#endif
  if (along_line == 1) copy_plain(from.data, along_k * bytes, lines, elements, to, width);
  else copy_transposed(from.data, along_line * bytes, lines, elements, to, width);
}

// sum += a * b for each lane: of floats, or of both halves of each unit.
template <bool PAIRS>
void multiply_add(Vector& sum, float a, Vector b) {
#if defined(__AVX512BF16__)
  if (PAIRS) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
    return;
  }
#endif
  sum += a * b;
}

// c[M, TILE_COLS] = a[k, M] b[k, TILE_COLS], the whole tile in registers.
template <int M, bool PAIRS>
void tile(int64_t k, const float* a, const float* b, int64_t b_stride, float* c, int64_t c_stride, Store store) {
  Vector sum[M][VECTORS] = {};
  if (store == Store::add)
    for (int i = 0; i < M; i++)
      for (int v = 0; v < VECTORS; v++) sum[i][v] = *(const Vector*)(c + i * c_stride + v * LANES);
  for (int64_t p = 0; p < k; p++, a += M, b += b_stride) {
    Vector right[VECTORS];
    for (int v = 0; v < VECTORS; v++) right[v] = *(const Vector*)(b + v * LANES);
    for (int i = 0; i < M; i++)
      for (int v = 0; v < VECTORS; v++) multiply_add<PAIRS>(sum[i][v], a[i], right[v]);
  }
  for (int i = 0; i < M; i++)
    for (int v = 0; v < VECTORS; v++) write(sum[i][v], c + i * c_stride + v * LANES, store == Store::stream);
}

template <bool PAIRS>
void tile_of(int rows, int64_t k, const float* a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
             Store store) {
  static_assert(QUARTER == 1 || QUARTER == 3, "a case for each number of rows below");
  if (rows == 4) tile<4, PAIRS>(k, a, b, b_stride, c, c_stride, store);
  else if (rows == 8) tile<8, PAIRS>(k, a, b, b_stride, c, c_stride, store);
  else tile<TILE_ROWS, PAIRS>(k, a, b, b_stride, c, c_stride, store);
}

// Tiles of TILE_ROWS rows; the last one is cut to a multiple of 4.
int rows_of_tile(int64_t left) { return left >= TILE_ROWS ? TILE_ROWS : int((left + 3) / 4 * 4); }

struct Scratch {
  std::vector<float> left, right;
  Scratch() : left(M_BLOCK * K_BLOCK), right(TILE_COLS * K_BLOCK_TURNED) {}
};

Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

// One tile of the result: in place where it is whole, else through a copy.
template <bool PAIRS>
void one_tile(int rows, int64_t m, int64_t n, int64_t k, const float* a, const float* b, int64_t b_stride, float* c,
              int64_t c_stride, Store store) {
  if (m == rows && n == TILE_COLS) return tile_of<PAIRS>(rows, k, a, b, b_stride, c, c_stride, store);
  float part[TILE_ROWS * TILE_COLS] = {};
  if (store == Store::add)
    for (int64_t i = 0; i < m; i++) std::memcpy(part + i * TILE_COLS, c + i * c_stride, n * sizeof(float));
  tile_of<PAIRS>(rows, k, a, b, b_stride, part, TILE_COLS, store == Store::add ? Store::add : Store::replace);
  for (int64_t i = 0; i < m; i++) std::memcpy(c + i * c_stride, part + i * TILE_COLS, n * sizeof(float));
}

// How many steps of k are taken at once. Rows of several tiles read each panel of b again and again: it should stay in
// the first cache. Rows of one tile read it once: then b is read in the order in which it lies in memory, along n where
// it is used as it is, along k where it is turned.
int64_t k_block(int64_t m, bool turned) {
  if (m > TILE_ROWS) return K_BLOCK;
  return turned ? K_BLOCK_TURNED : K_BLOCK_PLAIN;
}

// c[m, n] = a[m, k] b[k, n], or more of it (`Store`), k in elements. `c` has rows of c_stride; m is at most M_BLOCK.
template <bool PAIRS>
void product(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_stride, Store store) {
  static_assert(TILE_ROWS * K_BLOCK_TURNED <= M_BLOCK * K_BLOCK, "the left panels of one tile fit");
  Scratch& space = scratch();
  float *left = space.left.data(), *right = space.right.data();
  bool turned = b.cols != 1, direct = m <= TILE_ROWS && !turned && !PAIRS;
  int64_t step = k_block(m, turned) * (PAIRS ? 2 : 1);
  if (k > step && store == Store::stream) store = Store::replace;
  if (k == 0 && store != Store::add)
    for (int64_t i = 0; i < m; i++) std::memset(c + i * c_stride, 0, n * sizeof(float));
  for (int64_t k0 = 0; k0 < k; k0 += step, store = Store::add) {
    int64_t elements = std::min(step, k - k0), kb = PAIRS ? (elements + 1) / 2 : elements;
    for (int64_t i = 0; i < m; i += TILE_ROWS) {
      int rows = rows_of_tile(m - i);
      copy_panel(a.at(i, k0), a.cols, a.rows, std::min<int64_t>(rows, m - i), elements, PAIRS, left + i * kb, rows);
    }
    for (int64_t j = 0; j < n; j += TILE_COLS) {
      int64_t cols = std::min<int64_t>(TILE_COLS, n - j), stride = b.rows;
      const float* panel = (const float*)b.at(k0, j).data;
      if (!direct || cols < TILE_COLS) {
        copy_panel(b.at(k0, j), b.rows, b.cols, cols, elements, PAIRS, right, TILE_COLS);
        panel = right, stride = TILE_COLS;
      }
      for (int64_t i = 0; i < m; i += TILE_ROWS)
        one_tile<PAIRS>(rows_of_tile(m - i), std::min<int64_t>(TILE_ROWS, m - i), cols, kb, left + i * kb, panel, stride,
                        c + i * c_stride + j, c_stride, store);
    }
  }
}

// The same of floats, or of rows in bfloat16 by pairs.
void product_of(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t c_stride, Store store) {
  if (HAS_HALF && a.half) product<true>(m, n, k, a, b, c, c_stride, store);
  else product<false>(m, n, k, a, b, c, c_stride, store);
}

// Runs body(0) .. body(count - 1) on the threads of the pool and on this one. This thread works too, so all is done
// even if the pool never has a thread to spare; a helper that comes late finds nothing left.
template <typename Body>
void in_parallel(ffi::ThreadPool& pool, int64_t count, Body body) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, body]() {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      body(i);
      if (shared->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->all_done.notify_all();
      }
    }
  };
  int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done.load() == count; });
}

using Floats = ffi::Buffer<ffi::F32>;
using Rows = ffi::AnyBuffer;
using Integers = ffi::Buffer<ffi::S32>;
using Out = ffi::Result<Floats>;

// Rows [R, width] from row `first` and column `column` on, or with `turned` their transpose.
Matrix rows_from(const Rows& x, int64_t first, int64_t column = 0, bool turned = false) {
  int64_t width = x.dimensions()[1];
  bool half = x.element_type() == ffi::BF16;
  Matrix all{(const char*)x.untyped_data(), half, width, 1};
  Matrix part = all.at(first, column);
  return turned ? Matrix{part.data, half, 1, width} : part;
}

// Group g's weights, rows of `columns`.
Matrix weights_of(const Floats& w, int64_t g) {
  int64_t inputs = w.dimensions()[1], outputs = w.dimensions()[2];
  return {(const char*)(w.typed_data() + g * inputs * outputs), false, outputs, 1};
}

// sum[j] += row[j].
void add_row(Matrix row, int64_t columns, float* sum) {
  if (!row.half) {
    for (int64_t j = 0; j < columns; j++) sum[j] += ((const float*)row.data)[j];
    return;
  }
  for (int64_t j = 0; j < columns; j++) {
    uint32_t bits = uint32_t(((const uint16_t*)row.data)[j]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    sum[j] += value;
  }
}

bool known(const Rows& x) { return x.element_type() == ffi::F32 || (HAS_HALF && x.element_type() == ffi::BF16); }

ffi::Error unknown_type() { return ffi::Error::InvalidArgument("expected rows in float32, or bfloat16 where the processor has it"); }

struct Piece {
  int64_t group, first, size;
};

// The groups in pieces of at most M_BLOCK rows, the large pieces first, so that the threads end together.
std::vector<Piece> pieces_of(const Integers& start) {
  std::vector<Piece> pieces;
  for (int64_t g = 0; g + 1 < start.element_count(); g++)
    for (int64_t r = start.typed_data()[g]; r < start.typed_data()[g + 1]; r += M_BLOCK)
      pieces.push_back({g, r, std::min<int64_t>(M_BLOCK, start.typed_data()[g + 1] - r)});
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.size > b.size; });
  return pieces;
}

void clear_outside(const Integers& start, int64_t rows, int64_t width, float* y) {
  int64_t groups = start.element_count() - 1, first = start.typed_data()[0], last = start.typed_data()[groups];
  std::memset(y, 0, first * width * sizeof(float));
  std::memset(y + last * width, 0, (rows - last) * width * sizeof(float));
}

ffi::Error Forward(ffi::ThreadPool pool, Rows x, Floats w, Floats b, Integers start, Out y) {
  if (!known(x)) return unknown_type();
  int64_t rows = x.dimensions()[0], inputs = w.dimensions()[1], outputs = w.dimensions()[2];
  bool biased = b.element_count() > 0;
  float* out = y->typed_data();
  clear_outside(start, rows, outputs, out);
  auto pieces = pieces_of(start);
  in_parallel(pool, pieces.size(), [&](int64_t i) {
    auto [group, first, size] = pieces[i];
    float* c = out + first * outputs;
    if (biased)
      for (int64_t r = 0; r < size; r++)
        std::memcpy(c + r * outputs, b.typed_data() + group * outputs, outputs * sizeof(float));
    product_of(size, outputs, inputs, rows_from(x, first), weights_of(w, group), c, outputs,
               biased ? Store::add : Store::replace);
  });
  return ffi::Error::Success();
}

ffi::Error Inputs(ffi::ThreadPool pool, Rows dy, Floats w, Integers start, Out dx) {
  if (!known(dy)) return unknown_type();
  int64_t rows = dy.dimensions()[0], inputs = w.dimensions()[1], outputs = w.dimensions()[2];
  float* out = dx->typed_data();
  clear_outside(start, rows, inputs, out);
  auto pieces = pieces_of(start);
  in_parallel(pool, pieces.size(), [&](int64_t i) {
    auto [group, first, size] = pieces[i];
    Matrix weights = weights_of(w, group);
    std::swap(weights.rows, weights.cols);
    product_of(size, inputs, outputs, rows_from(dy, first), weights, out + first * inputs, inputs, Store::replace);
  });
  return ffi::Error::Success();
}

ffi::Error Weights(ffi::ThreadPool pool, Rows x, Rows dy, Integers start, Out dw, Out db) {
  if (!known(x) || x.element_type() != dy.element_type()) return unknown_type();
  int64_t inputs = x.dimensions()[1], outputs = dy.dimensions()[1], groups = start.element_count() - 1;
  bool biased = db->element_count() > 0;
  int64_t row_parts = std::max<int64_t>(1, (inputs + M_BLOCK - 1) / M_BLOCK);
  // Whole rows of a matrix where there are many, so that memory is written in order; else pieces for all threads.
  int64_t width = groups * row_parts < 4 * pool.num_threads() ? 4 * TILE_COLS : std::max<int64_t>(1, outputs);
  int64_t parts = row_parts * ((outputs + width - 1) / width);
  bool aligned = outputs % LANES == 0 && (uintptr_t)dw->typed_data() % (LANES * sizeof(float)) == 0;
  Store store = aligned && dw->size_bytes() > (size_t)CACHE_BYTES ? Store::stream : Store::replace;
  in_parallel(pool, groups * parts, [&](int64_t i) {
    int64_t group = i / parts, a = i % parts % row_parts * M_BLOCK, z = i % parts / row_parts * width;
    int64_t size = std::min(M_BLOCK, inputs - a), columns = std::min(width, outputs - z);
    int64_t first = start.typed_data()[group], count = start.typed_data()[group + 1] - first;
    Matrix right = rows_from(dy, first, z);
    product_of(size, columns, count, rows_from(x, first, a, true), right,
               dw->typed_data() + (group * inputs + a) * outputs + z, outputs, store);
    finish_streaming();
    if (biased && a == 0) {
      float* sum = db->typed_data() + group * outputs + z;
      std::memset(sum, 0, columns * sizeof(float));
      for (int64_t r = 0; r < count; r++) add_row(right.at(r, 0), columns, sum);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(pathways_grouped_forward, Forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Rows>().Arg<Floats>().Arg<Floats>().Arg<Integers>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(pathways_grouped_inputs, Inputs,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Rows>().Arg<Floats>().Arg<Integers>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(pathways_grouped_weights, Weights,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Rows>().Arg<Rows>().Arg<Integers>().Ret<Floats>().Ret<Floats>());

extern "C" int pathways_grouped_has_bfloat16() { return HAS_HALF; }
