#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "check.hpp"

namespace nibble::tests {
namespace {

// Bug: an exception in a worker ends the process; one in the caller leaves workers reading a job that is gone.
void test_exceptions(Pool& pool) {
  for (int num_threads : {1, 3}) {
    pool.set_num_threads(num_threads);
    for (int64_t failing = 0; failing < 40; failing++) {
      bool is_caught = false;
      try {
        pool.run(40, [&](int64_t chunk) {
          if (chunk >= failing) throw std::out_of_range("a chunk fails");
        });
      } catch (const std::out_of_range&) {
        is_caught = true;
      }
      CHECK(is_caught, "the exception of chunk %d is lost", (int)failing);
      std::atomic<int> num_done{0};
      pool.run(40, [&](int64_t) { num_done++; });
      CHECK(num_done == 40, "after an exception %d of 40 chunks ran", num_done.load());
    }
  }
}

}  // namespace

// Bug: a chunk lost or taken twice when workers sleep, wake late, or the number of threads changes between jobs.
void test_pool() {
  Pool& pool = Pool::instance();
  for (int num_threads : {1, 2, 5, 3}) {
    pool.set_num_threads(num_threads);
    for (int64_t num_chunks : {0, 1, 2, 7, 1000})
      for (int repeat = 0; repeat < 30; repeat++) {
        std::vector<int> counts((size_t)num_chunks);
        pool.run(num_chunks, [&](int64_t chunk) { counts[(size_t)chunk]++; });
        for (int count : counts) CHECK(count == 1, "a chunk of %d ran %d times", (int)num_chunks, count);
      }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // workers fall asleep
  }
  test_exceptions(pool);
  std::atomic<int64_t> total{0};
  auto caller = [&] {
    for (int i = 0; i < 200; i++) pool.run(20, [&](int64_t chunk) { total += chunk; });
  };
  std::thread first(caller), second(caller);  // jobs of several callers wait for each other
  first.join();
  second.join();
  CHECK(total == 2 * 200 * 190, "the chunks of two callers add up to %lld", (long long)total.load());
}

}  // namespace nibble::tests
