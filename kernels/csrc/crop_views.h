// What the loader makes of one image and its map on a CPU once the windows are chosen: two resized, coloured views, the
// salient share of each cell of a grid over the query window, and the salient mask of the key view.
//
// The definition is the graph of cast_fast/data/dali_loader.py in DALI's own operators, which makes the same without
// this file: views and mask by a triangle filter as wide as the scale (at least one pixel; "linear" with antialias),
// edge pixels repeated, one rounding after the resize and one after the colours. Only the share differs: it is the exact
// average here, of 16 x 16 samples a cell there. Sums are in another order than DALI's, so that a value may round to the
// other side.
//
// Plain C++, so that a test can compile it alone. The arithmetic is written out (no contraction, no fast-math), so that
// every processor gives the same bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace cast_fast {

constexpr int kColourNumbers = 12;  // of a view: rows of a 3 x 4 matrix, [R' G' B'] = M [R G B 1], on 0 to 255
constexpr float kIdentity[kColourNumbers] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0};

// A window on a grid of pixels, not necessarily whole ones: [y0, y1) x [x0, x1).
struct Span {
  double y0, x0, y1, x1;
};

// A window given as shares of the sides: y0, x0, y1, x1.
inline Span Scaled(const float *relative, int32_t height, int32_t width) {
  return {static_cast<double>(relative[0]) * height, static_cast<double>(relative[1]) * width,
          static_cast<double>(relative[2]) * height, static_cast<double>(relative[3]) * width};
}

// For each output position of an axis the input positions that it is made of: `count` from `first[i]` on.
struct Taps {
  int32_t count = 0;
  std::vector<int32_t> first;
  std::vector<float> weights;  // count an output position; they sum to 1

  const float *of(int32_t i) const { return weights.data() + static_cast<int64_t>(i) * count; }
  int32_t begin() const { return *std::min_element(first.begin(), first.end()); }
  int32_t end() const { return *std::max_element(first.begin(), first.end()) + count; }
};

// Resampling [low, high) of `length` pixels to `size` by a triangle filter.
inline Taps TriangleTaps(double low, double high, int32_t length, int32_t size) {
  const double scale = (high - low) / size, radius = std::max(scale, 1.0);
  Taps taps;
  taps.count = static_cast<int32_t>(std::min<double>(length, std::floor(2 * radius) + 1));
  taps.first.resize(size);
  taps.weights.assign(static_cast<int64_t>(size) * taps.count, 0.0f);
  for (int32_t i = 0; i < size; i++) {
    const double centre = low + (i + 0.5) * scale - 0.5;  // in whole numbers at the middle of a pixel
    const double from = std::ceil(centre - radius), to = std::floor(centre + radius);
    const double first = std::clamp<double>(from, 0, length - taps.count);
    float *weights = taps.weights.data() + static_cast<int64_t>(i) * taps.count;
    double sum = 0;
    for (double at = from; at <= to; at++) {
      const double weight = 1 - std::abs(at - centre) / radius;
      if (!(weight > 0)) continue;
      weights[static_cast<int32_t>(std::clamp<double>(at, 0, length - 1) - first)] += static_cast<float>(weight);
      sum += weight;
    }
    for (int32_t k = 0; k < taps.count; k++) weights[k] = static_cast<float>(weights[k] / sum);
    taps.first[i] = static_cast<int32_t>(first);
  }
  return taps;
}

