#include "bindings_offload.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "memory.h"
#include "nvme_reader.h"
#include "ops.h"
#include "packed_matrix.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace glmlocal;
using Address = uintptr_t;

template <class T>
T* pointer(Address address, const char* what) {
  if (address == 0) throw std::invalid_argument(std::string(what) + ": the tensor has no memory (freed?)");
  if (address % alignof(T) != 0) throw std::invalid_argument(std::string(what) + ": misaligned memory");
  return reinterpret_cast<T*>(address);
}

// A matrix of every expert of a layer: what it is and where it lies in a record.
struct RecordMatrix {
  PackedMatrix matrix;
  int64_t offset;

  RecordMatrix(const MatrixLayout& layout, const MatrixFormat& format, int64_t offset, float zero_point,
               const std::vector<float>& values, bool int8_activations)
      : offset(offset) {
    if (!(matrix_layout(layout.out_features, layout.in_features, format) == layout)) {
      throw std::invalid_argument("the layout is not that of the format");
    }
    if (offset < 0 || offset % int64_t(kAlignment) != 0) {
      throw std::invalid_argument("a matrix at byte " + std::to_string(offset) + " of its record, wanted a multiple of 64");
    }
    const int bits = lines_per_block(format.codes);
    if (bits <= 4 && values.size() != size_t(1) << bits) {
      throw std::invalid_argument(std::to_string(values.size()) + " values for codes of " + std::to_string(bits) + " bits");
    }
    matrix = make_packed_matrix(layout, format, nullptr, zero_point, values.data());
    if (int8_activations && !use_int8_activations(matrix)) {
      throw std::invalid_argument("int8 activations need codes that mean integers of 8 bits, with or without a sign");
    }
  }

  int64_t end() const { return offset + matrix.layout.num_bytes; }
};

// The routed experts of a layer, wherever their records are at the moment. Holds no memory: addresses come with each call.
struct SlotExperts {
  RecordMatrix gate, up, down;
  int num_experts;
  int64_t record_bytes;

  SlotExperts(const RecordMatrix& gate, const RecordMatrix& up, const RecordMatrix& down, int num_experts, int64_t record_bytes)
      : gate(gate), up(up), down(down), num_experts(num_experts), record_bytes(record_bytes) {
    const PackedMatrix &g = gate.matrix, &u = up.matrix, &d = down.matrix;
    if (u.in_features() != g.in_features() || u.out_features() != g.out_features() || d.in_features() != g.out_features() ||
        d.out_features() != g.in_features()) {
      throw std::invalid_argument("experts: up wanted gate's shape and down transposed to that");
    }
    if (num_experts < 1 || gate.end() > record_bytes || up.end() > record_bytes || down.end() > record_bytes) {
      throw std::invalid_argument("experts: the matrices do not fit in a record of " + std::to_string(record_bytes) + " bytes");
    }
  }

  int64_t hidden_size() const { return gate.matrix.in_features(); }
  int64_t row_floats() const { return down.matrix.layout.tiles * kTileRows; }

  void rows(Address x, int64_t num_tokens, Address ids, int top_k, const std::vector<int>& experts,
            const std::vector<Address>& addresses, Address out) const {
    if (experts.size() != addresses.size()) throw std::invalid_argument("rows: wanted an address for each expert");
    if (num_tokens <= 0 || hidden_size() == 0 || experts.empty()) return;
    std::vector<PackedMatrix> matrices(experts.size() * 3);
    std::vector<const PackedMatrix*> pointers(size_t(num_experts) * 3, nullptr);
    for (size_t i = 0; i < experts.size(); ++i) {
      const int expert = experts[i];
      if (expert < 0 || expert >= num_experts) throw nb::index_error(("there is no expert " + std::to_string(expert)).c_str());
      if (addresses[i] == 0 || addresses[i] % kAlignment != 0) throw std::invalid_argument("a slot's address is no multiple of 64");
      const RecordMatrix* parts[]{&gate, &up, &down};
      for (size_t part = 0; part < 3; ++part) {
        PackedMatrix& matrix = matrices[i * 3 + part] = parts[part]->matrix;
        matrix.data = reinterpret_cast<const std::byte*>(addresses[i]) + parts[part]->offset;
        pointers[part * size_t(num_experts) + size_t(expert)] = &matrix;
      }
    }
    const float* from = pointer<const float>(x, "x");
    const int32_t* id = pointer<const int32_t>(ids, "topk_ids");
    float* to = pointer<float>(out, "rows");
    const PackedMatrix* const* first = pointers.data();
    int64_t bad;
    {
      nb::gil_scoped_release release;
      bad = experts_rows({first, first + num_experts, first + 2 * num_experts, num_experts}, from, num_tokens, id, top_k, to);
    }
    if (bad >= 0) {
      throw nb::index_error(("topk_ids: expert " + std::to_string(id[bad]) + " of token " + std::to_string(bad / top_k) +
                             ", but there are " + std::to_string(num_experts)).c_str());
    }
  }

