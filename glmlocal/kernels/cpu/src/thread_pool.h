// One pool of worker threads for all native ops.
//
// A job is `num_tasks` calls of one function. Every thread starts with a range of consecutive tasks of its own and then
// helps with the others', one task at a time, so a core that another program keeps busy only delays the task it holds.
// Jobs of several calling threads run one after another. After fork() the child makes itself a new pool on first use.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

namespace glmlocal {

// CPUs that workers may run on, best first, and how many threads (the caller included) share a job.
void configure_threads(std::vector<int> cpus, int num_threads);
int num_threads();

using TaskFunction = void (*)(void* context, int task);

// Below this estimate the caller does the work itself: waking a worker and waiting for it costs 1 to 2 µs when it still
// spins, and several times that when it sleeps.
inline constexpr double kInlineNs = 4000;

void run_tasks(int num_tasks, double cost_ns, TaskFunction function, void* context);

// Calls body(task) for every task in 0 … num_tasks - 1, in any order and on any thread; returns when all are done.
// `cost_ns` estimates the whole job on one thread. The body must not throw. A nested call runs inline.
template <class Body>
void parallel_for(int num_tasks, double cost_ns, Body&& body) {
  using B = std::remove_reference_t<Body>;
  run_tasks(num_tasks, cost_ns, [](void* context, int task) { (*static_cast<B*>(context))(task); },
            const_cast<std::remove_const_t<B>*>(&body));
}

}  // namespace glmlocal
