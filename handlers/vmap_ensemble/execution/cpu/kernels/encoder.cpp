// Turns rows of tokens into those behind an encoder's layers, for every member in one call: post-norm layers as BERT's
// (Devlin et al., arXiv:1810.04805), texts without padding. What memory holds once is read once: few rows read the
// weights in the order in which they lie, many go through the row-wise steps in chunks that stay in the cache.
//
//     qkv = x Wqkv + b;  a = norm(attend(qkv) Wo + b + x);  x = norm(act(a Wup + b) Wdown + b + a)
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>

#include "matrix.h"
#include "matrix_int8.h"

namespace {

constexpr int64_t CHUNK = 96;   // rows that go through all row-wise steps before the next do
constexpr int64_t QUERIES = 4 * ROWS;  // rows of scores at a time

inline float sum_lanes(Vec values) {
  float sum = 0.0f;
  for (int lane = 0; lane < LANES; lane++) sum += values[lane];
  return sum;
}

void normalise(float* row, const float* gamma, const float* beta, int64_t size, float epsilon) {
  Vec sum = {}, squares = {};
  for (int64_t i = 0; i < size; i += LANES) sum += load(row + i);
  const float mean = sum_lanes(sum) / size;
  for (int64_t i = 0; i < size; i += LANES) {
    const Vec gap = load(row + i) - mean;
    squares += gap * gap;
  }
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / size + epsilon);
  for (int64_t i = 0; i < size; i += LANES)
    store(row + i, (load(row + i) - mean) * scale * load(gamma + i) + load(beta + i));
}

// Unnormalised probabilities instead of scores, zeros behind them; returns the reciprocal of their sum.
float soften(float* row, int64_t length, int64_t padded, float scale) {
  for (int64_t j = length; j < padded; j++) row[j] = -std::numeric_limits<float>::max();
  Vec most = load(row);
  for (int64_t j = LANES; j < padded; j += LANES) most = larger(load(row + j), most);
  float highest = most[0];
  for (int lane = 1; lane < LANES; lane++) highest = most[lane] > highest || most[lane] != most[lane] ? most[lane] : highest;
  Vec sum = {};
  for (int64_t j = 0; j < padded; j += LANES) {
    const Vec value = exponential((load(row + j) - highest) * scale);
    store(row + j, value);
    sum += value;
  }
  float total = sum_lanes(sum);
  for (int64_t j = length; j < padded; j++) {
    total -= row[j];
    row[j] = 0.0f;
  }
  return 1.0f / total;
}

inline int64_t round_up(int64_t value) { return (value + PANEL - 1) / PANEL * PANEL; }

thread_local Scratch<float> attention_scratch;

// One head of one text: queries (count, size) against keys and values (length, size), rows `key_row` floats apart.
struct Head {
  const float *query, *key, *value;
  float* out;
  int64_t query_row, key_row, out_row, count, length, size;
  float scale;

  bool attend() const {
    const int64_t padded = round_up(length), wide = round_up(size);
    float* keys = attention_scratch.at_least(padded * size + length * wide + QUERIES * (padded + wide));
    if (!keys) return false;
    float *values = keys + padded * size, *scores = values + length * wide, *mixed = scores + QUERIES * padded;
    pack_matrix(size, padded, [&](int64_t d, int64_t j) { return j < length ? key[j * key_row + d] : 0.0f; }, keys);
    pack_matrix(length, wide, [&](int64_t j, int64_t d) { return d < size ? value[j * key_row + d] : 0.0f; }, values);
    const Matrix by_keys{keys, nullptr, size, padded}, by_values{values, nullptr, length, wide};
    for (int64_t first = 0; first < count; first += QUERIES) {
      const int64_t rows = std::min(QUERIES, count - first);
      multiply(by_keys, 0, by_keys.panels(), query + first * query_row, query_row, rows, scores, padded);
      float parts[QUERIES];
      for (int64_t r = 0; r < rows; r++) parts[r] = soften(scores + r * padded, length, padded, scale);
      multiply(by_values, 0, by_values.panels(), scores, padded, rows, mixed, wide);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < size; d++) out[(first + r) * out_row + d] = mixed[r * wide + d] * parts[r];
    }
    return true;
  }
};

