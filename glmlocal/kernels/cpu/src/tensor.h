// Python tensors as pointers, shapes and strides, checked.
//
// Torch hands these out through the table of C functions that DLPack defines (__dlpack_c_exchange_api__), in about 50 ns a
// tensor; an older torch, or another library's array, goes through nanobind's __dlpack__ in a few µs.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace glmlocal {

enum class Layout {
  contiguous,
  rows,     // all but the first dimension
  strided,  // anything
};

// The tensor stays alive as long as the Python argument that it was made of.
struct TensorView {
  static constexpr int kMostDims = 8;

  nanobind::ndarray<> owner;  // set on the slow path only
  void* data = nullptr;
  int ndim = 0;
  int64_t shape[kMostDims], strides[kMostDims];  // in elements
  nanobind::dlpack::dtype dtype;
  bool on_cpu = false;

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
};

TensorView view_tensor(nanobind::handle object, const char* name);

// std::invalid_argument says what was wanted and what was found. A dimension of -1 may have any size.
void check_tensor(const TensorView& tensor, const char* name, nanobind::dlpack::dtype dtype,
                  std::initializer_list<int64_t> shape, Layout layout);

// Any number of dimensions, at least one.
void check_tensor(const TensorView& tensor, const char* name, nanobind::dlpack::dtype dtype);

template <class T>
struct Tensor : TensorView {
  T* get() const { return static_cast<T*>(data); }
};

template <class T>
Tensor<T> tensor(nanobind::handle object, const char* name, std::initializer_list<int64_t> shape, Layout layout = Layout::contiguous) {
  Tensor<T> result{view_tensor(object, name)};
  check_tensor(result, name, nanobind::dtype<std::remove_const_t<T>>(), shape, layout);
  return result;
}

template <class T>
Tensor<T> tensor_of_any_shape(nanobind::handle object, const char* name) {
  Tensor<T> result{view_tensor(object, name)};
  check_tensor(result, name, nanobind::dtype<std::remove_const_t<T>>());
  return result;
}

}  // namespace glmlocal
