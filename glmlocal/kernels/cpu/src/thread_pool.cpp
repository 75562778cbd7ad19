#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace glmlocal {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// 50 µs on Zen 5, about 80 on Skylake: covers the gap between the ops of a layer, not that between requests.
constexpr int kSpins = 2000;

thread_local bool inside_task = false;

struct Settings {
  std::vector<int> cpus;
  int num_threads = 1;
};

class ThreadPool {
 public:
  explicit ThreadPool(const Settings& settings) { start(settings); }

  void resize(const Settings& settings) {
    std::lock_guard lock(caller_);
    stop_.store(true, std::memory_order_relaxed);
    wake_workers();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    stop_.store(false, std::memory_order_relaxed);
    start(settings);
  }

  void run(int num_tasks, TaskFunction function, void* context) {
    std::lock_guard lock(caller_);
    const uint32_t job = epoch_.load(std::memory_order_relaxed) + 1;
    // Close the ranges before the fields change: a worker that was late for the last job still holds one of its tickets
    // and its compare-exchange must fail. It reads the fields before that exchange, so it never acts on a mixture:
    // should it see a new field, the pair of fences makes it see the closed range as well.
    for (int r = 0; r < num_ranges_; ++r) ranges_[r].ticket.store(kClosed, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    function_.store(function, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    num_tasks_.store(num_tasks, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    for (int r = 0; r < num_ranges_; ++r) {
      ranges_[r].ticket.store(uint64_t(job) << 32 | range_begin(r, num_tasks), std::memory_order_release);
    }
    wake_workers();

    inside_task = true;
    do_tasks(job, 0);
    inside_task = false;
    int spins = 0;
    for (int done; (done = done_.load(std::memory_order_acquire)) != num_tasks;) {
      if (++spins < kSpins) pause();
      else done_.wait(done, std::memory_order_acquire);
    }
  }

 private:
  void start(const Settings& settings) {
    num_ranges_ = settings.num_threads;
    ranges_ = std::make_unique<Range[]>(size_t(num_ranges_));
    // Signals belong to the interpreter's threads; workers inherit this mask.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int i = 1; i < settings.num_threads; ++i) {
        threads_.emplace_back([this, i, cpus = settings.cpus, epoch = epoch_.load()] { work(i, cpus, epoch); });
      }
    } catch (const std::system_error&) {
      // The system allows no more threads; those there are do the work of all ranges.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void wake_workers() {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }

  uint32_t range_begin(int range, int num_tasks) const { return uint32_t(int64_t(num_tasks) * range / num_ranges_); }

  // A thread's own range first: neighbouring tasks mostly read neighbouring memory, which prefetching across them needs.
  // Then whatever is left of the others', so that a thread that does not get a core holds up one task at most.
  void do_tasks(uint32_t job, int thread) {
    for (int i = 0; i < num_ranges_; ++i) do_range(job, (thread + i) % num_ranges_);
  }

  void do_range(uint32_t job, int range) {
    std::atomic<uint64_t>& next = ranges_[range].ticket;
    for (;;) {
      uint64_t ticket = next.load(std::memory_order_acquire);
      const uint32_t task = uint32_t(ticket);
      const int num_tasks = num_tasks_.load(std::memory_order_relaxed);
      if (ticket >> 32 != job || task >= range_begin(range + 1, num_tasks)) return;
      const TaskFunction function = function_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_acquire);
      if (!next.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      function(context, int(task));
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_tasks) done_.notify_one();
    }
  }

  void work(int thread, const std::vector<int>& cpus, uint32_t seen) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int cpu : cpus) {
      if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
    }
    if (!cpus.empty()) pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    inside_task = true;
    while (!stop_.load(std::memory_order_relaxed)) {
      uint32_t epoch;
      for (int spins = 0; (epoch = epoch_.load(std::memory_order_acquire)) == seen;) {
        if (++spins < kSpins) pause();
        else epoch_.wait(seen, std::memory_order_acquire);
      }
      seen = epoch;
      do_tasks(seen, thread);
    }
  }

  static constexpr uint64_t kClosed = UINT32_MAX;  // of no job, and no task left

  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{kClosed};  // job number, next task
  };

  std::mutex caller_;
  std::vector<std::thread> threads_;
  std::atomic<bool> stop_{false};
  std::atomic<TaskFunction> function_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int> num_tasks_{0};
  int num_ranges_ = 1;  // one per thread
  std::unique_ptr<Range[]> ranges_;
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts jobs
  alignas(64) std::atomic<int> done_{0};
};

// Never freed: threads that still wait at exit must not find the pool gone.
std::atomic<ThreadPool*> pool{nullptr};
std::mutex& settings_mutex = *new std::mutex;
Settings& settings = *new Settings;

ThreadPool& current_pool() {
  if (ThreadPool* existing = pool.load(std::memory_order_acquire)) return *existing;
  std::lock_guard lock(settings_mutex);
  if (ThreadPool* existing = pool.load(std::memory_order_acquire)) return *existing;
  // A child of fork() has none of the threads, and whoever held a lock is gone: it forgets the pool and makes a new one.
  static const int registered = pthread_atfork([] { settings_mutex.lock(); }, [] { settings_mutex.unlock(); },
                                               [] { settings_mutex.unlock(); pool.store(nullptr); });
  (void)registered;
  pool.store(new ThreadPool(settings), std::memory_order_release);
  return *pool.load();
}

}  // namespace

void configure_threads(std::vector<int> cpus, int num_threads) {
  std::lock_guard lock(settings_mutex);
  settings = {std::move(cpus), num_threads < 1 ? 1 : num_threads};
  if (ThreadPool* existing = pool.load()) existing->resize(settings);
}

int num_threads() {
  std::lock_guard lock(settings_mutex);
  return settings.num_threads;
}

void run_tasks(int num_tasks, double cost_ns, TaskFunction function, void* context) {
  if (num_tasks <= 0) return;
  if (num_tasks > 1 && cost_ns >= kInlineNs && !inside_task) {
    current_pool().run(num_tasks, function, context);
  } else {
    for (int task = 0; task < num_tasks; ++task) function(context, task);
  }
}

}  // namespace glmlocal
