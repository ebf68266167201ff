// Small rows through every CPU kernel with several threads: against double arithmetic, and for the
// sanitizers (make test-sanitize) to watch. Rows are wide enough that the work is really shared.
#include "kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"

namespace {

using namespace pyrlk;

constexpr std::int64_t kRows = 6, kVocab = 40000, kWidth = kVocab + 8;

struct Case {
  std::vector<float> logits = std::vector<float>(kRows * kWidth);
  std::vector<std::int64_t> tokens{0, kVocab - 1, 17, 4095, 4096, -100};

  Case() {
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    for (float& z : logits) z = normal(random);
  }
  Rows rows() { return {logits.data(), DType::kFloat32, kRows, kVocab, kWidth, 1, kWidth, 0}; }
  double lse(std::int64_t row) const {
    double sum = 0;
    for (std::int64_t v = 0; v < kVocab; ++v) sum += std::exp(double(logits[row * kWidth + v]));
    return std::log(sum);
  }
};

bool close(double a, double b) { return std::abs(a - b) <= 2e-5 * (1 + std::abs(b)); }

void token_logprobs_and_their_gradient() {
  Case c;
  std::vector<float> logprob(kRows), entropy(kRows), gradient(kRows * kWidth), ones(kRows, 1.0f);
  std::vector<float> stats(kRows * 4);
  const Temperature tau{1.0, nullptr};
  CHECK(token_logprobs(c.rows(), c.tokens.data(), {}, tau, logprob.data(), entropy.data(),
                       stats.data(), 3) == -1);
  for (std::int64_t t = 0; t + 1 < kRows; ++t) {
    CHECK(close(logprob[t], c.logits[t * kWidth + c.tokens[t]] - c.lse(t)));
  }
  CHECK(logprob[kRows - 1] == 0);
  Rows out = c.rows();
  out.data = gradient.data();
  token_logprobs_backward(c.rows(), c.tokens.data(), {}, tau, stats.data(), ones.data(), nullptr,
                          out, 3);
  for (std::int64_t t = 0; t < kRows; ++t) {
    double sum = 0;
    for (std::int64_t v = 0; v < kVocab; ++v) sum += gradient[t * kWidth + v];
    CHECK(std::abs(sum) < 1e-4);
  }
  c.tokens[2] = kVocab;
  CHECK(token_logprobs(c.rows(), c.tokens.data(), {}, tau, logprob.data(), nullptr, stats.data(),
                       3) == 2);
}

void policy_loss_is_reinforce_without_old_logprobs() {
  Case c;
  const std::vector<float> advantages{1, -2, 0.5f, 3, -1, 7};
  const std::vector<float> weight(kRows, 1.0f);
  std::vector<float> loss(kRows), logprob(kRows), gradient(kRows * kWidth), other(kRows * kWidth);
  const Temperature tau{1.0, nullptr};
  Rows out = c.rows();
  out.data = gradient.data();
  Terms terms;
  terms.clipped = false;
  const PolicyLossArgs args{c.rows(),       c.tokens.data(), {},  nullptr, advantages.data(),
                            weight.data(),  nullptr,         tau, terms,   loss.data(),
                            logprob.data(), nullptr,         &out};
  CHECK(policy_loss(args, 3) == -1);
  Rows plain = c.rows();
  plain.data = other.data();
  CHECK(reinforce_grad(c.rows(), c.tokens.data(), advantages.data(), tau, plain, 3) == -1);
  for (std::int64_t t = 0; t + 1 < kRows; ++t) {
    for (std::int64_t v = 0; v < kVocab; ++v) {
      CHECK(close(gradient[t * kWidth + v], other[t * kWidth + v]));
    }
  }
}

void draws_replay_whatever_the_threads() {
  Case c;
  const std::vector<float> temperature(kRows, 1.0f), top_p(kRows, 0.9f), min_p(kRows, 0.0f);
  const std::vector<std::int64_t> top_k{0, 50, 1, 0, 7, 39999}, position(kRows, 5);
  std::vector<std::int64_t> seed{1, 2, 3, 4, 5, 6};
  struct Out {
    std::vector<std::int64_t> token = std::vector<std::int64_t>(kRows);
    std::vector<float> logprob = std::vector<float>(kRows), full = std::vector<float>(kRows);
    std::vector<std::int32_t> kept = std::vector<std::int32_t>(kRows);
    std::vector<std::uint8_t> status = std::vector<std::uint8_t>(kRows);
    KeptSets support{kRows};
    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> offsets = std::vector<std::int64_t>(kRows + 1);
  };
  Out one, many;
  for (auto [out, threads] : {std::pair<Out*, int>{&one, 1}, {&many, 4}}) {
    const SampleArgs args{c.rows(),
                          temperature.data(),
                          top_p.data(),
                          min_p.data(),
                          top_k.data(),
                          seed.data(),
                          position.data(),
                          nullptr,
                          false,
                          false,
                          out->token.data(),
                          out->logprob.data(),
                          out->full.data(),
                          out->kept.data(),
                          out->status.data(),
                          &out->support};
    CHECK(sample(args, threads) == -1);
    out->ids.resize(out->support.total());
    out->support.write(out->ids.data(), out->support.total(), out->offsets.data(), nullptr, 0,
                       out->status.data(), threads);
  }
  CHECK(one.token == many.token && one.logprob == many.logprob && one.kept == many.kept);
  CHECK(one.ids == many.ids && one.offsets == many.offsets);
  for (std::int64_t t = 0; t < kRows; ++t) {
    CHECK(one.status[t] == 0 && one.token[t] >= 0 && one.token[t] < kVocab);
    const std::int64_t begin = one.offsets[t], end = one.offsets[t + 1];
    CHECK(one.kept[t] == end - begin);
    CHECK(std::binary_search(&one.ids[begin], &one.ids[end - 1] + 1, one.token[t]));
    CHECK(close(one.full[t], c.logits[t * kWidth + one.token[t]] - c.lse(t)));
  }
}

void a_scale_reaches_every_element() {
  std::vector<float> x(100003, 3.0f);
  scale(x.data(), DType::kFloat32, static_cast<std::int64_t>(x.size()), 0.5, 4);
  for (const float value : x) CHECK(value == 1.5f);
}

}  // namespace

int main() {
  for (const char* isa : {"base", "avx2", "avx512"}) {
    if (!set_isa(isa)) continue;
    token_logprobs_and_their_gradient();
    policy_loss_is_reinforce_without_old_logprobs();
    draws_replay_whatever_the_threads();
    a_scale_reaches_every_element();
  }
  if (failures() != 0) std::fprintf(stderr, "%d checks failed\n", failures());
  return failures() == 0 ? 0 : 1;
}