// Threads that work at one member. All of them call `wait` equally often.
struct Team {
  int index, size;
  struct Meeting {
    std::atomic<int> arrived{0}, round{0};
    std::atomic<bool> failed{false};
    float* memory = nullptr;
  };
  Meeting* meeting;

  void wait() const {
    if (size == 1) return;
    const int round = meeting->round.load(std::memory_order_acquire);
    if (meeting->arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      meeting->arrived.store(0, std::memory_order_relaxed);
      meeting->round.store(round + 1, std::memory_order_release);
      return;
    }
    for (int turns = 0; meeting->round.load(std::memory_order_acquire) == round; turns++)
      if (turns > 2000) sched_yield();
  }
  int64_t begin(int64_t count) const { return count * index / size; }
  int64_t end(int64_t count) const { return count * (index + 1) / size; }
};

// Whether a team shares the columns of each product: too few rows for a chunk of each thread's own.
inline bool are_few(int64_t rows, int team) { return rows < CHUNK * team; }

// This thread's chunks of many rows: run(first row, number of rows).
template <class Run>
void for_chunks(const Team& team, int64_t rows, Run run) {
  const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
  for (int64_t chunk = team.begin(chunks); chunk < team.end(chunks); chunk++)
    run(chunk * CHUNK, std::min(CHUNK, rows - chunk * CHUNK));
}

template <class Weights>
struct Layer {
  Weights joined, out, up, down;
  const float *gamma, *beta, *last_gamma, *last_beta;

  // Its tensors lie one behind the other; moves `at` behind them.
  Layer(const float*& at, int64_t hidden, int64_t inner) {
    joined = Weights::take(at, hidden, 3 * hidden);
    out = Weights::take(at, hidden, hidden);
    gamma = take(at, hidden), beta = take(at, hidden);
    up = Weights::take(at, hidden, inner);
    down = Weights::take(at, inner, hidden);
    last_gamma = take(at, hidden), last_beta = take(at, hidden);
  }
  static const float* take(const float*& at, int64_t size) { return (at += size) - size; }
};

thread_local Scratch<float> member_scratch;

// What all members are run on. `starts` and `lengths` are the texts' places in the rows.
struct Shape {
  int64_t layers, hidden, inner, heads, rows, texts;
  const int64_t *starts, *lengths;
  Activation activation;
  bool first_only;  // only each text's first row is wanted of the last layer
  float epsilon, scale;

  int64_t out_rows() const { return first_only ? texts : rows; }

  // Floats that a team needs.
  int64_t memory(int team) const {
    const int64_t inner_rows = are_few(rows, team) ? rows : CHUNK * team;
    return rows * 6 * hidden + texts * 2 * hidden + inner_rows * inner;
  }
};

// The same with matrices of a kind.
template <class Weights>
struct Batch : Shape {
  bool run(const Team& team, const float* weights, const float* x, float* y) const {
    if (team.index == 0 && !(team.meeting->memory = member_scratch.at_least(memory(team.size)))) team.meeting->failed = true;
    team.wait();
    if (team.meeting->failed) return false;
    float *qkv = team.meeting->memory, *mixed = qkv + rows * 3 * hidden, *turns[2] = {mixed + rows * hidden, nullptr};
    turns[1] = turns[0] + rows * hidden;
    float *queries = turns[1] + rows * hidden, *firsts = queries + texts * hidden, *wide = firsts + texts * hidden;
    for (int64_t index = 0; index < layers; index++) {
      const Layer<Weights> layer(weights, hidden, inner);
      const bool last = index + 1 == layers;
      float* to = last ? y : turns[index % 2];
      if (last && first_only) {
        gather(team, x, firsts);
        team.wait();
        project(team, layer.joined, 0, hidden, firsts, texts, queries, hidden);
        project(team, layer.joined, hidden, 3 * hidden, x, rows, qkv + hidden, 3 * hidden);
        team.wait();
        attend(team, qkv, queries, mixed);
        team.wait();
        follow(team, layer, mixed, firsts, to, texts, wide);
      } else {
        project(team, layer.joined, 0, 3 * hidden, x, rows, qkv, 3 * hidden);
        team.wait();
        attend(team, qkv, nullptr, mixed);
        team.wait();
        follow(team, layer, mixed, x, to, rows, wide);
      }
      team.wait();
      x = to;
    }
    return !team.meeting->failed;
  }

