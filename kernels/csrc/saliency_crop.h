// The rule of cast_fast/data/saliency_crop.py, which is the definition, for the CPU and for CUDA.
//
// Both must give the same integers as the NumPy function for the same map and random numbers. So the arithmetic here is
// the same sequence of correctly rounded float64 operations: compile with -ffp-contract=off (nvcc: -fmad=false) and
// without any fast-math option. This file depends on nothing but the language, so that a test can compile it alone.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define CAST_HD __host__ __device__
#else
#define CAST_HD
#endif

namespace cast_fast {

constexpr int kAttempts = 10;
constexpr int kTries = 6;  // proposals of the centre per attempt
constexpr int kRows = kAttempts + 1;
constexpr int kColumns = 2 + 4 * kTries;
constexpr int kRandomNumbers = 2 * kRows * kColumns;
constexpr double kAreaMin = 0.2;
constexpr int kThreshold = 127;  // salient: value > kThreshold
constexpr int64_t kMaxPixels = 1 << 30;  // so that no sum of coordinates or counts leaves 32 bits

struct Window {
  int32_t y, x, h, w;
};

struct Rule {
  double phi;
  bool overlap;      // the key window must share salient pixels with the query window
  bool constrained;  // false: plain random resized crops
};

struct Chosen {
  Window window[2];  // query, key
  uint8_t fallback[2];
  double held[2];  // share of all salient pixels; 0 where no constraint was applied
};

// The salient pixels of a window: how many, the sums of their coordinates, and their box [y0, y1) x [x0, x1).
struct Survey {
  int32_t count = 0;
  int64_t sum_y = 0, sum_x = 0;
  int32_t y0 = INT32_MAX, x0 = INT32_MAX, y1 = 0, x1 = 0;
};

// floor(value) clamped to [0, top]; NaN gives 0.
CAST_HD inline int32_t FloorWithin(double value, int32_t top) {
  if (!(value >= 0.0)) return 0;
  return value >= static_cast<double>(top) ? top : static_cast<int32_t>(floor(value));
}

// Least number of pixels that is at least this share of `count`, and at least one.
CAST_HD inline int32_t WholePixels(double share, int32_t count) {
  const double pixels = ceil(share * static_cast<double>(count));
  return pixels < 1.0 ? 1 : static_cast<int32_t>(pixels);
}

// Height and width of an attempt; false where it does not fit. NaN and infinities fail the comparisons.
CAST_HD inline bool DrawSize(const double *row, int32_t height, int32_t width, Window &window) {
  const double fraction = row[0], ratio = row[1];
  if (!(fraction > 0.0 && ratio > 0.0)) return false;
  const double area = fraction * static_cast<double>(static_cast<int64_t>(height) * width);
  const double w = sqrt(area * ratio) + 0.5;
  const double h = sqrt(area / ratio) + 0.5;
  if (!(w >= 1.0 && w < width + 1.0 && h >= 1.0 && h < height + 1.0)) return false;
  window.h = static_cast<int32_t>(floor(h));
  window.w = static_cast<int32_t>(floor(w));
  return true;
}

// First pixel of a window along one axis; `tries` points at the axis' first pair (u, E).
CAST_HD inline int32_t DrawOrigin(const double *tries, int32_t side, int32_t extent, double mean) {
  const double sigma = static_cast<double>(extent);
  const double low = side * 0.5;
  const double high = sigma - low;
  double nearest = mean > low ? mean : low;
  nearest = nearest < high ? nearest : high;
  double least = (nearest - mean) / sigma;
  least = least * least;
  double centre = low;
  for (int i = 0; i < kTries; i++) {
    centre = low + tries[4 * i] * (high - low);
    const double distance = (centre - mean) / sigma;
    if (distance * distance <= least + 2.0 * tries[4 * i + 1]) break;
  }
  return FloorWithin((centre - low) + 0.5, extent - side);
}

CAST_HD inline bool DrawCandidate(const double *row, int32_t height, int32_t width, double mean_y, double mean_x,
                                  Window &window) {
  if (!DrawSize(row, height, width, window)) return false;
  window.x = DrawOrigin(row + 2, window.w, width, mean_x);
  window.y = DrawOrigin(row + 4, window.h, height, mean_y);
  return true;
}

CAST_HD inline Window Intersection(const Window &a, const Window &b) {
  const int32_t y0 = a.y > b.y ? a.y : b.y, x0 = a.x > b.x ? a.x : b.x;
  const int32_t y1 = a.y + a.h < b.y + b.h ? a.y + a.h : b.y + b.h;
  const int32_t x1 = a.x + a.w < b.x + b.w ? a.x + a.w : b.x + b.w;
  return {y0, x0, y1 > y0 ? y1 - y0 : 0, x1 > x0 ? x1 - x0 : 0};
}

// A `Map` offers height(), width(), Count(window) and Look(window). In CUDA the threads of a block call them together,
// and all of them run the code below on the same values.

// Salient pixel number `n` of a window, in raster order, as a window of one pixel.
template <typename Map>
CAST_HD Window FindSalient(const Map &map, Window window, int32_t n) {
  while (window.h > 1) {
    const Window top = {window.y, window.x, window.h / 2, window.w};
    const int32_t above = map.Count(top);
    if (n < above) {
      window = top;
    } else {
      n -= above;
      window = {top.y + top.h, window.x, window.h - top.h, window.w};
    }
  }
  while (window.w > 1) {
    const Window left = {window.y, window.x, 1, window.w / 2};
    const int32_t before = map.Count(left);
    if (n < before) {
      window = left;
    } else {
      n -= before;
      window = {window.y, left.x + left.w, 1, window.w - left.w};
    }
  }
  return window;
}

// Shorten [start, start + length) to `side` pixels that hold the anchor; returns the new start.
CAST_HD inline int32_t Place(double u, int32_t start, int32_t length, int32_t side, int32_t anchor) {
  const int32_t least = start > anchor - side + 1 ? start : anchor - side + 1;
  const int32_t most = anchor < start + length - side ? anchor : start + length - side;
  return least + FloorWithin(u * static_cast<double>(most - least + 1), most - least);
}

// The fallback window for the salient pixels of a region, of which there is at least one.
template <typename Map>
CAST_HD Window Fallback(const Map &map, const Window &region, const Survey &seen, const double *row) {
  const int32_t height = map.height(), width = map.width();
  Window box;
  box.y = seen.y0 - FloorWithin(row[0] * static_cast<double>(seen.y0), seen.y0);
  box.h = seen.y1 + FloorWithin(row[1] * static_cast<double>(height - seen.y1), height - seen.y1) - box.y;
  box.x = seen.x0 - FloorWithin(row[2] * static_cast<double>(seen.x0), seen.x0);
  box.w = seen.x1 + FloorWithin(row[3] * static_cast<double>(width - seen.x1), width - seen.x1) - box.x;
  const int64_t h = box.h, w = box.w;
  if (3 * w <= 4 * h && 3 * h <= 4 * w) return box;
  const Window anchor =
      FindSalient(map, region, FloorWithin(row[4] * static_cast<double>(seen.count), seen.count - 1));
  if (w > h) {
    const int32_t side = static_cast<int32_t>(4 * h / 3);
    box.x = Place(row[5], box.x, box.w, side, anchor.x);
    box.w = side;
  } else {
    const int32_t side = static_cast<int32_t>(4 * w / 3);
    box.y = Place(row[5], box.y, box.h, side, anchor.y);
    box.h = side;
  }
  return box;
}

// Two plain random resized crops from the same random numbers.
CAST_HD inline Chosen ChooseUnconstrained(int32_t height, int32_t width, const double *random) {
  Chosen chosen;
  for (int which = 0; which < 2; which++) {
    // the largest central window within the ratio limits, unless an attempt fits
    const int64_t tall = (8 * static_cast<int64_t>(width) + 3) / 6, wide = (8 * static_cast<int64_t>(height) + 3) / 6;
    Window window;
    window.h = tall < height ? static_cast<int32_t>(tall) : height;
    window.w = wide < width ? static_cast<int32_t>(wide) : width;
    window.y = (height - window.h) / 2;
    window.x = (width - window.w) / 2;
    bool found = false;
    for (int attempt = 0; attempt < kAttempts && !found; attempt++) {
      const double *row = random + (which * kRows + attempt) * kColumns;
      Window size;
      if (!DrawSize(row, height, width, size)) continue;
      found = true;
      window.h = size.h;
      window.w = size.w;
      window.y = FloorWithin(row[4] * static_cast<double>(height - size.h + 1), height - size.h);
      window.x = FloorWithin(row[2] * static_cast<double>(width - size.w + 1), width - size.w);
    }
    chosen.window[which] = window;
    chosen.fallback[which] = found ? 0 : 1;
    chosen.held[which] = 0.0;
  }
  return chosen;
}

// The windows of a sample. A map without salient pixels gets unconstrained windows, and `held` stays zero.
template <typename Map>
CAST_HD Chosen Choose(const Map &map, const double *random, const Rule &rule) {
  const int32_t height = map.height(), width = map.width();
  if (!rule.constrained) return ChooseUnconstrained(height, width, random);
  const Window whole = {0, 0, height, width};
  const Survey all = map.Look(whole);
  if (all.count == 0) return ChooseUnconstrained(height, width, random);
  const double total = static_cast<double>(all.count);
  // pixel centres lie half a pixel from their index
  const double mean_y = static_cast<double>(all.sum_y) / total + 0.5;
  const double mean_x = static_cast<double>(all.sum_x) / total + 0.5;
  const double most = kAreaMin * static_cast<double>(static_cast<int64_t>(height) * width) / total;
  const double share = rule.phi < most ? rule.phi : most;
  const int32_t needed = WholePixels(share, all.count);

  Chosen chosen;
  int32_t inside[2];
  for (int which = 0; which < 2; which++) {
    const bool paired = which == 1 && rule.overlap;
    const Window region = paired ? chosen.window[0] : whole;
    const int32_t needed_shared = paired ? WholePixels(share, inside[0]) : 0;
    bool found = false;
    Window window;
    for (int attempt = 0; attempt < kAttempts && !found; attempt++) {
      const double *row = random + (which * kRows + attempt) * kColumns;
      if (!DrawCandidate(row, height, width, mean_y, mean_x, window)) continue;
      inside[which] = map.Count(window);
      found = inside[which] >= needed && (!paired || map.Count(Intersection(region, window)) >= needed_shared);
    }
    if (!found) {
      window = Fallback(map, region, paired ? map.Look(region) : all, random + (which * kRows + kAttempts) * kColumns);
      inside[which] = map.Count(window);
    }
    chosen.window[which] = window;
    chosen.fallback[which] = found ? 0 : 1;
    chosen.held[which] = static_cast<double>(inside[which]) / total;
  }
  return chosen;
}

// What one thread of a CUDA block contributes: warps take rows in turn, lanes take columns in turn, so that a warp reads
// consecutive bytes. Here rather than in the kernel, so that a test can run it without a GPU.
CAST_HD inline int32_t CountShare(const uint8_t *values, int32_t stride, const Window &window, int thread, int threads) {
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  int32_t count = 0;
  for (int32_t y = window.y + warp; y < window.y + window.h; y += warps) {
    const uint8_t *row = values + static_cast<int64_t>(y) * stride;
    for (int32_t x = window.x + lane; x < window.x + window.w; x += 32) count += row[x] > kThreshold ? 1 : 0;
  }
  return count;
}

CAST_HD inline Survey LookShare(const uint8_t *values, int32_t stride, const Window &window, int thread, int threads) {
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  Survey seen;
  for (int32_t y = window.y + warp; y < window.y + window.h; y += warps) {
    const uint8_t *row = values + static_cast<int64_t>(y) * stride;
    for (int32_t x = window.x + lane; x < window.x + window.w; x += 32) {
      if (row[x] <= kThreshold) continue;
      seen.count++;
      seen.sum_y += y;
      seen.sum_x += x;
      if (y < seen.y0) seen.y0 = y;
      if (x < seen.x0) seen.x0 = x;
      if (y >= seen.y1) seen.y1 = y + 1;
      if (x >= seen.x1) seen.x1 = x + 1;
    }
  }
  return seen;
}

// Corners as shares of the sides: [y0/H, x0/W, y1/H, x1/W].
CAST_HD inline void RelativeCorners(const Window &window, int32_t height, int32_t width, float *out) {
  const double h = static_cast<double>(height), w = static_cast<double>(width);
  out[0] = static_cast<float>(window.y / h);
  out[1] = static_cast<float>(window.x / w);
  out[2] = static_cast<float>((window.y + window.h) / h);
  out[3] = static_cast<float>((window.x + window.w) / w);
}

// Where the results of a sample go, and what they are computed from.
struct Sample {
  const uint8_t *values;  // the map, row by row; not read for unconstrained windows
  const double *random;   // (2, 11, 26)
  int32_t *windows;       // (2, 4): [y0, x0, h, w] of query and key
  float *relative;        // (2, 4)
  uint8_t *fallback;      // (2,)
  double *held;           // (2,)
  int32_t height, width;
};

CAST_HD inline void Store(const Chosen &chosen, const Sample &sample) {
  for (int which = 0; which < 2; which++) {
    const Window &window = chosen.window[which];
    sample.windows[4 * which] = window.y;
    sample.windows[4 * which + 1] = window.x;
    sample.windows[4 * which + 2] = window.h;
    sample.windows[4 * which + 3] = window.w;
    RelativeCorners(window, sample.height, sample.width, sample.relative + 4 * which);
    sample.fallback[which] = chosen.fallback[which];
    sample.held[which] = chosen.held[which];
  }
}

}  // namespace cast_fast
