// The CPU kernels as bindings.cpp calls them. Pointers and sizes; per-token arrays are contiguous
// [T].
#pragma once

#include <cstdint>

#include "kept_sets.h"
#include "objective.h"
#include "row.h"

namespace pyrlk {

// Logits of T rows: row t starts at element (t / inner)·stride_outer + (t % inner)·stride_inner.
struct Rows {
  void* data;
  DType dtype;
  int64_t count, vocab;  // columns beyond vocab are padding: not read, gradient 0
  int64_t width;         // columns of the tensor
  int64_t inner, stride_outer, stride_inner;

  char* row(int64_t t) const {
    const int64_t at = (t / inner) * stride_outer + (t % inner) * stride_inner;
    return static_cast<char*>(data) + at * item_size(dtype);
  }
};

// Every per-token float array is float (float64 logits: double); `wide` says which.
struct Temperature {
  double value;
  const void* per_token;  // or null
};

// The kept set of each token as CSR, ids ascending in a row: the distribution is over it alone.
// Null ids: the whole vocabulary.
struct KeptIds {
  const int32_t* ids;
  const int64_t* offsets;  // [count + 1]
};

// All return −1, or the first token index whose action is outside [0, vocab) or its kept set
// (nothing is written then).
int64_t token_logprobs(const Rows& z, const int64_t* tokens, KeptIds kept, Temperature tau,
                       void* logprob, void* entropy, void* stats, int threads);
void token_logprobs_backward(const Rows& z, const int64_t* tokens, KeptIds kept, Temperature tau,
                             const void* stats, const void* grad_logprob, const void* grad_entropy,
                             const Rows& grad, int threads);

struct PolicyLossArgs {
  Rows logits;
  const int64_t* tokens;
  KeptIds kept;
  const void *old_logprobs, *advantages, *weight, *ref_logprobs;  // old and ref may be null
  Temperature tau;
  Terms terms;
  void *loss, *logprob, *entropy;  // outputs [T]; entropy may be null
  const Rows* grad;                // or null; may be the logits themselves
};
int64_t policy_loss(const PolicyLossArgs& args, int threads);
int64_t reinforce_grad(const Rows& z, const int64_t* tokens, const void* advantages,
                       Temperature tau, const Rows& out, int threads);

// x *= scale, elementwise over contiguous memory; returns at once where scale is 1.
void scale(void* x, DType dtype, int64_t n, double scale, int threads);

enum Status : uint8_t { kNan = 1, kInf = 2, kEmpty = 4, kInvalid = 8, kOverflow = 16 };

struct SampleArgs {
  Rows logits;
  const float *temperature, *top_p, *min_p;
  const int64_t *top_k, *seed, *position;
  const uint32_t* allowed;  // [rows, ceil(vocab / 32)] bits, or null: all
  bool joint, keep_ties;
  int64_t* token;
  float *logprob, *full_logprob;
  int32_t* kept;
  uint8_t* status;
  KeptSets* support;  // of all rows, or null
};
// Returns −1, or the first row whose parameters are out of range (that row gets status kInvalid).
int64_t sample(const SampleArgs& args, int threads);

// The same over rows whose columns lie on several ranks (sample_shards.cpp): each finds its own
// candidates, and all select from those of all.
struct ShardArgs {
  Rows logits;    // this rank's columns
  int64_t first;  // the id of the first of them
  const float *temperature, *top_p, *min_p;
  const int64_t *top_k, *seed, *position;
  const uint32_t* allowed;  // [rows, words] bits of all ids, or null
  int64_t words;
  bool joint, keep_ties;
};
// Numbers before the candidates of a row: its maximum, Σ 2^y high and low, status, their number.
constexpr int64_t kShardHeader = 8;
// Of each of `count` rows [kShardHeader + 2·capacity]: the header, `capacity` logits and as many
// ids. Where the maxima of the whole rows of `vocab` columns are known, and whether these are +inf
// (status), fewer are candidates; null: not yet.
struct Known {
  const float* max;
  const uint8_t* status;
  int64_t vocab;
};
void shard_candidates(const ShardArgs& args, const int64_t* rows, int64_t count, Known known,
                      int64_t capacity, float* out, int threads);

// What is still open of a row after the candidates of all ranks are known.
enum ShardState : uint8_t { kDone = 0, kNeedsMass = 1, kUnfiltered = 2, kOverflown = 3 };
struct SelectArgs {
  const float* parts;  // [ranks, rows, kShardHeader + 2·capacity]
  int64_t ranks, rows, capacity, vocab;
  const uint64_t* row_mass;  // [rows], or null: not known yet
  int64_t* token;
  float *logprob, *full_logprob;
  int32_t* kept;
  uint8_t *status, *state;
  float* max;         // of the whole row; 0 where it has +inf or nothing
  double* log_sum;    // ln Σ exp((z − max)/τ) of the whole row
  KeptSets* support;  // of all rows, or null
};
void shard_select(const ShardArgs& args, const SelectArgs& select, int threads);

// The mass of this rank's columns.
void shard_masses(const ShardArgs& args, const int64_t* rows, int64_t count, Known known,
                  uint64_t* mass, int threads);
// Draws from the whole rows: masses [ranks, count]; the id and the bits of its logit are written
// where the draw falls on this rank, 0 elsewhere.
void shard_draw(const ShardArgs& args, const int64_t* rows, int64_t count, const float* max,
                const uint64_t* masses, int64_t ranks, int64_t rank, int64_t* found, int threads);

// Verifies a draft of `depth` tokens in each of B rows; target rows are (row, depth) in order.
struct VerifyArgs {
  Rows target;                  // B · (depth + 1)
  const Rows* draft;            // B · depth, or null: each draft token had probability 1
  const int64_t* draft_tokens;  // [B, depth], inside the vocabulary
  int64_t depth;
  const float *temperature, *top_p, *min_p;  // [B], like the following
  const int64_t *top_k, *seed, *position;
  int64_t* token;  // [B, depth + 1]; −1 after the last
  int32_t* accepted;
  float *logprob, *full_logprob;  // [B, depth + 1]; 0 after the last
  uint8_t* status;
  KeptSets* support;  // of B · (depth + 1) rows, or null
};
// As `sample`.
int64_t verify_draft(const VerifyArgs& args, int threads);

}  // namespace pyrlk
