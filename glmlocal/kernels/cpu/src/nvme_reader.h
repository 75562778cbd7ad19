// Records of a file into aligned memory, read by a few threads past the page cache.
//
// submit() queues one record; its pieces are read by whichever threads are free, records in the order of submission, urgent
// ones first. Records that are not urgent are read in small pieces, few at a time, so that an urgent one that comes waits for
// little. next() returns finished ones in the order in which they finish. The destination belongs to the reader from submit()
// until its completion has been returned, also where the record was cancelled meanwhile. A mutex guards the queues; a
// completion is pushed after the last byte has been written and popped under the same mutex, so whoever pops it sees the bytes.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace glmlocal {

inline constexpr int64_t kSectorBytes = 4096;  // offsets, sizes and addresses are multiples of it

struct ReadDone {
  int64_t token;  // as submitted
  int error;      // 0; an errno; kShortRead or kCancelled
};
inline constexpr int kShortRead = -1;  // the file ends before the record does
inline constexpr int kCancelled = -2;

// Of records that are not urgent. 2 MiB under way end within 1 ms at 2 GB/s, and reach 0.96 of what a disk gives; 1 MiB 0.87.
inline constexpr int64_t kIdlePieceBytes = 512 << 10;
inline constexpr int kIdlePieces = 4;

class NvmeReader {
 public:
  // Opens the file with O_DIRECT, or where the filesystem refuses that, plainly, dropping what was read from the page cache.
  // Throws std::system_error, and std::invalid_argument for numbers that cannot be.
  NvmeReader(const std::string& path, int num_threads, int64_t piece_bytes, int max_queued, bool direct);
  ~NvmeReader();  // waits for the reads that are under way; those still queued are dropped
  NvmeReader(const NvmeReader&) = delete;

  // Queues `num_bytes` at `offset` into `destination`. False, and nothing is queued, while max_queued records are unfinished.
  bool submit(int64_t token, int64_t offset, int64_t num_bytes, std::byte* destination, bool urgent = true);
  // What is left of the record is read as an urgent one from now on. False where it is one, or is not waiting.
  bool hurry(int64_t token);
  // Pieces of the record that no thread has begun are not read any more, so that what is queued behind it comes first. False,
  // and it is read as ever, where there are none of them.
  bool cancel(int64_t token);
  // The next finished record, waiting for it if there is any unfinished one; nothing if there is none or time is up.
  std::optional<ReadDone> next(double timeout_s);

  bool direct() const { return direct_; }
  int descriptor() const { return descriptor_; }
  int64_t bytes_read() const;
  // Seconds in which at least one read was under way.
  double busy_s() const;

 private:
  struct Record {
    int64_t token, offset, num_bytes;
    std::byte* destination;
    bool urgent;
    int64_t next = 0;    // of the bytes, not yet given to a thread
    int64_t done = 0;    // bytes whose piece has ended, well or not
    int error = 0;
  };

  void run();
  std::deque<Record>::iterator waiting();        // whose piece comes next; under the mutex
  std::deque<Record>::iterator find(int64_t token);  // if it has pieces that no thread has begun; under the mutex
  void finish(Record& record);  // under the mutex; the reference is gone afterwards
  int read_piece(int64_t offset, int64_t num_bytes, std::byte* destination);

  int descriptor_ = -1;
  bool direct_ = false;
  int64_t piece_bytes_;
  int max_queued_;
  mutable std::mutex mutex_;
  std::condition_variable work_, finished_;
  std::deque<Record> records_;  // unfinished; references stay valid while others are added behind and removed in front
  std::deque<ReadDone> done_;
  int unfinished_ = 0;  // records without those that wait in records_ for one in front of them
  int active_ = 0;      // pieces being read
  int active_idle_ = 0;  // of them, those that were not urgent when they began
  int64_t bytes_read_ = 0;
  double busy_s_ = 0;
  std::chrono::steady_clock::time_point busy_since_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace glmlocal
