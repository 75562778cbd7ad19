#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <mutex>
#include <new>

namespace glmlocal {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kChunk = size_t(64) << 20;

struct Chunk {
  void* mapping;
  size_t mapped_bytes;
  std::byte* begin;
  size_t used = 0;
  size_t size;

  explicit Chunk(size_t num_bytes) : size(num_bytes) {
    // Untouched pages cost nothing, so the alignment gap is free.
    mapped_bytes = size + kHugePage;
    mapping = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    begin = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(mapping) + kHugePage - 1) & ~(kHugePage - 1));
    madvise(begin, size, MADV_HUGEPAGE);
  }
  ~Chunk() { munmap(mapping, mapped_bytes); }
  Chunk(const Chunk&) = delete;
};

std::mutex& chunk_mutex = *new std::mutex;
// Weak: when every piece is gone, so is the chunk, even if it was not full.
std::weak_ptr<Chunk>& open_chunk = *new std::weak_ptr<Chunk>;

}  // namespace

std::shared_ptr<std::byte> allocate_weights(size_t num_bytes) {
  if (num_bytes > SIZE_MAX / 2) throw std::bad_alloc();
  const size_t rounded = (num_bytes + kAlignment - 1) & ~(kAlignment - 1);
  std::lock_guard lock(chunk_mutex);
  if (rounded >= kChunk / 2) {
    auto chunk = std::make_shared<Chunk>((rounded + kHugePage - 1) & ~(kHugePage - 1));
    return {chunk, chunk->begin};
  }
  std::shared_ptr<Chunk> chunk = open_chunk.lock();
  if (!chunk || chunk->used + rounded > chunk->size) open_chunk = chunk = std::make_shared<Chunk>(kChunk);
  std::byte* piece = chunk->begin + chunk->used;
  chunk->used += rounded;
  return {std::move(chunk), piece};
}

namespace {

// Rows of a long prompt lie far apart in a large buffer: with small pages the CPU would look up most of them.
struct Buffer {
  float* data = nullptr;
  size_t size = 0, alignment = 0;

  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { release(); }
  void release() {
    if (data != nullptr) ::operator delete[](data, std::align_val_t(alignment));
    data = nullptr;
    size = 0;
  }
  void allocate(size_t num_floats) {
    const size_t num_bytes = num_floats * sizeof(float);
    const bool huge = num_bytes >= 2 * kHugePage;
    alignment = huge ? kHugePage : size_t(kAlignment);
    data = static_cast<float*>(::operator new[](num_bytes, std::align_val_t(alignment)));
    size = num_floats;
    if (huge) madvise(data, num_bytes & ~(kHugePage - 1), MADV_HUGEPAGE);
  }
};

thread_local Buffer buffers[size_t(Scratch::slots)];

}  // namespace

float* scratch(Scratch slot, size_t num_floats) {
  Buffer& buffer = buffers[size_t(slot)];
  if (buffer.size < num_floats) {
    buffer.release();
    buffer.allocate(num_floats);
  }
  return buffer.data;
}

void poison_scratch() {
  for (Buffer& buffer : buffers) std::fill_n(buffer.data, buffer.size, std::numeric_limits<float>::quiet_NaN());
}

}  // namespace glmlocal
