// DALI operators CropViews and SaliencyTargets, on DALI's thread pool; what they do is in crop_views.h.
#include "crop_views.h"

#include <vector>

#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/operator.h"

namespace cast_fast {
namespace {

using Cpu = ::dali::CPUBackend;

constexpr int64_t kMostPixels = 1 << 30;

void CheckShape(const ::dali::TensorShape<> &found, const ::dali::TensorShape<> &expected, const char *message) {
  DALI_ENFORCE(found == expected, message);
}

// What both operators have in common: windows and flips of the two views, and the checks of a picture's shape.
class ViewOperator : public ::dali::StatelessOperator<Cpu> {
 public:
  explicit ViewOperator(const ::dali::OpSpec &spec) : ::dali::StatelessOperator<Cpu>(spec) {
    size_ = spec.GetArgument<int>("size");
    DALI_ENFORCE(size_ >= 1 && size_ <= 1 << 14, "size: expected a side of 1 to 16384 pixels");
  }

 protected:
  static void CheckInputs(const ::dali::Workspace &ws, int channels) {
    const auto &pictures = ws.Input<Cpu>(0), &windows = ws.Input<Cpu>(1), &mirrors = ws.Input<Cpu>(2);
    DALI_ENFORCE(pictures.type() == ::DALI_UINT8, "pictures: expected uint8");
    DALI_ENFORCE(windows.type() == ::DALI_FLOAT, "windows: expected float32");
    DALI_ENFORCE(mirrors.type() == ::DALI_FLOAT, "mirrors: expected float32");
    for (int i = 0; i < pictures.num_samples(); i++) {
      const auto shape = pictures.shape()[i];
      DALI_ENFORCE(shape.size() == 3 && shape[2] == channels, "pictures: expected the shape (H, W, 3), maps (H, W, 1)");
      DALI_ENFORCE(shape[0] >= 1 && shape[1] >= 1 && shape[0] <= kMostPixels / shape[1],
                   "pictures: expected sides of at least 1 and at most 2**30 pixels");
      CheckShape(windows.shape()[i], {2, 4}, "windows: expected the shape (2, 4)");
      CheckShape(mirrors.shape()[i], {2, 2}, "mirrors: expected the shape (2, 2)");
      const float *values = windows.tensor<float>(i);
      for (int view = 0; view < 2; view++, values += 4) {
        DALI_ENFORCE(0 <= values[0] && values[0] < values[2] && values[2] <= 1 && 0 <= values[1] &&
                         values[1] < values[3] && values[3] <= 1,
                     "windows: expected y0 < y1 and x0 < x1 within [0, 1]");
      }
    }
  }

  static const uint8_t *Picture(const ::dali::Workspace &ws, int i, int32_t *height, int32_t *width) {
    const auto shape = ws.Input<Cpu>(0).shape()[i];
    *height = static_cast<int32_t>(shape[0]);
    *width = static_cast<int32_t>(shape[1]);
    return ws.Input<Cpu>(0).tensor<uint8_t>(i);
  }

  static Span Window(const ::dali::Workspace &ws, int i, int view, int32_t height, int32_t width) {
    return Scaled(ws.Input<Cpu>(1).tensor<float>(i) + 4 * view, height, width);
  }

  static bool Mirrored(const ::dali::Workspace &ws, int i, int view) {
    return ws.Input<Cpu>(2).tensor<float>(i)[2 * view + 1] != 0;
  }

  int size_;
};

class CropViews : public ViewOperator {
 public:
  using ViewOperator::ViewOperator;

 protected:
  bool SetupImpl(std::vector<::dali::OutputDesc> &outputs, const ::dali::Workspace &ws) override {
    CheckInputs(ws, 3);
    const int count = ws.Input<Cpu>(0).num_samples();
    if (ws.NumInput() > 3) {
      DALI_ENFORCE(ws.Input<Cpu>(3).type() == ::DALI_FLOAT, "colours: expected float32");
      for (int i = 0; i < count; i++)
        CheckShape(ws.Input<Cpu>(3).shape()[i], {2, 3, 4}, "colours: expected the shape (2, 3, 4)");
    }
    outputs.resize(2);
    for (auto &output : outputs)
      output = {::dali::uniform_list_shape(count, ::dali::TensorShape<>{size_, size_, 3}), ::DALI_UINT8};
    return true;
  }

