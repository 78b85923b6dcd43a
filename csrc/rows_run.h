// Walks a kernel over the rows of a batch: sums of all chunks of a row, the row's few numbers, then its result.
//
// A row is cut into chunks of simd::kChunk elements whatever the batch and the number of threads, and the sums of
// its chunks are added in their order, in double: a row's bits depend on nothing but the row.
//
// A kernel has the types Plan and Sums (with +=), and
//   plan(row) -> Plan                          sums(plan, row, begin, size) -> Sums
//   finish(plan, row, total) -> numbers        writes() -> is there a result, beside the numbers?
//   combine(plan, row, begin, size) -> bool    report(plan, row, numbers, finite)
#pragma once

#include <algorithm>
#include <vector>

#include "rows_operands.h"

namespace fastdensity {
namespace rows_run {

using simd::kChunk;

constexpr std::int64_t kSegment = 8;  // chunks

inline std::int64_t chunk_size(std::int64_t columns, std::int64_t chunk) {
  return std::min(kChunk, columns - chunk * kChunk);
}

// One row from beginning to end. The second pass finds the latest chunks in the cache and begins with these, in
// segments long enough for the processor to see streams.
template <typename Kernel>
void run_row(const Kernel& kernel, std::int64_t columns, std::int64_t chunks, std::int64_t row) {
  typename Kernel::Plan plan = kernel.plan(row);
  typename Kernel::Sums total;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
    total += kernel.sums(plan, row, chunk * kChunk, chunk_size(columns, chunk));
  const auto numbers = kernel.finish(plan, row, total);
  bool finite = true;
  if (kernel.writes())
    for (std::int64_t end = chunks; end > 0; end -= kSegment)
      for (std::int64_t chunk = std::max<std::int64_t>(end - kSegment, 0); chunk < end; ++chunk)
        finite &= kernel.combine(plan, row, chunk * kChunk, chunk_size(columns, chunk));
  kernel.report(plan, row, numbers, finite);
}

template <typename Kernel>
void run_by_rows(const Kernel& kernel, std::int64_t rows, std::int64_t columns, std::int64_t chunks, int threads) {
  if (threads == 1) {  // entering a parallel region of one thread costs more than a small row
    for (std::int64_t row = 0; row < rows; ++row) run_row(kernel, columns, chunks, row);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t row = 0; row < rows; ++row) run_row(kernel, columns, chunks, row);
}

// Few long rows: all threads share each row, chunk by chunk.
template <typename Kernel>
void run_by_chunks(const Kernel& kernel, std::int64_t rows, std::int64_t columns, std::int64_t chunks, int threads) {
  std::vector<typename Kernel::Sums> parts(chunks);
  for (std::int64_t row = 0; row < rows; ++row) {
    typename Kernel::Plan plan = kernel.plan(row);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
      parts[chunk] = kernel.sums(plan, row, chunk * kChunk, chunk_size(columns, chunk));
    typename Kernel::Sums total;
    for (const auto& part : parts) total += part;
    const auto numbers = kernel.finish(plan, row, total);
    int finite = 1;
    if (kernel.writes()) {
#pragma omp parallel for num_threads(threads) schedule(static) reduction(& : finite)
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
        finite &= kernel.combine(plan, row, chunk * kChunk, chunk_size(columns, chunk)) ? 1 : 0;
    }
    kernel.report(plan, row, numbers, finite != 0);
  }
}

template <typename Kernel>
void run(const Kernel& kernel, std::int64_t rows, std::int64_t columns, int threads) {
  const std::int64_t chunks = (columns + kChunk - 1) / kChunk;
  if (rows * columns <= kSerialElements) threads = 1;
  const bool rows_fill_threads = rows >= 4 * threads || rows % threads == 0;
  if (threads > 1 && !rows_fill_threads && chunks >= 2 * threads)
    run_by_chunks(kernel, rows, columns, chunks, threads);
  else
    run_by_rows(kernel, rows, columns, chunks, threads);
}

}  // namespace rows_run
}  // namespace fastdensity
