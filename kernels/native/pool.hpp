// One persistent pool of threads for every kernel. The caller works too; workers spin for a moment after each job,
// because a decode step is a hundred jobs a few microseconds apart, and then sleep.
#pragma once

#include <cstdint>

namespace nibble {

class Pool {
 public:
  static Pool& instance();

  // Threads that share a job, the caller included. Throws std::invalid_argument below 1, and std::runtime_error when
  // the system gives fewer: the number is then as before.
  void set_num_threads(int num_threads);
  int num_threads() const;

  // Calls work(chunk) once for each chunk in [0, num_chunks), on any thread, in any order; returns when all are done.
  // Which thread takes a chunk is left to chance: a kernel must compute each output within one chunk, so that results
  // do not depend on it. Jobs of several callers run one after the other. When a chunk throws, chunks not yet begun are
  // left out, and the first exception is thrown again once no thread is inside the job.
  template <class Work>
  void run(int64_t num_chunks, const Work& work) {
    auto call = [](const void* context, int64_t chunk) { (*static_cast<const Work*>(context))(chunk); };
    run_erased(num_chunks, call, &work);
  }

  ~Pool();

 private:
  Pool();
  using Function = void (*)(const void*, int64_t);
  void run_erased(int64_t num_chunks, Function function, const void* context);

  struct State;
  State* state_;
};

}  // namespace nibble
