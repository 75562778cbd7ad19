// Which instruction set the kernels use, and the table of functions compiled once for each of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace glmlocal {

struct AttentionTask;
struct Int8Block;
enum class AttentionOperands;
struct Int8Group;
struct PackedMatrix;

struct KernelTable {
  const char* name;

  // isa/matmul.cpp: out[m][0 … 63] = Σ_k rows[m][k] · w[panel * 64 + 0 … 63][k] for num_rows rows of w.padded_in() floats.
  // The last panel writes only its own tiles of 16 (w.tiles_in(panel)); rows are `out_stride` floats apart.
  void (*panel_product)(const PackedMatrix& w, int panel, const float* const* rows, int num_rows, float* out,
                        ptrdiff_t out_stride);
  // The weights of one panel as `panel_product` sees them: out[k][tile * 16 + row], for tests and for unpacking.
  void (*panel_weights)(const PackedMatrix& w, int panel, float* out);

  // isa/int8.cpp: x [32 · blocks] to integers, and the product of such rows, for matrices with int8_activations.
  void (*quantize_row)(const float* x, int blocks, Int8Block* out);
  // `next` is what this thread will read then (codes of another panel) or null: fetching it begins before this one ends.
  // `groups` [num_rows / 16, rounded up][blocks] are the same rows, where there are any (takes_groups) and they are many.
  void (*panel_product_int8)(const PackedMatrix& w, int panel, const Int8Block* const* rows, const Int8Group* groups, int num_rows,
                             float* out, ptrdiff_t out_stride, const std::byte* next);
  bool takes_groups;  // of more than kFewRows rows

  // isa/elementwise.cpp: n is a multiple of 16.
  void (*silu_mul)(float* gate, const float* up, int n);                     // gate ← silu(gate) · up
  void (*add_scaled)(float* out, const float* x, float scale, int n);        // out ← fma(x, scale, out)

  // isa/steps.cpp: one row of n floats, any n
  void (*rms_norm_row)(const float* x, const float* weight, float eps, int n, float* out);  // out may be x
  void (*rotate)(float* head, const float* cos, const float* sin, int half);  // RoPE on 2 · half features, half-split pairs
  void (*sigmoid)(const float* x, int n, float* out);

  // isa/attention.cpp
  void (*attend)(const AttentionTask& task);
  AttentionOperands (*attention_operands)();
  // Folds num_splits partial results of one row, `stride` floats apart, and writes [head_dim]; the first one is overwritten.
  void (*merge_splits)(float* partials, ptrdiff_t stride, int num_splits, int head_dim, float* out);

  // isa/probes.cpp
  double (*fma_flops)(int iterations);                     // runs independent fmas in registers; returns how many flops
  double (*int8_ops)(int iterations);                      // isa/int8_probe.cpp: the same of int8 dot products; multiply and add count as two
  float (*read_bytes)(const void* data, size_t num_bytes, bool in_four_streams);  // a multiple of 1024, 64-byte-aligned
};

// The table in use: the best one this CPU has unless set_isa() chose another.
const KernelTable& kernels();

std::vector<std::string> available_isas();  // worst first; those this CPU and this build both have
std::string isa();
bool set_isa(const std::string& name);      // false when not available

}  // namespace glmlocal
