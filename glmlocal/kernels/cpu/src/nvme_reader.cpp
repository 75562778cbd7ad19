#include "nvme_reader.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace glmlocal {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Some filesystems let a file be opened with O_DIRECT and refuse to read it.
bool reads_directly(int descriptor) {
  alignas(kSectorBytes) static thread_local std::byte sector[kSectorBytes];
  return pread(descriptor, sector, kSectorBytes, 0) >= 0 || errno != EINVAL;
}

}  // namespace

NvmeReader::NvmeReader(const std::string& path, int num_threads, int64_t piece_bytes, int max_queued, bool direct)
    : piece_bytes_(piece_bytes), max_queued_(max_queued) {
  if (num_threads < 1 || num_threads > 64 || piece_bytes < kSectorBytes || piece_bytes % kSectorBytes != 0 || max_queued < 1) {
    throw std::invalid_argument("NvmeReader: wanted 1 to 64 threads, pieces of a multiple of 4096 bytes, a queue of at least 1; found " +
                                std::to_string(num_threads) + ", " + std::to_string(piece_bytes) + ", " + std::to_string(max_queued));
  }
#ifdef O_DIRECT
  if (direct) {
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    direct_ = descriptor_ >= 0 && reads_directly(descriptor_);
    if (descriptor_ >= 0 && !direct_) {
      close(descriptor_);
      descriptor_ = -1;
    }
  }
#else
  (void)direct;
#endif
  if (descriptor_ < 0) descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) throw std::system_error(errno, std::generic_category(), path);
  // Signals are for Python's threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

NvmeReader::~NvmeReader() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  close(descriptor_);
}

bool NvmeReader::submit(int64_t token, int64_t offset, int64_t num_bytes, std::byte* destination, bool urgent) {
  if (offset < 0 || num_bytes <= 0 || offset % kSectorBytes != 0 || num_bytes % kSectorBytes != 0 ||
      reinterpret_cast<uintptr_t>(destination) % kSectorBytes != 0) {
    throw std::invalid_argument("NvmeReader: offset " + std::to_string(offset) + ", " + std::to_string(num_bytes) +
                                " bytes and the destination must be multiples of 4096");
  }
  {
    std::lock_guard lock(mutex_);
    if (unfinished_ >= max_queued_) return false;
    ++unfinished_;
    records_.push_back({token, offset, num_bytes, destination, urgent});
  }
  if (num_bytes > piece_bytes_ || !urgent) work_.notify_all();
  else work_.notify_one();
  return true;
}

bool NvmeReader::cancel(int64_t token) {
  bool begun;
  {
    std::lock_guard lock(mutex_);
    const auto found = find(token);
    if (found == records_.end()) return false;
    found->error = kCancelled;
    found->done += found->num_bytes - found->next;
    found->next = found->num_bytes;
    begun = found->done < found->num_bytes;  // the thread that ends its last piece says that the record is done
    if (!begun) finish(*found);
  }
  if (!begun) finished_.notify_all();
  return true;
}

bool NvmeReader::hurry(int64_t token) {
  {
    std::lock_guard lock(mutex_);
    const auto found = find(token);
    if (found == records_.end() || found->urgent) return false;
    found->urgent = true;
  }
  work_.notify_all();
  return true;
}

std::optional<ReadDone> NvmeReader::next(double timeout_s) {
  std::unique_lock lock(mutex_);
  const auto ready = [this] { return !done_.empty() || unfinished_ == 0; };
  if (!finished_.wait_for(lock, std::chrono::duration<double>(timeout_s), ready) || done_.empty()) return std::nullopt;
  const ReadDone first = done_.front();
  done_.pop_front();
  return first;
}

int64_t NvmeReader::bytes_read() const {
  std::lock_guard lock(mutex_);
  return bytes_read_;
}

double NvmeReader::busy_s() const {
  std::lock_guard lock(mutex_);
  return busy_s_ + (active_ > 0 ? seconds_since(busy_since_) : 0.0);
}

std::deque<NvmeReader::Record>::iterator NvmeReader::find(int64_t token) {
  return std::find_if(records_.begin(), records_.end(),
                      [&](const Record& each) { return each.token == token && each.next < each.num_bytes; });
}

std::deque<NvmeReader::Record>::iterator NvmeReader::waiting() {
  const auto first = [this](bool urgent) {
    return std::find_if(records_.begin(), records_.end(),
                        [&](const Record& each) { return each.urgent == urgent && each.next < each.num_bytes; });
  };
  const auto found = first(true);
  return found != records_.end() || active_idle_ >= kIdlePieces ? found : first(false);
}

void NvmeReader::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return stopping_ || waiting() != records_.end(); });
    if (stopping_) return;
    Record& record = *waiting();
    const bool idle = !record.urgent;
    const int64_t begin = record.next, piece_bytes = idle ? std::min(kIdlePieceBytes, piece_bytes_) : piece_bytes_;
    const int64_t size = std::min(piece_bytes, record.num_bytes - begin);
    record.next += size;
    const bool given_up = record.error != 0;  // another piece failed: this one is not worth reading
    const int64_t offset = record.offset + begin;
    std::byte* to = record.destination + begin;
    int error = 0;
    if (!given_up) {
      if (active_++ == 0) busy_since_ = std::chrono::steady_clock::now();
      active_idle_ += idle;
      lock.unlock();
      error = read_piece(offset, size, to);
      lock.lock();
      active_idle_ -= idle;
      if (--active_ == 0) busy_s_ += seconds_since(busy_since_);
      if (error == 0) bytes_read_ += size;
    }
    if (error != 0 && record.error == 0) record.error = error;
    record.done += size;
    if (record.done == record.num_bytes) {
      finish(record);
      finished_.notify_all();
    }
  }
}

void NvmeReader::finish(Record& record) {
  done_.push_back({record.token, record.error});
  --unfinished_;
  // Later records may finish first: a deque keeps references valid only where it is popped at its ends.
  record.num_bytes = record.next = 0;
  while (!records_.empty() && records_.front().num_bytes == 0) records_.pop_front();
}

int NvmeReader::read_piece(int64_t offset, int64_t num_bytes, std::byte* destination) {
  const int64_t begin = offset, all = num_bytes;
  while (num_bytes > 0) {
    const ssize_t got = pread(descriptor_, destination, size_t(num_bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    // The end of the file, also where O_DIRECT reads a last part of a sector: the next read would be misaligned.
    if (got == 0 || (got < num_bytes && got % kSectorBytes != 0)) return kShortRead;
    offset += got;
    num_bytes -= got;
    destination += got;
  }
#ifdef POSIX_FADV_DONTNEED
  if (!direct_) posix_fadvise(descriptor_, begin, all, POSIX_FADV_DONTNEED);
#endif
  return 0;
}

}  // namespace glmlocal
