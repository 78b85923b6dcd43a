// The rows family on CPU: see rows_kernel.h for a row, rows_run.h for the batch.
#include <algorithm>

#include "rows_kernel.h"
#include "rows_run.h"

namespace fastdensity {

void rows_cpu(const RowsCall& call, int threads) {
  if (call.rows <= 0 || call.columns <= 0) return;
  threads = std::max(threads, 1);
  if (accumulates_in_double(call))
    rows_run::run(RowKernel<double>(call), call.rows, call.columns, threads);
  else
    rows_run::run(RowKernel<float>(call), call.rows, call.columns, threads);
}

}  // namespace fastdensity