// Averaging [low, high) of `length` pixels in `size` equal cells.
inline Taps AreaTaps(double low, double high, int32_t length, int32_t size) {
  low = std::clamp<double>(low, 0, length);
  high = std::clamp<double>(high, low, length);
  const double cell = (high - low) / size;
  Taps taps;
  taps.count = static_cast<int32_t>(std::min<double>(length, std::floor(cell) + 2));
  taps.first.resize(size);
  taps.weights.assign(static_cast<int64_t>(size) * taps.count, 0.0f);
  for (int32_t i = 0; i < size; i++) {
    const double from = low + i * cell, to = low + (i + 1) * cell;
    const double first = std::clamp<double>(std::floor(from), 0, length - taps.count);
    float *weights = taps.weights.data() + static_cast<int64_t>(i) * taps.count;
    taps.first[i] = static_cast<int32_t>(first);
    for (int32_t k = 0; k < taps.count && cell > 0; k++) {
      const double share = std::min(to, first + k + 1) - std::max(from, first + k);
      weights[k] = static_cast<float>(std::max(share, 0.0) / cell);
    }
  }
  return taps;
}

namespace detail {

#define CAST_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define CAST_SHUFFLE(which, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CAST_SHUFFLE(which, a, b, ...) __builtin_shuffle(a, b, which{__VA_ARGS__})
#endif

// As many rows of the output as a vector has lanes are made at a time, so that both passes work on whole vectors: the
// vertical one blends rows of the input; a transposition puts the rows' values of a column side by side; the horizontal
// one blends columns. A value is made by the same operations whatever the number of lanes.
template <int lanes>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * lanes)));
  typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
  typedef Floats FloatsInMemory __attribute__((aligned(4), may_alias));
  typedef Ints IntsInMemory __attribute__((aligned(4), may_alias));
};
template <int lanes>
using Floats = typename Vector<lanes>::Floats;
template <int lanes>
using Ints = typename Vector<lanes>::Ints;

template <int lanes>
CAST_INLINE const typename Vector<lanes>::FloatsInMemory &At(const float *values) {
  return *reinterpret_cast<const typename Vector<lanes>::FloatsInMemory *>(values);
}

template <int lanes>
CAST_INLINE void Store(const Floats<lanes> &value, float *out) {
  *reinterpret_cast<typename Vector<lanes>::FloatsInMemory *>(out) = value;
}

template <int lanes>
CAST_INLINE void Store(const Ints<lanes> &value, int32_t *out) {
  *reinterpret_cast<typename Vector<lanes>::IntsInMemory *>(out) = value;
}

