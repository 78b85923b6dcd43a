// As much of CUDA as csrc/rows_cuda.cu uses, on the CPU: found in place of NVIDIA's header by the tests' compiler.
//
// Every CUDA thread of a block is a fiber of one system thread, so a block is deterministic for a seed, and a barrier
// costs a switch of stacks. Fibers that wait are resumed in a random order, and blocks run in a random order: a
// missing barrier, or a result that depends on which block comes last, shows up as a wrong number. A barrier that some
// thread never reaches ends the process with a message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline std::mt19937 order;  // of fibers and blocks
inline std::int64_t launches = 0;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulation: %s\n", message);
  std::abort();
}

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  std::uint64_t slots[2][32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  unsigned index = 0, shuffles = 0;
  bool done = false;
  static constexpr std::size_t kStackBytes = 64 * 1024;
};

// The block that runs; its fibers' stacks are kept for the next one.
class Block {
 public:
  void run(unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel, threads_ = threads, barrier_ = {}, any_ = 0;
    warps_.assign((threads + 31) / 32, Warp());
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    std::vector<Fiber*> waiting;
    for (unsigned i = 0; i < threads; ++i) waiting.push_back(start(i));
    while (!waiting.empty()) {
      std::shuffle(waiting.begin(), waiting.end(), order);
      progress_ = false;
      for (Fiber* fiber : waiting) resume(fiber);
      waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](Fiber* fiber) { return fiber->done; }),
                    waiting.end());
      if (!progress_) fail("threads wait at a barrier that others never reach");
    }
  }

  void block_barrier() { wait(barrier_, threads_); }
  void warp_barrier() { wait(warp().barrier, std::min(32u, threads_ - current_->index / 32 * 32)); }

  int block_or(int value) {
    any_ |= value;
    block_barrier();
    const int result = any_;
    block_barrier();
    any_ = 0;
    block_barrier();
    return result;
  }

  std::uint64_t shuffle_xor(std::uint64_t value, unsigned mask) {
    std::uint64_t* slots = warp().slots[current_->shuffles++ % 2];  // nobody is a whole exchange ahead
    slots[current_->index % 32] = value;
    warp_barrier();
    return slots[(current_->index % 32) ^ mask];
  }

 private:
  Warp& warp() { return warps_[current_->index / 32]; }

  Fiber* start(unsigned index) {
    Fiber* fiber = fibers_[index].get();
    fiber->index = index, fiber->shuffles = 0, fiber->done = false;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = Fiber::kStackBytes;
    fiber->context.uc_link = &scheduler_;
    makecontext(&fiber->context, &Block::enter, 0);
    return fiber;
  }

  static void enter();

  void resume(Fiber* fiber) {
    current_ = fiber;
    threadIdx.x = fiber->index;
    swapcontext(&scheduler_, &fiber->context);
  }

  void wait(Barrier& barrier, unsigned participants) {
    const unsigned generation = barrier.generation;
    progress_ = true;
    if (++barrier.arrived == participants) barrier.arrived = 0, ++barrier.generation;
    Fiber* self = current_;
    while (barrier.generation == generation) swapcontext(&self->context, &scheduler_);
  }

  const std::function<void()>* kernel_ = nullptr;
  unsigned threads_ = 0;
  int any_ = 0;
  bool progress_ = false;
  Barrier barrier_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_;
};

inline Block block;

inline void Block::enter() {
  (*block.kernel_)();
  block.current_->done = true;
  block.progress_ = true;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block.block_barrier(); }
inline int __syncthreads_or(int value) { return emulation::block.block_or(value); }
inline void __syncwarp() { emulation::block.warp_barrier(); }
inline void __threadfence() {}

inline double __shfl_xor_sync(unsigned, double value, int mask) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, 8);
  bits = emulation::block.shuffle_xor(bits, static_cast<unsigned>(mask));
  std::memcpy(&value, &bits, 8);
  return value;
}

inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address |= value;
  return before;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024)
    return cudaErrorInvalidConfiguration;
  ++emulation::launches;
  gridDim = config->gridDim, blockDim = config->blockDim;
  std::vector<unsigned> blocks(config->gridDim.x);
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), emulation::order);
  for (unsigned index : blocks) {
    blockIdx.x = index;
    emulation::block.run(config->blockDim.x, [&] { kernel(given...); });
  }
  return cudaSuccess;
}
