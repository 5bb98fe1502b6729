#include "measure.hpp"

#include <chrono>
#include <cstring>
#include <latch>
#include <stdexcept>
#include <thread>
#include <vector>

#include "isa.hpp"
#include "memory.hpp"
#include "probe.hpp"

namespace nibble {
namespace {

constexpr int64_t kPassBytes = 1 << 20;  // read between two looks at the clock
constexpr int64_t kPassTurns = 20000;    // some 50 us of multiply-adds

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Every thread calls pass() of its worker until the time is over; the sum of the threads' rates. A thread is timed by
// itself, so that one that starts late does not count as slow.
template <class MakeWorker>
double total_rate(int num_threads, double seconds, const MakeWorker& make_worker) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  if (!(seconds > 0)) throw std::invalid_argument("seconds must be above 0");
  std::vector<decltype(make_worker())> workers;
  for (int i = 0; i < num_threads; i++) workers.push_back(make_worker());
  std::vector<double> rates((size_t)num_threads);
  std::latch ready(num_threads);
  auto work = [&](size_t i) {
    workers[i].warm_up();
    ready.arrive_and_wait();
    double done = 0;
    Clock::time_point start = Clock::now();
    while (seconds_since(start) < seconds) done += (double)workers[i].pass();
    rates[i] = done / seconds_since(start);
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < (size_t)num_threads; i++) threads.emplace_back(work, i);
  work(0);
  for (std::thread& thread : threads) thread.join();
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

struct Reader {
  Buffer memory;
  int64_t size, at = 0;
  volatile uint8_t sink = 0;

  explicit Reader(int64_t num_bytes) : memory((size_t)num_bytes), size(num_bytes) {}
  Reader(Reader&& other) noexcept : memory(std::move(other.memory)), size(other.size) {}

  void warm_up() { std::memset(memory.data(), 1, (size_t)size); }  // untouched pages are all one page of zeros
  int64_t pass() {
    sink = active_isa().probe->read(memory.data() + at, kPassBytes);
    at = at + 2 * kPassBytes <= size ? at + kPassBytes : 0;
    return kPassBytes;
  }
};

struct Multiplier {
  int64_t (*run)(int64_t);

  void warm_up() { pass(); }
  int64_t pass() { return run(kPassTurns); }
};

}  // namespace

double read_bandwidth(int num_threads, int64_t num_bytes, double seconds) {
  if (num_threads < 1 || num_bytes / num_threads < kPassBytes)
    throw std::invalid_argument("num_threads must be at least 1, and every thread needs 1 MiB to read");
  int64_t each = num_bytes / num_threads / kPassBytes * kPassBytes;
  return total_rate(num_threads, seconds, [&] { return Reader(each); });
}

double dot_peak(int num_threads, double seconds) {
  return total_rate(num_threads, seconds, [] { return Multiplier{active_isa().probe->dots}; });
}

double fma_peak(int num_threads, double seconds) {
  return total_rate(num_threads, seconds, [] { return Multiplier{active_isa().probe->fmas}; });
}

}  // namespace nibble
