// Memory for weights (huge pages, shared chunks) and for intermediate results (one growing buffer per thread).
#pragma once

#include <cstddef>
#include <memory>

namespace glmlocal {

inline constexpr size_t kAlignment = 64;

// Zeroed memory aligned to kAlignment, cut from 64 MiB chunks backed by huge pages where the system gives them. A chunk
// is returned to the system when the last piece of it is released. Throws std::bad_alloc. Thread-safe.
std::shared_ptr<std::byte> allocate_weights(size_t num_bytes);

// Scratch of the calling thread, aligned to kAlignment, at least `num_floats` long, contents undefined. Each `slot` is one
// buffer; it stays allocated for the life of the thread because fresh pages cost more than most ops.
enum class Scratch { panel, tile, tile2, rows, hidden, int8_hidden, padded, int8_rows, attention, partials, normed, query, key, value, context, logits, groups, hidden_groups, slots };
float* scratch(Scratch slot, size_t num_floats);

// Fills the calling thread's scratch with NaN, so that a test shows where old contents are read.
void poison_scratch();

}  // namespace glmlocal
