// Convolutions of many small images on CPU: fastdensity/reference/dual_conv.py, without the activation.
//
// Images are taken kImages at a time, each in its own lane: nothing is summed across lanes, so an image's bits depend
// on no other one, nor on how the work is cut. Where there are fewer groups of images than threads, channels of the
// result are cut, too.
#include <algorithm>
#include <memory>
#include <new>

#include "dual_conv_simd.h"
#include "ops.h"

namespace fastdensity {
namespace {

using simd::kImages;
using simd::kMostOutputs;

constexpr std::int64_t kSerialProducts = 1 << 18;  // below this a parallel region costs more than it saves
constexpr std::int64_t kLeastChannels = 8;         // of Winograd's tiles
constexpr std::size_t kAlignment = 64;

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kAlignment)); }
};

// Do the tiles' fewer products pay for their transforms?
bool takes_tiles(const DualConvCall& call) {
  for (int i = 0; i < 2; ++i)
    if (call.window[i] != 3 || call.stride[i] != 1 || call.dilation[i] != 1) return false;
  const std::int64_t tiles = call.out_height * call.out_width / 4;
  return call.out_height % 2 == 0 && call.out_width % 2 == 0 && (tiles % 4 == 0 || tiles > 8) &&
         std::min(call.channels, call.outputs) >= kLeastChannels;
}

template <typename Real>
class Convolution {
 public:
  Convolution(const DualConvCall& call, int threads)
      : call_(call),
        tiles_(takes_tiles(call)),
        groups_((call.images + kImages - 1) / kImages),
        parts_(groups_ >= threads ? 1 : std::min((threads + groups_ - 1) / groups_, output_tiles())),
        units_(groups_ * parts_) {
    if (!tiles_) return;
    weights_ = reserve(16 * simd::weight_position(call));
    simd::transform_weights(call, static_cast<Real*>(weights_.get()));
  }

  void run(int threads) const {
    const std::int64_t shares = std::min<std::int64_t>(threads, units_);
    if (shares <= 1) return run_units(0, units_);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t share = 0; share < shares; ++share)
      run_units(share * units_ / shares, (share + 1) * units_ / shares);
  }

 private:
  using Memory = std::unique_ptr<void, Release>;

  static Memory reserve(std::int64_t count) {
    return Memory(::operator new(count * sizeof(Real), std::align_val_t(kAlignment)));
  }

  std::int64_t output_tiles() const { return (call_.outputs + kMostOutputs - 1) / kMostOutputs; }

  void run_units(std::int64_t first, std::int64_t end) const {
    const std::int64_t images = call_.channels * call_.height * (call_.width + 2 * call_.padding[1]) * kImages;
    const std::int64_t outputs = tiles_ ? call_.outputs : kMostOutputs;
    const std::int64_t results = outputs * call_.out_height * call_.out_width * kImages;
    const std::int64_t transformed = tiles_ ? 16 * (4 * call_.channels + 1) * kImages : 0;
    const std::int64_t products = tiles_ ? 16 * 4 * kMostOutputs * kImages : 0;
    const Memory memory = reserve(images + results + transformed + products);
    Real* next = static_cast<Real*>(memory.get());
    const simd::ConvScratch<Real> scratch{next, next + images, next + images + results,
                                          next + images + results + transformed};
    for (std::int64_t unit = first; unit < end; ++unit) {
      const std::int64_t image = unit / parts_ * kImages, part = unit % parts_;
      const std::int64_t count = std::min(kImages, call_.images - image);
      if (tiles_)
        simd::convolve_tiles(call_, image, count, boundary(part), boundary(part + 1),
                             static_cast<const Real*>(weights_.get()), scratch);
      else
        simd::convolve(call_, image, count, boundary(part), boundary(part + 1), scratch);
    }
  }

  std::int64_t boundary(std::int64_t part) const {
    return std::min(call_.outputs, part * output_tiles() / parts_ * kMostOutputs);
  }

  const DualConvCall& call_;
  const bool tiles_;
  const std::int64_t groups_, parts_, units_;
  Memory weights_;  // transformed
};

}  // namespace

void dual_conv_cpu(const DualConvCall& call, int threads) {
  const std::int64_t products = call.images * call.outputs * call.out_height * call.out_width * call.channels;
  if (products * call.window[0] * call.window[1] < kSerialProducts) threads = 1;
  threads = std::max(threads, 1);
  if (call.dtype == DataType::float64)
    Convolution<double>(call, threads).run(threads);
  else
    Convolution<float>(call, threads).run(threads);
}

}  // namespace fastdensity
