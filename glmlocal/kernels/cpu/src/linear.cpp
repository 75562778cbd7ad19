#include <algorithm>
#include <cstring>

#include "activations.h"
#include "memory.h"
#include "ops.h"
#include "thread_pool.h"

namespace glmlocal {

double product_cost_ns(const PackedMatrix& w, int64_t num_rows) {
  const double weights = double(w.out_features()) * w.in_features();
  return std::max(double(w.layout.num_bytes) / 25.0, 2.0 * weights * double(num_rows) / 100.0);
}

// Many rows are cut so that every thread has several tasks, but each piece decodes the weights anew: not below 24.
int chunk_rows(int64_t num_rows, int64_t panels) {
  int64_t chunk = kMaxChunkRows;
  while (chunk > 24 && panels * ((num_rows + chunk - 1) / chunk) < 4 * num_threads()) chunk /= 2;
  return int(std::min(chunk, num_rows));
}

void linear(const PackedMatrix& w, const float* x, int64_t num_rows, const float* bias, float* out) {
  if (num_rows == 0 || w.out_features() == 0) return;
  const int64_t out_features = w.out_features();
  const Activations input = prepare_activations(x, num_rows, w.in_features(), !w.int8_activations, w.int8_activations);
  const int panels = w.panels();
  const int chunk = chunk_rows(num_rows, panels);
  const int chunks = int((num_rows + chunk - 1) / chunk);
  const double cost = product_cost_ns(w, num_rows);
  // Tasks of a few µs: claiming one costs about 0.1 µs when cores contend for the counter.
  const int wanted_tasks = std::clamp(int(cost / 4000), 4 * num_threads(), 1 << 20);
  const int panels_per_task = std::max(1, int(int64_t(panels) * chunks / wanted_tasks));
  const int tasks_per_chunk = (panels + panels_per_task - 1) / panels_per_task;

  parallel_for(chunks * tasks_per_chunk, cost, [&](int task) {
    const int64_t first_row = int64_t(task / tasks_per_chunk) * chunk;
    const int rows_here = int(std::min<int64_t>(chunk, num_rows - first_row));
    const auto row_of = [&](int m) { return first_row + m; };
    const int first_panel = task % tasks_per_chunk * panels_per_task;
    for (int panel = first_panel; panel < std::min(first_panel + panels_per_task, panels); ++panel) {
      const int64_t column = int64_t(panel) * kPanelRows;
      const int width = w.rows_in(panel), tile_width = w.tiles_in(panel) * kTileRows;
      float* to = out + first_row * out_features + column;
      if (width == tile_width) {
        panel_product(w, panel, input, rows_here, row_of, to, out_features);
      } else {
        float* tile = scratch(Scratch::tile, size_t(rows_here) * tile_width);
        panel_product(w, panel, input, rows_here, row_of, tile, tile_width);
        for (int m = 0; m < rows_here; ++m) std::memcpy(to + m * out_features, tile + m * tile_width, width * sizeof(float));
      }
      if (bias == nullptr) continue;
      for (int m = 0; m < rows_here; ++m) {
        for (int n = 0; n < width; ++n) to[m * out_features + n] += bias[column + n];
      }
    }
  });
}

}  // namespace glmlocal
