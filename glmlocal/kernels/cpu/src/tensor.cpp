#include "tensor.h"

#include <algorithm>
#include <stdexcept>

namespace nb = nanobind;

namespace glmlocal {
namespace {

// The part of DLPack 1.3's DLPackExchangeAPI that is used; a producer of the same major version keeps it.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* export_managed;
  void* import_managed;
  int (*describe)(void* object, nb::dlpack::dltensor* out);  // may be null
  void* current_stream;
};

const ExchangeApi* find_exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!api) PyErr_Clear();
  return api && api->major == 1 && api->describe ? api : nullptr;
}

// Almost all arguments are plain torch tensors: their table is looked up once. Held under the GIL.
const ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const ExchangeApi* last_api = nullptr;
  if (type != last_type) {
    last_api = find_exchange_api(type);
    Py_XDECREF(last_type);
    last_type = type;
    Py_INCREF(type);  // or another type could take its address
  }
  return last_api;
}

template <class Shape, class Strides>
void describe(TensorView& view, void* data, int ndim, const Shape& shape, const Strides& strides) {
  if (ndim > TensorView::kMostDims) throw std::invalid_argument("a tensor of " + std::to_string(ndim) + " dimensions");
  view.data = data;
  view.ndim = ndim;
  for (int i = 0; i < ndim; ++i) {
    view.shape[i] = shape(i);
    view.strides[i] = strides(i);
  }
}

std::string dtype_name(nb::dlpack::dtype dtype) {
  using Code = nb::dlpack::dtype_code;
  const char* kind = dtype.code == uint8_t(Code::Float)    ? "float"
                     : dtype.code == uint8_t(Code::Int)    ? "int"
                     : dtype.code == uint8_t(Code::UInt)   ? "uint"
                     : dtype.code == uint8_t(Code::Bfloat) ? "bfloat"
                     : dtype.code == uint8_t(Code::Bool)   ? "bool"
                                                           : "another dtype of bits ";
  return kind + std::to_string(dtype.bits);
}

template <class Size>
std::string list(int count, Size&& size) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + size(i);
  return text + "]";
}

bool has_layout(const TensorView& tensor, Layout layout) {
  if (layout == Layout::strided || tensor.numel() == 0) return true;
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= (layout == Layout::rows ? 1 : 0); --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

[[noreturn]] void refuse(const TensorView& tensor, const char* name, nb::dlpack::dtype dtype, const std::string& shape, Layout layout) {
  const char* layout_name = layout == Layout::contiguous ? "contiguous " : layout == Layout::rows ? "row-contiguous " : "";
  std::string found = dtype_name(tensor.dtype) + " " + list(tensor.ndim, [&](int i) { return std::to_string(tensor.shape[i]); });
  if (!has_layout(tensor, layout)) found += " with strides " + list(tensor.ndim, [&](int i) { return std::to_string(tensor.strides[i]); });
  if (!tensor.on_cpu) found += " elsewhere";
  throw std::invalid_argument(std::string(name) + " wanted a " + layout_name + dtype_name(dtype) + " tensor " + shape +
                              " on the CPU, found " + found);
}

bool is_usable(const TensorView& tensor, nb::dlpack::dtype dtype, Layout layout) {
  return tensor.dtype == dtype && tensor.on_cpu && has_layout(tensor, layout) &&
         reinterpret_cast<uintptr_t>(tensor.data) % (dtype.bits / 8) == 0;
}

}  // namespace

TensorView view_tensor(nb::handle object, const char* name) {
  TensorView view;
  if (const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
    nb::dlpack::dltensor found;
    if (api->describe(object.ptr(), &found) != 0) throw nb::python_error();
    describe(view, static_cast<char*>(found.data) + found.byte_offset, found.ndim, [&](int i) { return found.shape[i]; },
             [&](int i) { return found.strides ? found.strides[i] : 0; });
    if (!found.strides) {
      int64_t stride = 1;
      for (int i = view.ndim - 1; i >= 0; stride *= view.shape[i--]) view.strides[i] = stride;
    }
    view.dtype = found.dtype;
    view.on_cpu = found.device.device_type == nb::device::cpu::value;
    return view;
  }
  if (!nb::try_cast(object, view.owner, false)) {
    throw nb::type_error((std::string(name) + " wanted a tensor, found " + nb::type_name(object.type()).c_str()).c_str());
  }
  describe(view, view.owner.data(), int(view.owner.ndim()), [&](int i) { return int64_t(view.owner.shape(i)); },
           [&](int i) { return view.owner.stride(i); });
  view.dtype = view.owner.dtype();
  view.on_cpu = view.owner.device_type() == nb::device::cpu::value;
  return view;
}

void check_tensor(const TensorView& tensor, const char* name, nb::dlpack::dtype dtype, std::initializer_list<int64_t> shape, Layout layout) {
  const int64_t* wanted = shape.begin();
  bool fits = tensor.ndim == int(shape.size()) && is_usable(tensor, dtype, layout);
  for (int i = 0; fits && i < tensor.ndim; ++i) fits = wanted[i] < 0 || tensor.shape[i] == wanted[i];
  if (fits) return;
  refuse(tensor, name, dtype, list(int(shape.size()), [&](int i) { return wanted[i] < 0 ? std::string("any") : std::to_string(wanted[i]); }),
         layout);
}

void check_tensor(const TensorView& tensor, const char* name, nb::dlpack::dtype dtype) {
  if (tensor.ndim >= 1 && is_usable(tensor, dtype, Layout::contiguous)) return;
  refuse(tensor, name, dtype, "[…, any]", Layout::contiguous);
}

}  // namespace glmlocal
