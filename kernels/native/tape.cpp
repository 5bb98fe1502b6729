#include "tape.hpp"

#include <stdexcept>

namespace nibble {
namespace {

thread_local Tape* of_this_thread = nullptr;

}  // namespace

void Tape::start() {
  if (of_this_thread) throw std::logic_error("this thread keeps its calls already");
  of_this_thread = this;
}

void Tape::stop() {
  if (of_this_thread == this) of_this_thread = nullptr;
}

void Tape::run() const {
  for (const auto& call : calls_) call();
}

bool Tape::is_on() { return of_this_thread != nullptr; }

void Tape::keep(std::function<void()> call) { of_this_thread->calls_.push_back(std::move(call)); }

}  // namespace nibble
