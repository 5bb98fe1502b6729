#include "measure.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <latch>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "isa.hpp"
#include "memory.hpp"
#include "probe.hpp"

namespace nibble {
namespace {

constexpr int64_t kPassBytes = 1 << 20;  // read between two looks at the clock
constexpr int64_t kPassTurns = 20000;    // some 100 us of multiply-adds
constexpr double kRoundSeconds = 0.003;  // shorter than the slices in which other processes take the processor away

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// One round: every thread calls pass() of its worker until the time is over. The sum of the threads' rates, each timed
// by itself, so that one that starts late does not count as slow.
template <class Worker>
double round_rate(std::vector<Worker>& workers, double seconds) {
  std::vector<double> rates(workers.size());
  std::latch ready((std::ptrdiff_t)workers.size());
  auto work = [&](size_t i) {
    workers[i].warm_up();
    ready.arrive_and_wait();
    double done = 0;
    Clock::time_point start = Clock::now();
    while (seconds_since(start) < seconds) done += (double)workers[i].pass();
    rates[i] = done / seconds_since(start);
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < workers.size(); i++) threads.emplace_back(work, i);
  work(0);
  for (std::thread& thread : threads) thread.join();
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

// The best of many rounds: what else runs on the machine makes some of them slow and none fast.
template <class MakeWorker>
double best_rate(int num_threads, double seconds, const MakeWorker& make_worker) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  if (!(seconds > 0)) throw std::invalid_argument("seconds must be above 0");
  std::vector<decltype(make_worker())> workers;
  for (int i = 0; i < num_threads; i++) workers.push_back(make_worker());
  round_rate(workers, kRoundSeconds);  // touches memory, wakes the clock
  double best = 0;
  for (Clock::time_point start = Clock::now(); seconds_since(start) < seconds;)
    best = std::max(best, round_rate(workers, kRoundSeconds));
  return best;
}

struct Reader {
  Buffer memory;
  int64_t size, at = 0;
  bool is_touched = false;
  volatile uint8_t sink = 0;

  explicit Reader(int64_t num_bytes) : memory((size_t)num_bytes), size(num_bytes) {}
  Reader(Reader&& other) noexcept : memory(std::move(other.memory)), size(other.size) {}

  void warm_up() {  // on the thread that reads: its node of the machine gets the pages
    if (!is_touched) std::memset(memory.data(), 1, (size_t)size);
    is_touched = true;
  }
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
  return best_rate(num_threads, seconds, [&] { return Reader(each); });
}

double dot_peak(int num_threads, double seconds) {
  return best_rate(num_threads, seconds, [] { return Multiplier{active_isa().probe->dots}; });
}

double fma_peak(int num_threads, double seconds) {
  return best_rate(num_threads, seconds, [] { return Multiplier{active_isa().probe->fmas}; });
}

}  // namespace nibble
