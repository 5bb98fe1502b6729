#include "sampling.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "isa.hpp"
#include "pool.hpp"
#include "rows.hpp"

namespace nibble {
namespace {

constexpr int64_t kPiece = 4096;      // ids in a piece
constexpr int64_t kSkip = 256;        // ids that one comparison of their largest can rule out
constexpr int64_t kSharePieces = 16;  // from here on pieces are shared among threads

// Buckets of equal width in (largest - logit) / temperature, the last one open. e^-40 of the largest is beyond what 53
// bits can draw.
constexpr int kBuckets = 4096;
constexpr double kBucketsPerUnit = kBuckets / 40.0;

template <class Work>
void for_pieces(int64_t size, const Work& work) {
  int64_t num_pieces = (size + kPiece - 1) / kPiece;
  auto one = [&](int64_t piece) { work(piece, piece * kPiece, std::min(kPiece, size - piece * kPiece)); };
  if (num_pieces < kSharePieces)
    for (int64_t piece = 0; piece < num_pieces; piece++) one(piece);
  else
    Pool::instance().run(num_pieces, one);
}

std::vector<float> piece_maxima(const float* logits, int64_t size) {
  std::vector<float> maxima((size_t)((size + kPiece - 1) / kPiece));
  auto highest = active_isa().rows->highest;
  for_pieces(size, [&](int64_t piece, int64_t first, int64_t count) {
    maxima[(size_t)piece] = highest(logits + first, count);
  });
  return maxima;
}

// NaN when any number is.
float largest(const std::vector<float>& numbers) {
  float best = -INFINITY;
  for (float number : numbers) {
    if (std::isnan(number)) return number;
    best = std::max(best, number);
  }
  return best;
}

// e^((logit - highest) / temperature) of every id, and the sum of each piece.
struct Weights {
  std::vector<double> values, piece_sums;

  void compute(const float* logits, int64_t size, float highest, double temperature) {
    values.resize((size_t)size);
    piece_sums.resize((size_t)((size + kPiece - 1) / kPiece));
    auto exponentials = active_isa().rows->exponentials;
    for_pieces(size, [&](int64_t piece, int64_t first, int64_t count) {
      piece_sums[(size_t)piece] = exponentials(logits + first, count, highest, temperature, values.data() + first);
    });
  }
  double total() const {
    double sum = 0;
    for (double part : piece_sums) sum += part;
    return sum;
  }
};

// The first index at which the running sum exceeds `target`; the last that is not 0 when rounding lets none.
template <class At>
int64_t invert(int64_t size, double running, double target, const At& at) {
  int64_t last = 0;
  for (int64_t i = 0; i < size; i++) {
    double weight = at(i);
    running += weight;
    if (running > target) return i;
    if (weight > 0) last = i;
  }
  return last;
}

int64_t draw_from_all(const Weights& weights, double uniform) {
  double target = uniform * weights.total(), running = 0;
  size_t piece = 0, last = 0;
  for (; piece < weights.piece_sums.size(); piece++) {
    double sum = weights.piece_sums[piece];
    if (sum > 0) last = piece;
    if (running + sum > target) break;
    running += sum;
  }
  if (piece == weights.piece_sums.size()) {  // rounding: take the last id that can be drawn
    piece = last;
    running = -INFINITY;
  }
  int64_t first = (int64_t)piece * kPiece, count = std::min(kPiece, (int64_t)weights.values.size() - first);
  return first + invert(count, running, target, [&](int64_t i) { return weights.values[(size_t)(first + i)]; });
}

// Ascending keys are descending logits, then ascending ids.
uint64_t sort_key(float logit, int64_t id) {
  uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // -0 and 0 are equal
  uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (uint64_t)~ascending << 32 | (uint64_t)id;
}
int64_t id_of(uint64_t key) { return (int64_t)(key & 0xffffffff); }

// A candidate passes while all three hold; the most likely one always does.
struct Limits {
  int64_t count;      // of more likely ones: below this
  double mass;        // of more likely ones: below this
  double min_weight;  // its own: at least this; between 0 and 1
};

struct Prefix {
  int64_t count;
  double mass;
};

// Ids by falling logit, ties by rising id: in buckets, of which only those at an edge are ever sorted.
class Ranking {
 public:
  void compute(const float* logits, const Weights& weights, float highest, double temperature) {
    logits_ = logits;
    weights_ = &weights;
    size_t size = weights.values.size();
    bucket_of_.assign((size + kScan - 1) / kScan * kScan, kNoBucket);
    for_pieces((int64_t)size, [&](int64_t, int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; i++) {
        double distance = ((double)highest - (double)logits[i]) / temperature * kBucketsPerUnit;
        bucket_of_[(size_t)i] = (uint16_t)(distance < kBuckets - 1 ? distance : kBuckets - 1);
      }
    });
    counts_.assign(kBuckets, 0);
    masses_.assign(kBuckets, 0.0);
    for (size_t i = 0; i < size; i++) {
      counts_[bucket_of_[i]]++;
      masses_[bucket_of_[i]] += weights.values[i];
    }
  }

  Prefix longest_prefix(const Limits& limits) const {
    // The bucket of min_weight, less one for the rounding of the logarithm.
    double last_heavy = limits.min_weight > 0 ? -std::log(limits.min_weight) * kBucketsPerUnit - 1 : kBuckets;
    Prefix before{0, 0.0};
    for (int bucket = 0; bucket < kBuckets; bucket++) {
      int64_t count = counts_[(size_t)bucket];
      if (count == 0) continue;
      Prefix after{before.count + count, before.mass + masses_[(size_t)bucket]};
      if (after.count > limits.count || after.mass >= limits.mass || bucket >= last_heavy) {
        std::vector<int64_t> ids = sorted(bucket);
        for (int64_t id : ids) {
          double weight = weights_->values[(size_t)id];
          bool passes = before.count < limits.count && before.mass < limits.mass && weight >= limits.min_weight;
          if (before.count > 0 && !passes) return before;
          before = {before.count + 1, before.mass + weight};
        }
      }
      before = after;  // the bucket's own sum, as pick() takes it
    }
    return before;
  }