  void gather(const Team& team, const float* x, float* firsts) const {
    for (int64_t text = team.begin(texts); text < team.end(texts); text++)
      std::copy_n(x + starts[text] * hidden, hidden, firsts + text * hidden);
  }

  void product(const Team& team, const Weights& matrix, int64_t begin, int64_t end, const float* x, int64_t x_row,
               int64_t count, float* y, int64_t y_row, const Finish& finish = {}) const {
    if (!multiply(matrix, begin, end, x, x_row, count, y, y_row, finish)) team.meeting->failed = true;
  }

  // Columns [begin, end) of a product: its rows divided among the team if there are many, else its columns.
  void project(const Team& team, const Weights& matrix, int64_t begin, int64_t end, const float* x, int64_t count, float* y,
               int64_t y_row) const {
    begin /= PANEL, end /= PANEL;
    if (are_few(count, team.size)) {
      const int64_t own = begin + team.begin(end - begin);
      product(team, matrix, own, begin + team.end(end - begin), x, hidden, count, y + (own - begin) * PANEL, y_row);
      return;
    }
    for_chunks(team, count, [&](int64_t row, int64_t size) {
      product(team, matrix, begin, end, x + row * hidden, hidden, size, y + row * y_row, y_row);
    });
  }

  // Of each text all rows, or only its first, whose queries are then given.
  void attend(const Team& team, const float* qkv, const float* queries, float* mixed) const {
    const int64_t size = hidden / heads;
    for (int64_t job = team.index; job < heads * texts; job += team.size) {
      const int64_t text = job % texts, column = job / texts * size;
      const float* own = qkv + starts[text] * 3 * hidden + column;
      const Head head = queries ? Head{queries + text * hidden + column, own + hidden, own + 2 * hidden,
                                       mixed + text * hidden + column, hidden, 3 * hidden, hidden, 1, lengths[text], size, scale}
                                : Head{own, own + hidden, own + 2 * hidden, mixed + starts[text] * hidden + column, 3 * hidden,
                                       3 * hidden, hidden, lengths[text], lengths[text], size, scale};
      if (!head.attend()) team.meeting->failed = true;
    }
  }

  // The steps that look at each row alone. Many rows: each thread takes chunks of them through all steps.
  void follow(const Team& team, const Layer<Weights>& layer, float* mixed, const float* x, float* y, int64_t count, float* wide) const {
    if (are_few(count, team.size)) return follow_rows(team, layer, mixed, x, y, count, wide);
    for_chunks(team, count, [&](int64_t row, int64_t size) {
      const int64_t at = row * hidden;
      follow_rows({0, 1, team.meeting}, layer, mixed + at, x + at, y + at, size, wide + team.index * CHUNK * inner);
    });
  }

  void follow_rows(const Team& team, const Layer<Weights>& layer, float* mixed, const float* x, float* y, int64_t count,
                   float* wide) const {
    float* between = y;
    share(team, layer.out, mixed, hidden, count, between, {NONE, x, hidden});
    norm(team, layer.gamma, layer.beta, between, count);
    share(team, layer.up, between, hidden, count, wide, {activation});
    // The sum is made beside `between`, which it adds; what attention gave isn't needed any more.
    share(team, layer.down, wide, inner, count, mixed, {NONE, between, hidden});
    norm(team, layer.last_gamma, layer.last_beta, mixed, count);
    const int64_t size = count * hidden;
    std::copy(mixed + team.begin(size), mixed + team.end(size), y + team.begin(size));
  }