template <int lanes>
CAST_INLINE void Transpose(Floats<lanes> *rows) {
  static_assert(lanes == 4 || lanes == 8);
  Floats<lanes> pairs[lanes], fours[lanes];
  if constexpr (lanes == 4) {
    for (int n = 0; n < 4; n += 2) {
      pairs[n] = CAST_SHUFFLE(Ints<lanes>, rows[n], rows[n + 1], 0, 4, 1, 5);
      pairs[n + 1] = CAST_SHUFFLE(Ints<lanes>, rows[n], rows[n + 1], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; i++) {
      rows[2 * i] = CAST_SHUFFLE(Ints<lanes>, pairs[i], pairs[i + 2], 0, 1, 4, 5);
      rows[2 * i + 1] = CAST_SHUFFLE(Ints<lanes>, pairs[i], pairs[i + 2], 2, 3, 6, 7);
    }
  } else {
    for (int n = 0; n < 8; n += 2) {
      pairs[n] = CAST_SHUFFLE(Ints<lanes>, rows[n], rows[n + 1], 0, 8, 1, 9, 4, 12, 5, 13);
      pairs[n + 1] = CAST_SHUFFLE(Ints<lanes>, rows[n], rows[n + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int n = 0; n < 8; n += 4) {
      for (int i = 0; i < 2; i++) {
        fours[n + 2 * i] = CAST_SHUFFLE(Ints<lanes>, pairs[n + i], pairs[n + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        fours[n + 2 * i + 1] = CAST_SHUFFLE(Ints<lanes>, pairs[n + i], pairs[n + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
    }
    for (int n = 0; n < 4; n++) {
      rows[n] = CAST_SHUFFLE(Ints<lanes>, fours[n], fours[n + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      rows[n + 4] = CAST_SHUFFLE(Ints<lanes>, fours[n], fours[n + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
}

// Room of this thread for `columns` columns of `lanes` rows.
template <int lanes, typename T>
T *Scratch(int32_t columns) {
  thread_local std::vector<T> scratch;
  const size_t needed = static_cast<size_t>(columns + lanes) * lanes;
  if (scratch.size() < needed) scratch.resize(needed);
  return scratch.data();
}

// `lanes` bytes as numbers, or `left` where not `whole`.
template <int lanes, bool whole>
CAST_INLINE void Load(const uint8_t *from, int32_t left, Ints<lanes> &values) {
  values = Ints<lanes>{};
  if constexpr (whole && lanes == 4) {
    // written out: compilers make eight bytes one instruction, but load four one by one
    std::memcpy(&values, from, 4);
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    const Bytes zero = {}, bytes = reinterpret_cast<Bytes>(values);
    const Bytes pairs = CAST_SHUFFLE(Bytes, bytes, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    values = reinterpret_cast<Ints<lanes>>(
        CAST_SHUFFLE(Bytes, pairs, zero, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23));
  } else {
    for (int j = 0; j < (whole ? lanes : left); j++) values[j] = from[j];
  }
}

// `lanes` columns of the vertical pass, or `left` of them where not `whole`: `rows` points at the first value that each
// output row is made of, `weights` holds the rows' weights of each of their `count` values. A value counts `shift` bits
// less: 7 keeps the top bit, which says "salient".
template <int lanes, int shift, bool whole>
CAST_INLINE void BlendColumns(const uint8_t *const *rows, int64_t pitch, const float *weights, int32_t count,
                              int32_t left, float *out) {
  Floats<lanes> sums[lanes] = {};
  for (int32_t k = 0; k < count; k++, weights += lanes) {
#pragma GCC unroll 8
    for (int n = 0; n < lanes; n++) {
      const uint8_t *from = rows[n] + pitch * k;
      Ints<lanes> values;
      Load<lanes, whole>(from, left, values);
      sums[n] += __builtin_convertvector(values >> shift, Floats<lanes>) * weights[n];
    }
  }
  Transpose<lanes>(sums);
  for (int n = 0; n < lanes; n++) Store<lanes>(sums[n], out + lanes * n);
}

// The vertical pass of the output rows from `row` on, those beyond the last one repeating it: `length` columns of
// values from column `begin` on, column by column.
template <int lanes, int shift>
CAST_INLINE const float *Blend(const uint8_t *pixels, int64_t pitch, int64_t begin, int32_t length, const Taps &down,
                               int32_t row, int32_t size) {
  float *out = Scratch<lanes, float>(length + down.count), *weights = out;
  const float *const sums = out += static_cast<int64_t>(down.count) * lanes;
  const uint8_t *rows[lanes];
  for (int n = 0; n < lanes; n++) {
    const int32_t i = std::min(row + n, size - 1);
    rows[n] = pixels + pitch * down.first[i] + begin;
    for (int32_t k = 0; k < down.count; k++) weights[lanes * k + n] = down.of(i)[k];
  }
  int32_t at = 0;
  for (; at + lanes <= length; at += lanes, out += lanes * lanes) {
    BlendColumns<lanes, shift, true>(rows, pitch, weights, down.count, lanes, out);
    for (int n = 0; n < lanes; n++) rows[n] += lanes;
  }
  if (at < length) BlendColumns<lanes, shift, false>(rows, pitch, weights, down.count, length - at, out);
  return sums;
}

// The nearest whole number, halves upwards; of values that are not below -1/2.
template <int lanes>
CAST_INLINE void Round(const Floats<lanes> &value, Ints<lanes> &whole) {
  whole = __builtin_convertvector(value + 0.5f, Ints<lanes>);
}

// The nearest whole number within 0 to 255 of red, green and blue times a row of the colours' matrix.
template <int lanes>
CAST_INLINE void Mix(const Floats<lanes> *pixel, const float *row, Ints<lanes> &mixed) {
  const Ints<lanes> zero = {}, top = zero + 255;
  Round<lanes>(pixel[0] * row[0] + pixel[1] * row[1] + pixel[2] * row[2] + row[3], mixed);
  mixed = mixed > zero ? mixed : zero;
  mixed = mixed < top ? mixed : top;
}

template <int lanes>
CAST_INLINE void ViewRows(const uint8_t *image, int32_t width, const Taps &down, const Taps &across, int32_t size,
                          bool mirrored, const float *colour, uint8_t *view) {
  const int32_t begin = across.begin(), length = 3 * (across.end() - begin), count = across.count;
  int32_t *line = Scratch<lanes, int32_t>(size);
  for (int32_t y = 0; y < size; y += lanes) {
    const float *sums = Blend<lanes, 0>(image, 3 * static_cast<int64_t>(width), 3 * static_cast<int64_t>(begin), length,
                                        down, y, size);
    for (int32_t x = 0; x < size; x++) {
      const int32_t from = mirrored ? size - 1 - x : x;
      const float *column = sums + 3 * lanes * static_cast<int64_t>(across.first[from] - begin);
      const float *weights = across.of(from);
      Floats<lanes> pixel[3] = {};
      for (int32_t k = 0; k < count; k++, column += 3 * lanes) {
        for (int channel = 0; channel < 3; channel++)
          pixel[channel] += At<lanes>(column + lanes * channel) * weights[k];
      }
      // averages of bytes, so that they need no clamping
      Ints<lanes> bytes[3];
      for (int channel = 0; channel < 3; channel++) Round<lanes>(pixel[channel], bytes[channel]);
      if (colour != nullptr) {
        for (int channel = 0; channel < 3; channel++)
          pixel[channel] = __builtin_convertvector(bytes[channel], Floats<lanes>);
        for (int channel = 0; channel < 3; channel++) Mix<lanes>(pixel, colour + 4 * channel, bytes[channel]);
      }
      Store<lanes>(bytes[0] | bytes[1] << 8 | bytes[2] << 16, line + lanes * x);
    }
    for (int32_t n = 0; n < std::min(lanes, size - y); n++, view += 3 * static_cast<int64_t>(size)) {
      // bytes of a little-endian number; the fourth one is overwritten by the next pixel
      for (int32_t x = 0; x + 1 < size; x++) std::memcpy(view + 3 * x, line + lanes * x + n, 4);
      std::memcpy(view + 3 * (size - 1), line + lanes * (size - 1) + n, 3);
    }
  }
}

template <int lanes>
CAST_INLINE void MaskRows(const uint8_t *map, int32_t width, const Taps &down, const Taps &across, int32_t size,
                          bool mirrored, uint8_t *mask) {
  const int32_t begin = across.begin(), count = across.count;
  int32_t *line = Scratch<lanes, int32_t>(size);
  for (int32_t y = 0; y < size; y += lanes) {
    const float *sums = Blend<lanes, 7>(map, width, begin, across.end() - begin, down, y, size);
    for (int32_t x = 0; x < size; x++) {
      const int32_t from = mirrored ? size - 1 - x : x;
      const float *column = sums + lanes * static_cast<int64_t>(across.first[from] - begin);
      const float *weights = across.of(from);
      Floats<lanes> share = {};
      for (int32_t k = 0; k < count; k++, column += lanes) share += At<lanes>(column) * weights[k];
      Store<lanes>((share > 0.5f) & 1, line + lanes * x);
    }
    for (int32_t n = 0; n < std::min(lanes, size - y); n++, mask += size) {
      for (int32_t x = 0; x < size; x++) mask[x] = static_cast<uint8_t>(line[lanes * x + n]);
    }
  }
}

template <int lanes>
CAST_INLINE void ShareRows(const uint8_t *map, int32_t width, const Taps &down, const Taps &across, int32_t rows,
                           int32_t columns, bool mirrored, float *share) {
  const int32_t begin = across.begin(), count = across.count;
  for (int32_t y = 0; y < rows; y += lanes) {
    const float *sums = Blend<lanes, 7>(map, width, begin, across.end() - begin, down, y, rows);
    for (int32_t x = 0; x < columns; x++) {
      const float *column = sums + lanes * static_cast<int64_t>(across.first[x] - begin);
      const float *weights = across.of(x);
      Floats<lanes> sum = {};
      for (int32_t k = 0; k < count; k++, column += lanes) sum += At<lanes>(column) * weights[k];
      for (int32_t n = 0; n < std::min(lanes, rows - y); n++)
        share[(y + n) * columns + (mirrored ? columns - 1 - x : x)] = std::min(sum[n], 1.0f);
    }
  }
}

// Each for the processor that it runs on. Four lanes are what every 64-bit processor has.
#if defined(__x86_64__)
#define CAST_DISPATCH(name, parameters, ...)                                                \
  __attribute__((target("avx2"))) inline void name##Avx2 parameters { name<8>(__VA_ARGS__); } \
  inline void name##Here parameters {                                                       \
    static const bool avx2 = __builtin_cpu_supports("avx2");                                \
    avx2 ? name##Avx2(__VA_ARGS__) : name<4>(__VA_ARGS__);                                  \
  }
#else
#define CAST_DISPATCH(name, parameters, ...) \
  inline void name##Here parameters { name<4>(__VA_ARGS__); }
#endif
CAST_DISPATCH(ViewRows,
              (const uint8_t *image, int32_t width, const Taps &down, const Taps &across, int32_t size, bool mirrored,
               const float *colour, uint8_t *view),
              image, width, down, across, size, mirrored, colour, view)
CAST_DISPATCH(MaskRows,
              (const uint8_t *map, int32_t width, const Taps &down, const Taps &across, int32_t size, bool mirrored,
               uint8_t *mask),
              map, width, down, across, size, mirrored, mask)
CAST_DISPATCH(ShareRows,
              (const uint8_t *map, int32_t width, const Taps &down, const Taps &across, int32_t rows, int32_t columns,
               bool mirrored, float *share),
              map, width, down, across, rows, columns, mirrored, share)
#undef CAST_DISPATCH

}  // namespace detail

// A view: (size, size, 3) from the window of an image (height, width, 3).
inline void MakeView(const uint8_t *image, int32_t height, int32_t width, const Span &window, int32_t size,
                     bool mirrored, const float *colour, uint8_t *view) {
  const Taps down = TriangleTaps(window.y0, window.y1, height, size);
  const Taps across = TriangleTaps(window.x0, window.x1, width, size);
  if (colour != nullptr && std::memcmp(colour, kIdentity, sizeof(kIdentity)) == 0) colour = nullptr;
  detail::ViewRowsHere(image, width, down, across, size, mirrored, colour, view);
}

// The mask: (size, size), 1 where more than half of what the filter sees is salient.
inline void MakeMask(const uint8_t *map, int32_t height, int32_t width, const Span &window, int32_t size, bool mirrored,
                     uint8_t *mask) {
  const Taps down = TriangleTaps(window.y0, window.y1, height, size);
  const Taps across = TriangleTaps(window.x0, window.x1, width, size);
  detail::MaskRowsHere(map, width, down, across, size, mirrored, mask);
}

// The share of salient area in each cell: (rows, columns).
inline void MakeShare(const uint8_t *map, int32_t height, int32_t width, const Span &window, int32_t rows,
                      int32_t columns, bool mirrored, float *share) {
  const Taps down = AreaTaps(window.y0, window.y1, height, rows);
  const Taps across = AreaTaps(window.x0, window.x1, width, columns);
  detail::ShareRowsHere(map, width, down, across, rows, columns, mirrored, share);
}

}  // namespace cast_fast
