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
    const bool in_four_streams = pass % 2 == 0;
    const double start = seconds();
    parallel_for(pieces, kAlwaysParallel, [&](int i) {
      volatile float sink = read_bytes(data + size_t(i) * piece, piece, in_four_streams);
      (void)sink;
    });
    best = std::max(best, double(pieces) * piece / (seconds() - start) / 1e9);
  }
  return best;
}

namespace {

double peak_giga_ops(double (*ops)(int iterations)) {
  constexpr int iterations = 20000;
  const int tasks = 32 * num_threads();
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    double ops_per_task = 0;
    const double start = seconds();
    parallel_for(tasks, kAlwaysParallel, [&](int task) {
      const double done = ops(iterations);
      if (task == 0) ops_per_task = done;
    });
    best = std::max(best, tasks * ops_per_task / (seconds() - start) / 1e9);
  }
  return best;
}

}  // namespace

double fma_peak() { return peak_giga_ops(kernels().fma_flops); }

double int8_peak() { return peak_giga_ops(kernels().int8_ops); }

}  // namespace glmlocal
