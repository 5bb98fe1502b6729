#include <algorithm>

#include "check.hpp"
#include "rowwise.hpp"
#include "rows.hpp"
#include "sampling.hpp"

namespace nibble::tests {
namespace {

void test_norm(Random& random, int64_t num_rows, int64_t width) {
  std::vector<float> x = floats(random, num_rows * width), delta = floats(random, num_rows * width);
  std::vector<float> weight = floats(random, width);
  same_bits("norm of " + std::to_string(width), [&] {
    std::vector<float> sum(x.size()), normed(x.size());
    rms_norm({x.data(), delta.data(), weight.data(), sum.data(), normed.data(), num_rows, width}, 1e-5f);
    sum.insert(sum.end(), normed.begin(), normed.end());
    rms_norm({x.data(), nullptr, weight.data(), nullptr, normed.data(), num_rows, width}, 1e-5f);
    sum.insert(sum.end(), normed.begin(), normed.end());
    return sum;
  });
}

void test_rotate(Random& random, int64_t num_tokens, int64_t heads, int64_t kv_heads, int64_t head_dim) {
  std::vector<float> q = floats(random, num_tokens * heads * head_dim), k = floats(random, num_tokens * kv_heads * head_dim);
  std::vector<float> cos = floats(random, num_tokens * head_dim / 2), sin = floats(random, num_tokens * head_dim / 2);
  same_bits("heads of " + std::to_string(head_dim), [&] {
    std::vector<float> q_out(q.size()), k_out = k;  // k in place
    rotate({q.data(), q_out.data(), heads}, {k_out.data(), k_out.data(), kv_heads}, cos.data(), sin.data(), num_tokens,
           head_dim);
    q_out.insert(q_out.end(), k_out.begin(), k_out.end());
    return q_out;
  });
}

// Bug: rows that go to several threads, or rows beside others, computed in another order than one row alone.
void test_neighbours(Random& random) {
  constexpr int64_t num_rows = 60, width = 1000;
  std::vector<float> x = floats(random, num_rows * width), weight = floats(random, width), together(x.size()), alone(width);
  rms_norm({x.data(), nullptr, weight.data(), nullptr, together.data(), num_rows, width}, 1e-5f);
  for (int64_t row = 0; row < num_rows; row++) {
    rms_norm({x.data() + row * width, nullptr, weight.data(), nullptr, alone.data(), 1, width}, 1e-5f);
    CHECK(std::equal(alone.begin(), alone.end(), together.begin() + row * width), "row %d differs", (int)row);
  }
}

std::vector<float> logits_of(Random& random, int64_t size, int kind) {
  std::vector<float> logits = floats(random, size, 3.0f);
  for (size_t i = 0; i < logits.size(); i++) {
    if (kind == 1) logits[i] = std::round(logits[i]);
    if (kind == 2 && i % 2) logits[i] = -INFINITY;
    if (kind == 3) logits[i] *= 200.0f;
  }
  return logits;
}

void test_draws(Random& random, int64_t size, int kind) {
  std::vector<float> logits = logits_of(random, size, kind);
  const Filters all[] = {{1.0, 0, 1.0, 0.0},   {0.7, 40, 1.0, 0.0},     {1.0, 0, 0.9, 0.0},   {2.0, 0, 0.9999, 0.0},
                         {1.0, 0, 1.0, 0.05},  {0.9, 50, 0.8, 0.01},    {1e-310, 0, 0.5, 0.0}, {1e30, 0, 0.5, 0.0},
                         {1.0, size, 1.0, 1.0}, {1.0, 10 * size, 0.0, 0.0}};
  std::vector<double> uniforms = {0.123};
  if (size < 10000) uniforms = {0.0, 0.5, 1.0 - 0x1p-53, 0.123};
  std::vector<double> ids = same_bits("draws of " + std::to_string(size), [&] {
    std::vector<double> found = {(double)argmax(logits.data(), size)};
    for (const Filters& filters : all)
      for (double uniform : uniforms) found.push_back((double)draw(logits.data(), size, filters, uniform));
    LogProbs probs = log_probs(logits.data(), size, size / 2, 20);
    if (std::isfinite(probs.token)) found.push_back(probs.token);
    for (auto [id, log_prob] : probs.top) found.push_back((double)id);
    return found;
  });
  for (size_t i = 0; i < 1 + std::size(all) * uniforms.size(); i++)
    CHECK(ids[i] >= 0 && ids[i] < (double)size && std::isfinite(logits[(size_t)ids[i]]), "drew %g of %lld", ids[i], (long long)size);
}

}  // namespace

void test_rows() {
  Random random(1);
  for (int64_t width : {1, 15, 16, 17, 63, 64, 65, 127, 1000, 2048}) test_norm(random, width < 100 ? 3 : 40, width);
  for (int64_t head_dim : {2, 10, 32, 34, 64, 128}) test_rotate(random, 70, 5, 2, head_dim);
  for (int64_t count : {1, 15, 17, 40000}) {
    std::vector<float> gate = floats(random, count, 20.0f), up = floats(random, count);
    gate[0] = 1e30f;
    same_bits("swiglu of " + std::to_string(count), [&] {
      std::vector<float> out(gate.size());
      swiglu(gate.data(), up.data(), count, out.data());
      return out;
    });
  }
  test_neighbours(random);
}

void test_sampling() {
  Random random(2);
  for (int64_t size : {1, 2, 15, 17, 4095, 4096, 4097, 70001})
    for (int kind = 0; kind < (size < 10000 ? 4 : 1); kind++) test_draws(random, size, kind);
  float broken[] = {1.0f, NAN, 2.0f};
  CHECK(argmax(broken, 3) == -1, "NaN was not seen");
  CHECK(draw(broken, 3, {1.0, 0, 1.0, 0.0}, 0.5) == -1, "a draw from NaN");
  log_probs(broken, 3, 1, 3);  // NaN, but inside of its memory
}

}  // namespace nibble::tests
