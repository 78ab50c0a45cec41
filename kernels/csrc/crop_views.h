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

// The inner loops also for processors that are newer than the compiler's default target, chosen at load.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CAST_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CAST_CLONES
#endif

namespace cast_fast {

constexpr int kColourNumbers = 12;  // of a view: rows of a 3 x 4 matrix, [R' G' B'] = M [R G B 1], on 0 to 255
constexpr float kIdentity[kColourNumbers] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0};
constexpr int kRowsAtOnce = 4;

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

// sums[j] (+)= sum over four rows of weight * value. `shift` 7 makes a value its top bit, which says "salient"; 0 keeps it.
CAST_CLONES inline void AddRows(const uint8_t *const *rows, const float *weights, int32_t shift, bool fresh,
                                int32_t length, float *sums) {
  const uint8_t *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  const float wa = weights[0], wb = weights[1], wc = weights[2], wd = weights[3];
  if (fresh) std::memset(sums, 0, sizeof(float) * length);
  for (int32_t j = 0; j < length; j++) {
    sums[j] += (wa * static_cast<float>(a[j] >> shift) + wb * static_cast<float>(b[j] >> shift)) +
               (wc * static_cast<float>(c[j] >> shift) + wd * static_cast<float>(d[j] >> shift));
  }
}

// One row of the vertical pass: `length` values of the input rows that `taps` names for output row i.
inline void BlendRows(const uint8_t *pixels, int64_t pitch, const Taps &taps, int32_t i, int32_t shift, int32_t length,
                      float *sums) {
  for (int32_t k = 0; k < taps.count; k += kRowsAtOnce) {
    const uint8_t *rows[kRowsAtOnce];
    float weights[kRowsAtOnce];
    for (int32_t n = 0; n < kRowsAtOnce; n++) {
      const bool there = k + n < taps.count;
      rows[n] = pixels + pitch * (taps.first[i] + (there ? k + n : k));
      weights[n] = there ? taps.of(i)[k + n] : 0.0f;
    }
    AddRows(rows, weights, shift, k == 0, length, sums);
  }
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

// Rounded to the nearest whole number, halves upwards, within 0 to 255.
inline FourInts Rounded(Four value) {
  const Four zero = {0, 0, 0, 0}, top = {255, 255, 255, 255};
  value = value < zero ? zero : value;
  value = value > top ? top : value;
  return __builtin_convertvector(value + 0.5f, FourInts);
}

// The horizontal pass and the colours of one row of a view: `size` RGB pixels from interleaved sums, of which one
// value beyond the last pixel must be readable. `colour` is null where nothing changes.
CAST_CLONES inline void FinishRow(const float *sums, int32_t begin, const Taps &taps, int32_t size, bool mirrored,
                                  const float *colour, uint8_t *out) {
  const int32_t count = taps.count;
  const float *weights = taps.weights.data();
  Four red = {0, 0, 0, 0}, green = red, blue = red, offset = red;
  if (colour != nullptr) {
    red = Four{colour[0], colour[4], colour[8], 0};
    green = Four{colour[1], colour[5], colour[9], 0};
    blue = Four{colour[2], colour[6], colour[10], 0};
    offset = Four{colour[3], colour[7], colour[11], 0};
  }
  for (int32_t i = 0; i < size; i++, weights += count) {
    const float *from = sums + 3 * static_cast<int64_t>(taps.first[i] - begin);
    Four sum = {0, 0, 0, 0};
    for (int32_t k = 0; k < count; k++) {
      Four pixel;
      std::memcpy(&pixel, from + 3 * k, sizeof(pixel));
      sum += pixel * weights[k];
    }
    FourInts value = Rounded(sum);
    if (colour != nullptr) {
      const Four whole = __builtin_convertvector(value, Four);
      value = Rounded(red * whole[0] + green * whole[1] + blue * whole[2] + offset);
    }
    uint8_t *pixel = out + 3 * static_cast<int64_t>(mirrored ? size - 1 - i : i);
    for (int32_t channel = 0; channel < 3; channel++) pixel[channel] = static_cast<uint8_t>(value[channel]);
  }
}

CAST_CLONES inline void FinishMaskRow(const float *sums, int32_t begin, const Taps &taps, int32_t size, bool mirrored,
                                      uint8_t *out) {
  const int32_t count = taps.count;
  const float *weights = taps.weights.data();
  for (int32_t i = 0; i < size; i++, weights += count) {
    const float *from = sums + (taps.first[i] - begin);
    float sum = 0;
    for (int32_t k = 0; k < count; k++) sum += from[k] * weights[k];
    out[mirrored ? size - 1 - i : i] = sum > 0.5f;
  }
}

inline std::vector<float> &Scratch() {
  thread_local std::vector<float> scratch;
  return scratch;
}

}  // namespace detail

// A view: (size, size, 3) from the window of an image (height, width, 3).
inline void MakeView(const uint8_t *image, int32_t height, int32_t width, const Span &window, int32_t size,
                     bool mirrored, const float *colour, uint8_t *view) {
  const Taps down = TriangleTaps(window.y0, window.y1, height, size);
  const Taps across = TriangleTaps(window.x0, window.x1, width, size);
  const int32_t begin = across.begin(), length = 3 * (across.end() - begin);
  if (colour != nullptr && std::memcmp(colour, kIdentity, sizeof(kIdentity)) == 0) colour = nullptr;
  auto &sums = detail::Scratch();
  sums.assign(length + 1, 0.0f);
  const int64_t pitch = 3 * static_cast<int64_t>(width);
  for (int32_t y = 0; y < size; y++) {
    detail::BlendRows(image + 3 * static_cast<int64_t>(begin), pitch, down, y, 0, length, sums.data());
    detail::FinishRow(sums.data(), begin, across, size, mirrored, colour, view + static_cast<int64_t>(y) * size * 3);
  }
}

// The mask: (size, size), 1 where more than half of what the filter sees is salient.
inline void MakeMask(const uint8_t *map, int32_t height, int32_t width, const Span &window, int32_t size, bool mirrored,
                     uint8_t *mask) {
  const Taps down = TriangleTaps(window.y0, window.y1, height, size);
  const Taps across = TriangleTaps(window.x0, window.x1, width, size);
  const int32_t begin = across.begin(), length = across.end() - begin;
  auto &sums = detail::Scratch();
  sums.assign(length, 0.0f);
  for (int32_t y = 0; y < size; y++) {
    detail::BlendRows(map + begin, width, down, y, 7, length, sums.data());
    detail::FinishMaskRow(sums.data(), begin, across, size, mirrored, mask + static_cast<int64_t>(y) * size);
  }
}

// The share of salient area in each cell: (rows, columns).
inline void MakeShare(const uint8_t *map, int32_t height, int32_t width, const Span &window, int32_t rows,
                      int32_t columns, bool mirrored, float *share) {
  const Taps down = AreaTaps(window.y0, window.y1, height, rows);
  const Taps across = AreaTaps(window.x0, window.x1, width, columns);
  const int32_t begin = across.begin(), length = across.end() - begin;
  auto &sums = detail::Scratch();
  sums.assign(length, 0.0f);
  for (int32_t y = 0; y < rows; y++) {
    detail::BlendRows(map + begin, width, down, y, 7, length, sums.data());
    for (int32_t x = 0; x < columns; x++) {
      float sum = 0;
      for (int32_t k = 0; k < across.count; k++) sum += sums[across.first[x] - begin + k] * across.of(x)[k];
      share[y * columns + (mirrored ? columns - 1 - x : x)] = std::min(sum, 1.0f);
    }
  }
}

}  // namespace cast_fast
