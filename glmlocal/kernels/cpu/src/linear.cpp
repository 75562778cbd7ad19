#include <algorithm>
#include <cstring>
#include <vector>

#include "activations.h"
#include "memory.h"
#include "ops.h"
#include "thread_pool.h"

namespace glmlocal {

double product_cost_ns(const PackedMatrix& w, int64_t num_rows) {
  const double weights = double(w.out_features()) * w.in_features();
  return std::max(double(w.layout.num_bytes) / 25.0, 2.0 * weights * double(num_rows) / 100.0);
}

// Many rows are cut so that every thread has several tasks, but each piece decodes the weights anew: not below 24, or two
// groups where rows are taken in groups.
int chunk_rows(int64_t num_rows, int64_t panels) {
  const int64_t least = kernels().takes_groups ? 2 * kGroupRows : 24;
  int64_t chunk = kMaxChunkRows;
  while (chunk > least && panels * ((num_rows + chunk - 1) / chunk) < 4 * num_threads()) chunk /= 2;
  return int(std::min(std::max(chunk, least), num_rows));
}

namespace {

// How one product is cut into tasks: chunks of rows, and for each of them runs of panels.
struct Cut {
  int chunk, tasks_per_chunk, panels_per_task, tasks;

  Cut(const PackedMatrix& w, int64_t num_rows, double cost) {
    const int panels = w.panels();
    chunk = chunk_rows(num_rows, panels);
    const int chunks = int((num_rows + chunk - 1) / chunk);
    // Tasks of a few µs: claiming one costs about 0.1 µs when cores contend for the counter.
    const int wanted_tasks = std::clamp(int(cost / 4000), 4 * num_threads(), 1 << 20);
    panels_per_task = std::max(1, int(int64_t(panels) * chunks / wanted_tasks));
    tasks_per_chunk = (panels + panels_per_task - 1) / panels_per_task;
    tasks = chunks * tasks_per_chunk;
  }
};

void run_task(const Product& product, const Cut& cut, int task, const Activations& input, const Int8Group* groups, int64_t num_rows) {
  const PackedMatrix& w = *product.weight;
  const int64_t out_features = w.out_features(), first_row = int64_t(task / cut.tasks_per_chunk) * cut.chunk;
  const int rows_here = int(std::min<int64_t>(cut.chunk, num_rows - first_row));
  const auto row_of = [&](int m) { return first_row + m; };
  if (groups != nullptr) groups += first_row / kGroupRows * w.layout.blocks;
  const int first_panel = task % cut.tasks_per_chunk * cut.panels_per_task;
  for (int panel = first_panel; panel < std::min(first_panel + cut.panels_per_task, w.panels()); ++panel) {
    const int64_t column = int64_t(panel) * kPanelRows;
    const int width = w.rows_in(panel), tile_width = w.tiles_in(panel) * kTileRows;
    float* to = product.out + first_row * out_features + column;
    const std::byte* next = panel + 1 < w.panels() ? w.panel_codes(panel + 1) : nullptr;
    if (width == tile_width) {
      panel_product(w, panel, input, groups, rows_here, row_of, to, out_features, next);
    } else {
      float* tile = scratch(Scratch::tile, size_t(rows_here) * tile_width);
      panel_product(w, panel, input, groups, rows_here, row_of, tile, tile_width, next);
      for (int m = 0; m < rows_here; ++m) std::memcpy(to + m * out_features, tile + m * tile_width, width * sizeof(float));
    }
    if (product.bias == nullptr) continue;
    for (int m = 0; m < rows_here; ++m) {
      for (int n = 0; n < width; ++n) to[m * out_features + n] += product.bias[column + n];
    }
  }
}

}  // namespace

void linear(std::span<const Product> products, const float* x, int64_t num_rows, int64_t in) {
  if (num_rows == 0) return;
  bool floats = false, int8 = false;
  double cost = 0;
  std::vector<Cut> cuts;
  std::vector<int> ends;  // of each product's tasks
  for (const Product& product : products) {
    (product.weight->int8_activations ? int8 : floats) = true;
    const double own_cost = product_cost_ns(*product.weight, num_rows);
    cuts.emplace_back(*product.weight, num_rows, own_cost);
    ends.push_back((ends.empty() ? 0 : ends.back()) + (product.weight->out_features() == 0 ? 0 : cuts.back().tasks));
    cost += own_cost;
  }
  const Activations input = prepare_activations(x, num_rows, in, floats, int8);
  const Int8Group* groups = nullptr;
  if (int8 && kernels().takes_groups && num_rows > kFewRows) {
    std::vector<const Int8Block*> rows;
    append_run(rows, num_rows, [&](int64_t m) { return input.blocks + m * input.block_stride; });
    groups = gather_groups(Scratch::groups, rows, (in + kBlockColumns - 1) / kBlockColumns);
  }
  parallel_for(ends.back(), cost, [&](int task) {
    size_t i = 0;
    while (task >= ends[i]) ++i;
    run_task(products[i], cuts[i], i == 0 ? task : task - ends[i - 1], input, groups, num_rows);
  });
}

}  // namespace glmlocal
