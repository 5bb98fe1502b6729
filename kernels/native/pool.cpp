#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nibble {
namespace {

// How long a worker looks for the next job before it sleeps: the gaps inside a step are 10 to 50 us, and being woken
// takes as long. (A pause is 11 ns on one processor and 60 on another, so spins cannot be counted.)
constexpr std::chrono::microseconds kPatience{200};
constexpr int kPausesPerLook = 32;
constexpr int kClosed = -1;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

struct Pool::State {
  std::mutex callers;  // one job at a time
  std::vector<std::thread> workers;
  std::atomic<int> num_threads{1};  // workers and the caller; read without the lock

  Function function = nullptr;
  const void* context = nullptr;
  int64_t num_chunks = 0;
  std::mutex failing;
  std::exception_ptr failure;  // the first of the job
  alignas(64) std::atomic<int64_t> next{0};      // chunk to take
  alignas(64) std::atomic<int> gate{kClosed};    // workers inside the job, or closed: a late worker stays out
  alignas(64) std::atomic<uint32_t> epoch{0};    // counts jobs; workers wait for it to change
  std::atomic<int> num_asleep{0};
  std::atomic<bool> stopping{false};

  void take_chunks() noexcept {
    try {
      for (int64_t chunk = next.fetch_add(1, std::memory_order_relaxed); chunk < num_chunks;
           chunk = next.fetch_add(1, std::memory_order_relaxed))
        function(context, chunk);
    } catch (...) {
      std::lock_guard lock(failing);
      if (!failure) failure = std::current_exception();
      next.store(num_chunks, std::memory_order_relaxed);  // nobody begins another chunk
    }
  }

  bool enter() {
    int inside = gate.load(std::memory_order_relaxed);
    while (inside != kClosed)
      if (gate.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) return true;
    return false;
  }

  uint32_t wait_for_job(uint32_t seen) {
    auto deadline = std::chrono::steady_clock::now() + kPatience;
    do {
      for (int i = 0; i < kPausesPerLook; i++) {
        uint32_t now = epoch.load(std::memory_order_acquire);
        if (now != seen) return now;
        pause();
      }
    } while (std::chrono::steady_clock::now() < deadline);
    num_asleep.fetch_add(1);
    epoch.wait(seen);
    num_asleep.fetch_sub(1);
    return epoch.load(std::memory_order_acquire);
  }

  void work_until_stopped(uint32_t seen) {
    while (!stopping.load(std::memory_order_relaxed)) {
      seen = wait_for_job(seen);
      if (enter()) {
        take_chunks();
        gate.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  void announce() {
    epoch.fetch_add(1);
    if (num_asleep.load() > 0) epoch.notify_all();
  }

  void close() {
    int none = 0;
    while (!gate.compare_exchange_weak(none, kClosed, std::memory_order_acquire)) {
      none = 0;
      pause();
    }
  }

  void stop() {
    stopping.store(true);
    epoch.fetch_add(1);
    epoch.notify_all();
    for (std::thread& worker : workers) worker.join();
    workers.clear();
    num_threads.store(1);
    stopping.store(false);
  }

  // With no workers: starts them all, or none and returns false.
  bool start(int count) {
    uint32_t seen = epoch.load();
    try {
      for (int i = 1; i < count; i++) workers.emplace_back([this, seen] { work_until_stopped(seen); });
    } catch (const std::exception&) {  // no memory for a stack, or a limit of the system
      stop();
      return false;
    }
    num_threads.store(count);
    return true;
  }
};

Pool& Pool::instance() {
  static Pool pool;
  return pool;
}

Pool::Pool() : state_(new State) {}

Pool::~Pool() {
  state_->stop();
  delete state_;
}

int Pool::num_threads() const { return state_->num_threads.load(); }

void Pool::set_num_threads(int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  std::lock_guard lock(state_->callers);
  int before = this->num_threads();
  if (num_threads == before) return;
  state_->stop();
  if (state_->start(num_threads)) return;
  state_->start(before);
  throw std::runtime_error("cannot start " + std::to_string(num_threads) + " threads: lower --threads");
}

void Pool::run_erased(int64_t num_chunks, Function function, const void* context) {
  State& s = *state_;
  std::lock_guard lock(s.callers);
  if (num_chunks <= 1 || s.workers.empty()) {
    for (int64_t chunk = 0; chunk < num_chunks; chunk++) function(context, chunk);
    return;
  }
  s.function = function;
  s.context = context;
  s.num_chunks = num_chunks;
  s.next.store(0, std::memory_order_relaxed);
  s.gate.store(0, std::memory_order_release);
  s.announce();
  s.take_chunks();
  s.close();
  if (std::exception_ptr failure = std::exchange(s.failure, nullptr)) std::rethrow_exception(failure);
}

}  // namespace nibble
