#include "rowwise.hpp"

#include <algorithm>

#include "isa.hpp"
#include "pool.hpp"
#include "rows.hpp"

namespace nibble {
namespace {

constexpr int64_t kShareElements = 32768;  // below this, waking another thread costs as much as the work it takes over
constexpr int64_t kChunkElements = 8192;

// Calls work(first, last) over [0, count) in pieces of a few rows of `row_elements`.
template <class Work>
void share(int64_t count, int64_t row_elements, const Work& work) {
  if (count * row_elements < kShareElements) {
    work((int64_t)0, count);
    return;
  }
  int64_t rows = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, row_elements));
  Pool::instance().run((count + rows - 1) / rows,
                       [&](int64_t chunk) { work(chunk * rows, std::min(count, (chunk + 1) * rows)); });
}

}  // namespace

void rms_norm(const NormRows& rows, float eps) {
  auto norm = active_isa().rows->rms_norm;
  share(rows.num_rows, rows.width, [&](int64_t first, int64_t last) {
    for (int64_t i = first * rows.width; i < last * rows.width; i += rows.width)
      norm(rows.x + i, rows.delta ? rows.delta + i : nullptr, rows.weight, rows.width, eps,
           rows.delta ? rows.sum + i : nullptr, rows.normed + i);
  });
}

void rotate(const HeadRows& q, const HeadRows& k, const float* cos, const float* sin, int64_t num_tokens,
            int64_t head_dim) {
  auto turn = active_isa().rows->rotate;
  share(num_tokens, (q.num_heads + k.num_heads) * head_dim, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token++) {
      const float *c = cos + token * (head_dim / 2), *s = sin + token * (head_dim / 2);
      for (const HeadRows* heads : {&q, &k}) {
        int64_t start = token * heads->num_heads * head_dim;
        turn(heads->x + start, c, s, heads->num_heads, head_dim, heads->out + start);
      }
    }
  });
}

void combine_rows(Combine op, const float* x, const float* y, int64_t num_rows, int64_t width, bool repeated, float* out) {
  auto all = [&](auto combine) {
    share(num_rows, width, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) {
        const float *a = x + row * width, *b = repeated ? y : y + row * width;
        for (int64_t i = 0; i < width; i++) out[row * width + i] = combine(a[i], b[i]);
      }
    });
  };
  switch (op) {
    case Combine::add: return all([](float a, float b) { return a + b; });
    case Combine::subtract: return all([](float a, float b) { return a - b; });
    case Combine::multiply: return all([](float a, float b) { return a * b; });
  }
}

void clamp(const float* x, float low, float high, int64_t count, float* out) {
  share(count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) out[i] = x[i] < low ? low : x[i] > high ? high : x[i];
  });
}

void gather_heads(const float* x, const int64_t* order, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
                  float* out) {
  int64_t width = num_heads * head_dim;
  share(num_tokens, width, [&](int64_t first, int64_t last) {
    for (int64_t i = first * width; i < last * width; i += head_dim)
      for (int64_t c = 0; c < head_dim; c++) out[i + c] = x[i + order[i % width + c]];
  });
}

void swiglu(const float* gate, const float* up, int64_t count, float* out) {
  auto gated = active_isa().rows->swiglu;
  share(count, 1, [&](int64_t first, int64_t last) { gated(gate + first, up + first, last - first, out + first); });
}

}  // namespace nibble
