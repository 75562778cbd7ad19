#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>

#include "isa.h"
#include "memory.h"
#include "ops.h"
#include "thread_pool.h"

namespace glmlocal {
namespace {

constexpr int kPasses = 7;
constexpr double kAlwaysParallel = 1e12;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

double read_bandwidth(size_t num_bytes) {
  constexpr size_t piece = size_t(1) << 20;
  const int pieces = int(std::max<size_t>(1, num_bytes / piece));
  const std::shared_ptr<std::byte> memory = allocate_weights(size_t(pieces) * piece);
  std::byte* data = memory.get();
  parallel_for(pieces, kAlwaysParallel, [&](int i) { std::memset(data + size_t(i) * piece, 1, piece); });
  const auto read_bytes = kernels().read_bytes;
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const double start = seconds();
    parallel_for(pieces, kAlwaysParallel, [&](int i) {
      volatile float sink = read_bytes(data + size_t(i) * piece, piece);
      (void)sink;
    });
    best = std::max(best, double(pieces) * piece / (seconds() - start) / 1e9);
  }
  return best;
}

double fma_peak() {
  constexpr int iterations = 20000;
  const int tasks = 32 * num_threads();
  const auto fma_flops = kernels().fma_flops;
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    double flops_per_task = 0;
    const double start = seconds();
    parallel_for(tasks, kAlwaysParallel, [&](int task) {
      const double flops = fma_flops(iterations);
      if (task == 0) flops_per_task = flops;
    });
    best = std::max(best, tasks * flops_per_task / (seconds() - start) / 1e9);
  }
  return best;
}

}  // namespace glmlocal
