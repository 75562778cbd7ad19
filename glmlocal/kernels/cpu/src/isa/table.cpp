// The functions of one ISA, gathered for isa.cpp.
#include "isa.h"

#define GLM_STRING_(x) #x
#define GLM_STRING(x) GLM_STRING_(x)

namespace glmlocal::GLM_ISA {

void panel_product(const PackedMatrix& w, int panel, const float* const* rows, int num_rows, float* out, ptrdiff_t out_stride);
void panel_weights(const PackedMatrix& w, int panel, float* out);
void quantize_row(const float* x, int blocks, Int8Block* out);
void panel_product_int8(const PackedMatrix& w, int panel, const Int8Block* const* rows, int num_rows, float* out, ptrdiff_t out_stride,
                        const std::byte* next);
void silu_mul(float* gate, const float* up, int n);
void add_scaled(float* out, const float* x, float scale, int n);
void rms_norm_row(const float* x, const float* weight, float eps, int n, float* out);
void rotate(float* head, const float* cos, const float* sin, int half);
void sigmoid(const float* x, int n, float* out);
void attend(const AttentionTask& task);
bool attention_in_pairs();
void merge_splits(float* partials, ptrdiff_t stride, int num_splits, int head_dim, float* out);
double fma_flops(int iterations);
double int8_ops(int iterations);
float read_bytes(const void* data, size_t num_bytes);

extern const KernelTable table;
const KernelTable table{
    .name = GLM_STRING(GLM_ISA),
    .panel_product = panel_product,
    .panel_weights = panel_weights,
    .quantize_row = quantize_row,
    .panel_product_int8 = panel_product_int8,
    .silu_mul = silu_mul,
    .add_scaled = add_scaled,
    .rms_norm_row = rms_norm_row,
    .rotate = rotate,
    .sigmoid = sigmoid,
    .attend = attend,
    .attention_in_pairs = attention_in_pairs,
    .merge_splits = merge_splits,
    .fma_flops = fma_flops,
    .int8_ops = int8_ops,
    .read_bytes = read_bytes,
};

}  // namespace glmlocal::GLM_ISA