  // The id among the first `kept` at which the running sum of weights exceeds `target`.
  int64_t pick(const Prefix& kept, double target) const {
    Prefix before{0, 0.0};
    for (int bucket = 0;; bucket++) {
      int64_t count = counts_[(size_t)bucket];
      Prefix after{before.count + count, before.mass + masses_[(size_t)bucket]};
      if (count > 0 && (after.count >= kept.count || after.mass > target)) {
        std::vector<int64_t> ids = sorted(bucket);
        auto weight = [&](int64_t i) { return weights_->values[(size_t)ids[(size_t)i]]; };
        return ids[(size_t)invert(std::min(count, kept.count - before.count), before.mass, target, weight)];
      }
      before = after;
    }
  }

 private:
  static constexpr size_t kScan = 64;
  static constexpr uint16_t kNoBucket = kBuckets;

  std::vector<int64_t> sorted(int bucket) const {
    std::vector<uint64_t> keys;
    for (size_t first = 0; first < bucket_of_.size(); first += kScan) {
      int found = 0;  // compared many at a time; few of these runs hold one
      for (size_t i = first; i < first + kScan; i++) found |= bucket_of_[i] == bucket;
      for (size_t i = first; found && i < first + kScan; i++)
        if (bucket_of_[i] == bucket) keys.push_back(sort_key(logits_[i], (int64_t)i));
    }
    std::sort(keys.begin(), keys.end());
    std::vector<int64_t> ids;
    for (uint64_t key : keys) ids.push_back(id_of(key));
    return ids;
  }

  const float* logits_ = nullptr;
  const Weights* weights_ = nullptr;
  std::vector<uint16_t> bucket_of_;  // [size], padded
  std::vector<int64_t> counts_;      // [kBuckets]
  std::vector<double> masses_;       // [kBuckets]
};

// The ids of the `wanted` largest logits, largest first, ties by id.
std::vector<int64_t> most_likely(const float* logits, int64_t size, size_t wanted) {
  std::vector<uint64_t> best;  // a heap, the least likely on top
  float least = -INFINITY;
  auto highest = active_isa().rows->highest;
  for (int64_t first = 0; wanted > 0 && first < size; first += kSkip) {
    int64_t count = std::min(kSkip, size - first);
    if (best.size() == wanted && highest(logits + first, count) <= least) continue;
    for (int64_t id = first; id < first + count; id++) {
      if (best.size() == wanted) {
        if (logits[id] <= least) continue;
        std::pop_heap(best.begin(), best.end());
        best.pop_back();
      }
      best.push_back(sort_key(logits[id], id));
      std::push_heap(best.begin(), best.end());
      least = logits[id_of(best.front())];
    }
  }
  std::sort_heap(best.begin(), best.end());
  std::vector<int64_t> ids;
  for (uint64_t key : best) ids.push_back(id_of(key));
  return ids;
}

}  // namespace

int64_t argmax(const float* logits, int64_t size) {
  std::vector<float> maxima = piece_maxima(logits, size);
  float best = largest(maxima);
  if (!std::isfinite(best)) return -1;
  int64_t first = (std::find(maxima.begin(), maxima.end(), best) - maxima.begin()) * kPiece;
  return std::find(logits + first, logits + size, best) - logits;
}

int64_t draw(const float* logits, int64_t size, const Filters& filters, double uniform) {
  float highest = largest(piece_maxima(logits, size));
  if (!std::isfinite(highest)) return -1;
  thread_local Weights weights;
  weights.compute(logits, size, highest, filters.temperature);
  if (filters.top_k <= 0 && filters.top_p >= 1 && filters.min_p <= 0) return draw_from_all(weights, uniform);
  thread_local Ranking ranking;
  ranking.compute(logits, weights, highest, filters.temperature);
  Prefix kept{size, weights.total()};
  if (filters.top_k > 0) kept = ranking.longest_prefix({filters.top_k, INFINITY, 0.0});
  double mass = filters.top_p < 1 ? filters.top_p * kept.mass : INFINITY;  // top_p is a share of what top_k left
  kept = ranking.longest_prefix({kept.count, mass, filters.min_p});
  return ranking.pick(kept, std::min(uniform * kept.mass, std::nextafter(kept.mass, 0.0)));
}

LogProbs log_probs(const float* logits, int64_t size, int64_t token, int64_t num_top) {
  float highest = largest(piece_maxima(logits, size));
  std::vector<double> sums((size_t)((size + kPiece - 1) / kPiece));
  auto exponentials = active_isa().rows->exponentials;
  for_pieces(size, [&](int64_t piece, int64_t first, int64_t count) {
    sums[(size_t)piece] = exponentials(logits + first, count, highest, 1.0, nullptr);
  });
  double sum = 0;
  for (double part : sums) sum += part;
  double normalizer = (double)highest + std::log(sum);
  LogProbs result{(double)logits[token] - normalizer, {}};
  for (int64_t id : most_likely(logits, size, (size_t)std::clamp<int64_t>(num_top, 0, size)))
    result.top.emplace_back(id, (double)logits[id] - normalizer);
  return result;
}

}  // namespace nibble
