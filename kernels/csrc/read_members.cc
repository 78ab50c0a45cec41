// DALI operator ReadMembers: parts of files, read on DALI's thread pool straight into the buffers that decoders take.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/operator.h"

namespace cast_fast {
namespace {

using Cpu = ::dali::CPUBackend;

constexpr int64_t kMostBytes = 1 << 30;  // of a part

struct Place {
  int64_t file, offset, size;
};

// Open for as long as the operator lives. One that cannot be opened fails where it is read, so that the others serve.
class Files {
 public:
  explicit Files(std::vector<std::string> paths) : paths_(std::move(paths)) {
    for (const auto &path : paths_) {
      descriptors_.push_back(open(path.c_str(), O_RDONLY | O_CLOEXEC));
      errors_.push_back(descriptors_.back() < 0 ? errno : 0);
    }
  }
  Files(const Files &) = delete;
  Files &operator=(const Files &) = delete;
  ~Files() {
    for (const int descriptor : descriptors_) {
      if (descriptor >= 0) close(descriptor);
    }
  }

  int64_t size() const { return static_cast<int64_t>(paths_.size()); }

  void Read(const Place &place, uint8_t *out) const {
    if (descriptors_[place.file] < 0) Fail(place, std::strerror(errors_[place.file]));
    for (int64_t done = 0; done < place.size;) {
      const ssize_t count = pread(descriptors_[place.file], out + done, place.size - done, place.offset + done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) Fail(place, std::strerror(errno));
      if (count == 0) Fail(place, "it ends before the part that was asked for");
      done += count;
    }
  }

  // Only a hint: whatever comes of it, the part is read when its turn comes.
  void ReadAhead(const Place &place) const {
    posix_fadvise(descriptors_[place.file], place.offset, place.size, POSIX_FADV_WILLNEED);
  }

 private:
  void Fail(const Place &place, const std::string &reason) const {
    DALI_FAIL(paths_[place.file] + " cannot be read: " + reason);
  }

  std::vector<std::string> paths_;
  std::vector<int> descriptors_, errors_;
};

class ReadMembers : public ::dali::StatelessOperator<Cpu> {
 public:
  explicit ReadMembers(const ::dali::OpSpec &spec)
      : ::dali::StatelessOperator<Cpu>(spec),
        files_(spec.GetRepeatedArgument<std::string>("files")),
        parts_(spec.GetArgument<int>("parts")) {}

 protected:
  bool SetupImpl(std::vector<::dali::OutputDesc> &outputs, const ::dali::Workspace &ws) override {
    const int count = ws.Input<Cpu>(0).num_samples();
    for (int input = 0; input < 2; input++) {
      const auto &places = ws.Input<Cpu>(input);
      DALI_ENFORCE(places.type() == ::DALI_INT64, "places: expected int64");
      for (int i = 0; i < count; i++) {
        DALI_ENFORCE(places.shape()[i] == ::dali::TensorShape<>({parts_, 3}), "places: expected the shape (parts, 3)");
        for (int part = 0; part < parts_; part++) {
          const Place place = At(ws, input, i, part);
          DALI_ENFORCE(0 <= place.file && place.file < files_.size(), "places: there is no such file");
          DALI_ENFORCE(place.offset >= 0 && 0 < place.size && place.size <= kMostBytes,
                       "places: expected offsets of at least 0 and sizes of 1 to 2**30 bytes");
        }
      }
    }
    outputs.resize(parts_);
    for (int part = 0; part < parts_; part++) {
      ::dali::TensorListShape<> shape(count, 1);
      for (int i = 0; i < count; i++) shape.set_tensor_shape(i, ::dali::TensorShape<>{At(ws, 0, i, part).size});
      outputs[part] = {shape, ::DALI_UINT8};
    }
    return true;
  }

  void RunImpl(::dali::Workspace &ws) override {
    auto &threads = ws.GetThreadPool();
    for (int i = 0; i < ws.Input<Cpu>(0).num_samples(); i++) {
      for (int part = 0; part < parts_; part++) {
        const Place now = At(ws, 0, i, part), later = At(ws, 1, i, part);
        uint8_t *out = ws.Output<Cpu>(part).mutable_tensor<uint8_t>(i);
        threads.AddWork(
            [this, now, later, out](int) {
              files_.ReadAhead(later);
              files_.Read(now, out);
            },
            now.size);
      }
    }
    threads.RunAll();
  }

 private:
  static Place At(const ::dali::Workspace &ws, int input, int i, int part) {
    const int64_t *values = ws.Input<Cpu>(input).tensor<int64_t>(i) + 3 * part;
    return {values[0], values[1], values[2]};
  }

  Files files_;
  int parts_;
};

}  // namespace
}  // namespace cast_fast

DALI_SCHEMA(ReadMembers)
    .DocStr(R"(Parts of files.

Inputs: which parts to read, int64 (parts, 3), ``[file, offset, size]``, a file being its place in ``files``; and, in the
same form, which ones will be wanted next, which the system is asked to read ahead.

Outputs: as many as ``parts``, uint8 (size,).)")
    .NumInput(2)
    .OutputFn([](const ::dali::OpSpec &spec) { return spec.GetArgument<int>("parts"); })
    .AddArg("files", "Their paths.", ::DALI_STRING_VEC)
    .AddArg("parts", "Parts of a sample.", ::DALI_INT32);

using CpuReadMembers = ::cast_fast::ReadMembers;
DALI_REGISTER_OPERATOR(ReadMembers, CpuReadMembers, ::dali::CPU);
