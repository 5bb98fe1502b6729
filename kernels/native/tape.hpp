// Calls of a forward pass that are kept, to be made again without Python between them.
//
// A decode step of a small model is a few hundred calls of some 30 us, and 1 to 3 ms of Python between them. Calls are
// kept as they were made, with the same addresses: what lies there may differ the next time, where it lies may not.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace nibble {

class Tape {
 public:
  ~Tape() { stop(); }

  // Keeps the calls that this thread makes from here on. Throws std::logic_error while the thread keeps others.
  void start();
  void stop();

  // Makes the calls again, in order. What they throw is thrown here, and the rest is not made.
  void run() const;
  size_t num_calls() const { return calls_.size(); }

  static bool is_on();  // whether this thread's calls are kept
  static void keep(std::function<void()> call);

 private:
  std::vector<std::function<void()>> calls_;
};

// Makes a call, and keeps it on the tape of this thread if there is one. What `call` refers to must outlive the tape.
template <class Call>
void make(Call call) {
  call();
  if (Tape::is_on()) Tape::keep(std::move(call));
}

}  // namespace nibble
