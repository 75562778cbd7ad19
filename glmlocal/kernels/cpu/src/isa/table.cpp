// The functions of one ISA, gathered for isa.cpp. An ISA that differs from another one only in its integer products
// (GLM_BASE_ISA) takes everything else from there.
#include "isa.h"

#ifndef GLM_BASE_ISA
#define GLM_BASE_ISA GLM_ISA
#endif

#define GLM_STRING_(x) #x
#define GLM_STRING(x) GLM_STRING_(x)

namespace glmlocal::GLM_BASE_ISA {

void panel_product(const PackedMatrix& w, int panel, const float* const* rows, int num_rows, float* out, ptrdiff_t out_stride);
void panel_weights(const PackedMatrix& w, int panel, float* out);
void silu_mul(float* gate, const float* up, int n);
void add_scaled(float* out, const float* x, float scale, int n);
void rms_norm_row(const float* x, const float* weight, float eps, int n, float* out);
void rotate(float* head, const float* cos, const float* sin, int half);
void sigmoid(const float* x, int n, float* out);
void attend(const AttentionTask& task);
AttentionOperands attention_operands();
void merge_splits(float* partials, ptrdiff_t stride, int num_splits, int head_dim, float* out);
double fma_flops(int iterations);
float read_bytes(const void* data, size_t num_bytes, bool in_four_streams);

}  // namespace glmlocal::GLM_BASE_ISA

namespace glmlocal::GLM_ISA {

void quantize_row(const float* x, int blocks, Int8Block* out);
void panel_product_int8(const PackedMatrix& w, int panel, const Int8Block* const* rows, const Int8Group* groups, int num_rows, float* out,
                        ptrdiff_t out_stride, const std::byte* next);
double int8_ops(int iterations);

extern const KernelTable table;
const KernelTable table{
    .name = GLM_STRING(GLM_ISA),
    .panel_product = GLM_BASE_ISA::panel_product,
    .panel_weights = GLM_BASE_ISA::panel_weights,
    .quantize_row = quantize_row,
    .panel_product_int8 = panel_product_int8,
#if defined(__AMX_INT8__)
    .takes_groups = true,
#else
    .takes_groups = false,
#endif
    .silu_mul = GLM_BASE_ISA::silu_mul,
    .add_scaled = GLM_BASE_ISA::add_scaled,
    .rms_norm_row = GLM_BASE_ISA::rms_norm_row,
    .rotate = GLM_BASE_ISA::rotate,
    .sigmoid = GLM_BASE_ISA::sigmoid,
    .attend = GLM_BASE_ISA::attend,
    .attention_operands = GLM_BASE_ISA::attention_operands,
    .merge_splits = GLM_BASE_ISA::merge_splits,
    .fma_flops = GLM_BASE_ISA::fma_flops,
    .int8_ops = int8_ops,
    .read_bytes = GLM_BASE_ISA::read_bytes,
};

}  // namespace glmlocal::GLM_ISA
