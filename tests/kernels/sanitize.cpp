// Products of every integer code over buffers of exactly their size, for AddressSanitizer and UBSan: `make sanitize`.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "activations.h"
#include "isa.h"

namespace glmlocal {
int run_blocks();  // sanitize_blocks.cpp
int run_pool();
}  // namespace glmlocal

namespace {

using namespace glmlocal;

template <class T>
using Exact = std::unique_ptr<T[], void (*)(void*)>;

template <class T>
Exact<T> allocate(size_t alignment, size_t count) {
  return {static_cast<T*>(aligned_alloc(alignment, count * sizeof(T))), std::free};
}

int multiply(const PackedMatrix& w, int num_rows) {
  const size_t blocks = size_t(w.layout.blocks);
  std::vector<std::vector<float>> floats(size_t(num_rows), std::vector<float>(blocks * kBlockColumns));
  std::vector<Exact<Int8Block>> integers;
  std::vector<const float*> float_rows;
  std::vector<const Int8Block*> integer_rows;
  for (std::vector<float>& row : floats) {
    for (float& x : row) x = float(rand() % 2001 - 1000) / 100;
    integers.push_back(allocate<Int8Block>(alignof(Int8Block), blocks));
    kernels().quantize_row(row.data(), int(blocks), integers.back().get());
    float_rows.push_back(row.data());
    integer_rows.push_back(integers.back().get());
  }
  Exact<Int8Group> groups{nullptr, std::free};
  if (kernels().takes_groups && num_rows > kFewRows) {
    std::vector<const Int8Block*> rows;
    append_run(rows, num_rows, [&](int64_t m) { return integer_rows[size_t(m)]; });
    const size_t count = rows.size() / kGroupRows * blocks;
    groups = allocate<Int8Group>(alignof(Int8Group), count);
    std::copy_n(gather_groups(Scratch::groups, rows, int64_t(blocks)), count, groups.get());
  }
  for (int panel = 0; panel < w.panels(); ++panel) {
    const int width = w.tiles_in(panel) * kTileRows;
    std::vector<float> out(size_t(num_rows) * width);
    kernels().panel_product_int8(w, panel, integer_rows.data(), groups.get(), num_rows, out.data(), width, nullptr);
    kernels().panel_product(w, panel, float_rows.data(), num_rows, out.data(), width);
  }
  return w.panels();
}

int multiply(const MatrixFormat& format, bool codebook, int64_t out, int64_t in) {
  const MatrixLayout layout = matrix_layout(out, in, format);
  const Exact<std::byte> data = allocate<std::byte>(64, size_t(layout.num_bytes));
  for (int64_t i = 0; i < layout.num_bytes; ++i) data[size_t(i)] = std::byte(i * 37 & 0x3b);  // no fp16 that is not finite
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = codebook ? float(i * 13 % 200 - 100) : float(i - 2);
  PackedMatrix w = make_packed_matrix(layout, format, data.get(), 2, values);
  if (!use_int8_activations(w)) std::abort();
  int products = 0;
  for (int num_rows : {1, 2, 3, 4, 5, 6, 7, 13, 16, 37}) products += multiply(w, num_rows);
  return products;
}

int multiply_all() {
  int products = 0;
  for (Codes codes : {Codes::u8, Codes::u6, Codes::u5, Codes::u4, Codes::u3, Codes::u2}) {
    for (int variant = 0; variant < (codes == Codes::u4 ? 8 : 4); ++variant) {
      const bool two_level = variant & 1, has_min = variant & 2, codebook = variant & 4;
      for (int group : {16, 32, 128}) {
        const MatrixFormat format{codes, two_level ? FloatType::f16 : FloatType::f32, group, two_level ? 2 * group : group,
                                  two_level, has_min, has_min && two_level};
        for (int64_t out : {1, 17, 64, 100}) {
          for (int64_t in : {1, 32, 100, 544}) products += multiply(format, codebook, out, in);
        }
      }
    }
  }
  return products;
}

}  // namespace

int main() {
  std::printf("%d panels multiplied both ways\n", multiply_all());
  std::printf("%d blocks run\n", glmlocal::run_blocks());
  std::printf("%d jobs of the pool, nothing found\n", glmlocal::run_pool());
}