  void weigh(Address rows, int64_t num_tokens, Address ids, Address weights, int top_k, Address out) const {
    if (num_tokens <= 0 || hidden_size() == 0) return;
    const float *from = pointer<const float>(rows, "rows"), *weight = pointer<const float>(weights, "topk_weights");
    const int32_t* id = pointer<const int32_t>(ids, "topk_ids");
    float* to = pointer<float>(out, "out");
    nb::gil_scoped_release release;
    weigh_rows(from, row_floats(), num_tokens, hidden_size(), id, weight, top_k, to);
  }
};

}  // namespace

void bind_offload(nb::module_& m) {
  nb::class_<RecordMatrix>(m, "RecordMatrix")
      .def(nb::init<const MatrixLayout&, const MatrixFormat&, int64_t, float, const std::vector<float>&, bool>(), "layout"_a, "format"_a,
           "offset"_a, "zero_point"_a, "values"_a, "int8_activations"_a);
  nb::class_<SlotExperts>(m, "SlotExperts")
      .def(nb::init<const RecordMatrix&, const RecordMatrix&, const RecordMatrix&, int, int64_t>(), "gate"_a, "up"_a, "down"_a,
           "num_experts"_a, "record_bytes"_a)
      .def_prop_ro("hidden_size", &SlotExperts::hidden_size)
      .def_prop_ro("row_floats", &SlotExperts::row_floats)
      .def_ro("num_experts", &SlotExperts::num_experts)
      .def("rows", &SlotExperts::rows, "x"_a, "num_tokens"_a, "topk_ids"_a, "top_k"_a, "experts"_a, "addresses"_a, "out"_a)
      .def("weigh", &SlotExperts::weigh, "rows"_a, "num_tokens"_a, "topk_ids"_a, "topk_weights"_a, "top_k"_a, "out"_a);

  m.attr("SECTOR_BYTES") = kSectorBytes;
  m.attr("SHORT_READ") = kShortRead;
  m.attr("CANCELLED") = kCancelled;
  nb::class_<NvmeReader>(m, "NvmeReader")
      .def("__init__", [](NvmeReader* self, const std::string& path, int threads, int64_t piece_bytes, int max_queued, bool direct) {
        try {
          new (self) NvmeReader(path, threads, piece_bytes, max_queued, direct);
        } catch (const std::system_error& error) {
          errno = error.code().value();
          PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
          throw nb::python_error();
        }
      }, "path"_a, "threads"_a, "piece_bytes"_a, "max_queued"_a, "direct"_a = true)
      .def("submit", [](NvmeReader& self, int64_t token, int64_t offset, int64_t num_bytes, Address destination, bool urgent) {
        return self.submit(token, offset, num_bytes, pointer<std::byte>(destination, "destination"), urgent);
      }, "token"_a, "offset"_a, "num_bytes"_a, "destination"_a, "urgent"_a = true)
      .def("hurry", &NvmeReader::hurry, "token"_a)
      .def("cancel", &NvmeReader::cancel, "token"_a)
      .def("next", [](NvmeReader& self, double timeout_s) -> std::optional<std::tuple<int64_t, int>> {
        std::optional<ReadDone> done;
        {
          nb::gil_scoped_release release;
          done = self.next(timeout_s);
        }
        if (!done) return std::nullopt;
        return std::tuple{done->token, done->error};
      }, "timeout_s"_a)
      .def_prop_ro("direct", &NvmeReader::direct)
      .def_prop_ro("descriptor", &NvmeReader::descriptor)
      .def_prop_ro("bytes_read", &NvmeReader::bytes_read)
      .def_prop_ro("busy_s", &NvmeReader::busy_s);
}