  void RunImpl(::dali::Workspace &ws) override {
    auto &threads = ws.GetThreadPool();
    for (int view = 0; view < 2; view++) ws.Output<Cpu>(view).SetLayout("HWC");
    for (int i = 0; i < ws.Input<Cpu>(0).num_samples(); i++) {
      for (int view = 0; view < 2; view++) {
        int32_t height, width;
        const uint8_t *image = Picture(ws, i, &height, &width);
        const Span window = Window(ws, i, view, height, width);
        const float *colour = nullptr;
        if (ws.NumInput() > 3) colour = ws.Input<Cpu>(3).tensor<float>(i) + kColourNumbers * view;
        uint8_t *out = ws.Output<Cpu>(view).mutable_tensor<uint8_t>(i);
        const bool mirrored = Mirrored(ws, i, view);
        threads.AddWork(
            [=, size = size_](int) { MakeView(image, height, width, window, size, mirrored, colour, out); },
            static_cast<int64_t>((window.y1 - window.y0) * (window.x1 - window.x0)));
      }
    }
    threads.RunAll();
  }
};

class SaliencyTargets : public ViewOperator {
 public:
  explicit SaliencyTargets(const ::dali::OpSpec &spec) : ViewOperator(spec) {
    const auto grid = spec.GetRepeatedArgument<int>("grid");
    DALI_ENFORCE(grid.size() == 2 && grid[0] >= 1 && grid[1] >= 1 && grid[0] <= 1 << 14 && grid[1] <= 1 << 14,
                 "grid: expected two numbers of cells");
    rows_ = grid[0];
    columns_ = grid[1];
  }

 protected:
  bool SetupImpl(std::vector<::dali::OutputDesc> &outputs, const ::dali::Workspace &ws) override {
    CheckInputs(ws, 1);
    const int count = ws.Input<Cpu>(0).num_samples();
    outputs.resize(2);
    outputs[0] = {::dali::uniform_list_shape(count, ::dali::TensorShape<>{rows_, columns_}), ::DALI_FLOAT};
    outputs[1] = {::dali::uniform_list_shape(count, ::dali::TensorShape<>{size_, size_, 1}), ::DALI_UINT8};
    return true;
  }

  void RunImpl(::dali::Workspace &ws) override {
    auto &threads = ws.GetThreadPool();
    ws.Output<Cpu>(1).SetLayout("HWC");
    for (int i = 0; i < ws.Input<Cpu>(0).num_samples(); i++) {
      int32_t height, width;
      const uint8_t *map = Picture(ws, i, &height, &width);
      const Span query = Window(ws, i, 0, height, width), key = Window(ws, i, 1, height, width);
      const bool query_mirrored = Mirrored(ws, i, 0), key_mirrored = Mirrored(ws, i, 1);
      float *share = ws.Output<Cpu>(0).mutable_tensor<float>(i);
      uint8_t *mask = ws.Output<Cpu>(1).mutable_tensor<uint8_t>(i);
      threads.AddWork(
          [=, this](int) {
            MakeShare(map, height, width, query, rows_, columns_, query_mirrored, share);
            MakeMask(map, height, width, key, size_, key_mirrored, mask);
          },
          static_cast<int64_t>(height) * width);
    }
    threads.RunAll();
  }

 private:
  int rows_, columns_;
};

}  // namespace
}  // namespace cast_fast

DALI_SCHEMA(CropViews)
    .DocStr(R"(The two views of an image: windows of it, resized, mirrored and coloured.

Inputs: images, uint8 (H, W, 3); windows as shares of the sides, float32 (2, 4), ``[y0, x0, y1, x1]``; whether each is
mirrored left to right, float32 (2, 2), in column 1; and, if given, what is done to the colours, float32 (2, 3, 4),
``[R', G', B'] = M [R, G, B, 1]`` on 0 to 255.

Outputs: query and key, uint8 (size, size, 3).)")
    .NumInput(3, 4)
    .NumOutput(2)
    .AddArg("size", "Side of a view in pixels.", ::DALI_INT32);

DALI_SCHEMA(SaliencyTargets)
    .DocStr(R"(What the attention loss needs of a saliency map.

Inputs: maps, uint8 (H, W, 1), salient where > 127; windows and mirrors as of ``CropViews``.

Outputs: salient share of each cell of a grid over the query's window, float32 (rows, columns); and the mask of the key
view, uint8 (size, size, 1), 1 where it is salient.)")
    .NumInput(3)
    .NumOutput(2)
    .AddArg("size", "Side of a view in pixels.", ::DALI_INT32)
    .AddArg("grid", "Rows and columns of cells.", ::DALI_INT_VEC);

using CpuCropViews = ::cast_fast::CropViews;
DALI_REGISTER_OPERATOR(CropViews, CpuCropViews, ::dali::CPU);
using CpuSaliencyTargets = ::cast_fast::SaliencyTargets;
DALI_REGISTER_OPERATOR(SaliencyTargets, CpuSaliencyTargets, ::dali::CPU);