  void share(const Team& team, const Weights& matrix, const float* x, int64_t x_row, int64_t count, float* y,
             Finish finish) const {
    const int64_t begin = team.begin(matrix.panels()), column = begin * PANEL;
    if (finish.other) finish.other += column;
    product(team, matrix, begin, team.end(matrix.panels()), x, x_row, count, y + column, matrix.outputs, finish);
    team.wait();
  }

  void norm(const Team& team, const float* gamma, const float* beta, float* rows, int64_t count) const {
    for (int64_t row = team.begin(count); row < team.end(count); row++)
      normalise(rows + row * hidden, gamma, beta, hidden, epsilon);
    team.wait();
  }
};

// `at_a_time` members at a time, each with its share of the threads; the last ones, if they are fewer, share all.
template <class Weights>
bool run_members(const Batch<Weights>& batch, int64_t members, const float* weights, int64_t stride, const float* x,
                 int64_t x_stride, float* y, int at_a_time, int threads) {
  const int64_t y_stride = batch.out_rows() * batch.hidden;
  bool enough = true;
  Team::Meeting* meetings = new (std::nothrow) Team::Meeting[members];
  if (!meetings) return false;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : enough)
  {
    const int thread = threads > 1 ? omp_get_thread_num() : 0, count = threads > 1 ? omp_get_num_threads() : 1;
    for (int64_t first = 0; first < members;) {
      const int teams = std::max<int64_t>(1, std::min<int64_t>({at_a_time, count, members - first}));
      const int own = int64_t(thread) * teams / count;
      int begin = 0, end = 0;  // the threads of this one's team
      while (int64_t(begin) * teams / count < own) begin++;
      for (end = begin; end < count && int64_t(end) * teams / count == own;) end++;
      const int64_t member = first + own;
      const Team team{thread - begin, end - begin, meetings + member};
      enough = batch.run(team, weights + member * stride, x + member * x_stride, y + member * y_stride) && enough;
      first += teams;
    }
  }
  delete[] meetings;
  return enough;
}

}  // namespace

extern "C" {

// Outputs of a matrix must be a multiple of it, for the functions below.
int encoder_panel() { return PANEL; }

// The widest head of an attention.
int encoder_widest_head() { return DEPTH; }

// (outputs, inputs), as nn.Linear has it -> as many floats in the order of `multiply`.
void encoder_pack(const float* weight, float* to, int64_t outputs, int64_t inputs) {
  pack_matrix(inputs, outputs, [&](int64_t k, int64_t n) { return weight[n * inputs + k]; }, to);
}

// The same in 8 bits: int8 weights and a scale of each output -> `encoder_int8_floats` floats' memory.
void encoder_pack_int8(const int8_t* weight, const float* scales, float* to, int64_t outputs, int64_t inputs) {
  Int8Matrix::pack(weight, scales, to, inputs, outputs);
}
int64_t encoder_int8_floats(int64_t outputs, int64_t inputs) { return Int8Matrix::floats(inputs, outputs); }

// `sizes`: members, layers, hidden, inner, heads, rows, texts, floats from a member's weights to the next one's, and from
// its rows in x to the next one's (0: the same). x is (rows, hidden) of each member; `starts` and `lengths` of the texts
// are in rows; y is (members, rows or, with `first_only`, texts, hidden). 0 if there is no memory.
int encoder_run(const int64_t* sizes, const float* weights, const float* x, const int64_t* starts, const int64_t* lengths,
                float* y, int int8, int activation, int first_only, float epsilon, float scale, int at_a_time, int threads) {
  const Shape shape{sizes[1], sizes[2], sizes[3], sizes[4],        sizes[5], sizes[6],
                    starts,   lengths,  static_cast<Activation>(activation), first_only != 0, epsilon, scale};
  const auto run = [&](const auto& batch) {
    return run_members(batch, sizes[0], weights, sizes[7], x, sizes[8], y, at_a_time, threads);
  };
  return int8 ? run(Batch<Int8Matrix>{shape}) : run(Batch<Matrix>{shape});
}
}
