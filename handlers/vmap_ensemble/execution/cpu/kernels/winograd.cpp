// Turns a 3x3 convolution of stride 1 into Winograd's products of tiles: F(2x2,3x3) in 16 multiplications instead of
// 36 a tile and channel, F(4x4,3x3) in 36 instead of 144. Compiled once per instruction set (LANES floats in a
// register), called through ctypes; it needs neither PyTorch's headers nor its ABI.
//
//     y = A^T [ sum over channels (G w G^T) * (B^T x B) ] A        Lavin & Gray, arXiv:1509.09308
//
// Images are channels_last, so each step takes LANES channels of a pixel at once. A block of tiles goes through all
// three steps while it lies in the cache, and is as large as to read the weights seldom.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "vector.h"

namespace {

// Sums that are held in registers: ROWS tiles by COLUMNS vectors of filters.
constexpr int ROWS = LANES == 16 ? 7 : 6, COLUMNS = LANES == 16 ? 4 : 2;
constexpr int64_t PANEL = COLUMNS * LANES;
constexpr int FLOATS_PER_LINE = 16;

// One-dimensional transforms; `s` and `t` are the steps between elements. Interpolation at 0, +-a, +-b and infinity.
template <int TILE>
struct Form;

template <>
struct Form<4> {
  // Half the rounding error of the customary 1 and 2: their powers differ less in size. Exact in binary.
  static constexpr float a = 0.75f, b = 1.5f, a2 = a * a, b2 = b * b;

  static void input(const Vec* d, int s, Vec* v, int t) {
    Vec d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s];
    Vec even_a = d4 - b2 * d2, odd_a = a * (d3 - b2 * d1), even_b = d4 - a2 * d2, odd_b = b * (d3 - a2 * d1);
    v[0] = d4 - (a2 + b2) * d2 + a2 * b2 * d[0];
    v[t] = even_a + odd_a;
    v[2 * t] = even_a - odd_a;
    v[3 * t] = even_b + odd_b;
    v[4 * t] = even_b - odd_b;
    v[5 * t] = d[5 * s] - (a2 + b2) * d3 + a2 * b2 * d1;
  }
  static void output(const Vec* m, int s, Vec* y, int t) {
    Vec sum_a = m[s] + m[2 * s], gap_a = m[s] - m[2 * s], sum_b = m[3 * s] + m[4 * s], gap_b = m[3 * s] - m[4 * s];
    y[0] = m[0] + sum_a + sum_b;
    y[t] = a * gap_a + b * gap_b;
    y[2 * t] = a2 * sum_a + b2 * sum_b;
    y[3 * t] = a * a2 * gap_a + b * b2 * gap_b + m[5 * s];
  }
  static void weights(const double* w, int s, double* u, int t) {
    constexpr double a = Form::a, b = Form::b, a2 = a * a, b2 = b * b;
    constexpr double at_a = 2 * a2 * (a2 - b2), at_b = 2 * b2 * (b2 - a2);
    u[0] = w[0] / (a2 * b2);
    u[t] = (w[0] + a * w[s] + a2 * w[2 * s]) / at_a;
    u[2 * t] = (w[0] - a * w[s] + a2 * w[2 * s]) / at_a;
    u[3 * t] = (w[0] + b * w[s] + b2 * w[2 * s]) / at_b;
    u[4 * t] = (w[0] - b * w[s] + b2 * w[2 * s]) / at_b;
    u[5 * t] = w[2 * s];
  }
};

template <>
struct Form<2> {
  static void input(const Vec* d, int s, Vec* v, int t) {
    v[0] = d[0] - d[2 * s];
    v[t] = d[s] + d[2 * s];
    v[2 * t] = d[2 * s] - d[s];
    v[3 * t] = d[3 * s] - d[s];
  }
  static void output(const Vec* m, int s, Vec* y, int t) {
    y[0] = m[0] + m[s] + m[2 * s];
    y[t] = m[s] - m[2 * s] + m[3 * s];
  }
  static void weights(const double* w, int s, double* u, int t) {
    u[0] = w[0];
    u[t] = (w[0] + w[s] + w[2 * s]) / 2;
    u[2 * t] = (w[0] - w[s] + w[2 * s]) / 2;
    u[3 * t] = w[2 * s];
  }
};

struct Layer {
  const float *x, *weights, *bias, *other;
  float* y;
  int64_t batch, height, width, groups, channels, filters, top, left;
  int64_t out_height, out_width, tile_rows, tile_columns;
  bool relu, halved;
};

thread_local Scratch<float> tiles_scratch, sums_scratch;

// Adds `depth` inputs of R tiles times C vectors of filters. Weights that will be wanted next are asked for on the way,
// `step` floats an input in LINES lines: they come from beyond the cache, in blocks too short for the CPU to foresee.
template <int LINES, int R, int C>
inline void add_products(const float* const (&x)[R], int64_t depth, const float* w, const float* next, int64_t step,
                         Vec (&sum)[R][C]) {
  for (int64_t k = 0; k < depth; k++, w += C * LANES, next += step) {
    Vec weights[C];
    for (int c = 0; c < C; c++) weights[c] = load(w + c * LANES);
    for (int line = 0; line < LINES; line++) __builtin_prefetch(next + line * FLOATS_PER_LINE, 0, 2);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) sum[r][c] += x[r][k] * weights[c];
  }
}

// Calls job(R, C) with as many rows and vectors as compile-time constants.
template <int R = ROWS, int C = COLUMNS, typename Job>
inline void with_sizes(int rows, int columns, const Job& job) {
  if constexpr (R > 1)
    if (rows < R) return with_sizes<R - 1, C>(rows, columns, job);
  if constexpr (C > 1)
    if (columns < C) return with_sizes<R, C - 1>(rows, columns, job);
  job(std::integral_constant<int, R>{}, std::integral_constant<int, C>{});
}

template <int TILE>
struct Winograd {
  static constexpr int SIDE = TILE + 2, POINTS = SIDE * SIDE;
  const Layer& layer;

  struct Place {
    int64_t image, y, x;
  };
  Place place(int64_t tile) const {
    int64_t each = layer.tile_rows * layer.tile_columns, rest = tile % each;
    return {tile / each, rest / layer.tile_columns * TILE, rest % layer.tile_columns * TILE};
  }

  // One tile's pixels -> POINTS values per channel, `plane` floats apart.
  void transform_input(int64_t group, int64_t tile, float* to, int64_t plane) const {
    const int64_t pixel = layer.groups * layer.channels;
    auto [image, y, x] = place(tile);
    y -= layer.top, x -= layer.left;
    const bool inside = y >= 0 && x >= 0 && y + SIDE <= layer.height && x + SIDE <= layer.width;
    for (int64_t c = 0; c < layer.channels; c += LANES) {
      Vec d[POINTS], t[POINTS], v[POINTS];
      const float* from = layer.x + image * layer.height * layer.width * pixel + group * layer.channels + c;
      for (int64_t i = 0; i < SIDE; i++)
        for (int64_t j = 0; j < SIDE; j++) {
          bool in = inside || (y + i >= 0 && y + i < layer.height && x + j >= 0 && x + j < layer.width);
          d[i * SIDE + j] = in ? load(from + ((y + i) * layer.width + x + j) * pixel) : Vec{};
        }
      for (int j = 0; j < SIDE; j++) Form<TILE>::input(d + j, SIDE, t + j, SIDE);
      for (int i = 0; i < SIDE; i++) Form<TILE>::input(t + i * SIDE, 1, v + i * SIDE, 1);
      for (int p = 0; p < POINTS; p++) store(to + p * plane + c, v[p]);
    }
  }

  // One tile's sums of the filters from `first` on -> pixels, with bias, residual and relu, or their maxima of 2x2.
  void transform_output(int64_t group, int64_t tile, const float* sums, int64_t plane, int64_t first, int64_t filters) const {
    const int64_t pixel = layer.groups * layer.filters;
    auto [image, y, x] = place(tile);
    const int64_t step = layer.halved ? 2 : 1, height = layer.out_height / step, width = layer.out_width / step;
    y /= step, x /= step;
    const int64_t rows = std::min(TILE / step, height - y), columns = std::min(TILE / step, width - x);
    const int64_t corner = ((image * height + y) * width + x) * pixel;
    for (int64_t f = 0; f < filters; f += LANES) {
      Vec m[POINTS], t[TILE * SIDE], v[TILE * TILE];
      for (int p = 0; p < POINTS; p++) m[p] = load(sums + p * plane + f);
      for (int j = 0; j < SIDE; j++) Form<TILE>::output(m + j, SIDE, t + j, SIDE);
      for (int i = 0; i < TILE; i++) Form<TILE>::output(t + i * SIDE, 1, v + i * TILE, 1);
      if (layer.halved)
        for (int i = 0; i < TILE / 2; i++)
          for (int j = 0; j < TILE / 2; j++) {
            const Vec* pixels = v + 2 * i * TILE + 2 * j;
            v[i * TILE + j] = larger(larger(pixels[0], pixels[1]), larger(pixels[TILE], pixels[TILE + 1]));
          }
      const int64_t filter = group * layer.filters + first + f;
      const Vec bias = layer.bias ? load(layer.bias + filter) : Vec{};
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
          const int64_t at = corner + (i * width + j) * pixel + filter;
          Vec value = v[i * TILE + j] + bias;
          if (layer.other) value += load(layer.other + at);
          store(layer.y + at, layer.relu ? relu(value) : value);
        }
    }
  }

  // (R tiles, depth) x (depth, C vectors of filters). `next` are weights that will be wanted after these.
  template <int R, int C>
  void multiply(const float* tiles, const float* weights, const float* next, int64_t step, float* sums, int64_t row) const {
    const float* x[R];
    for (int r = 0; r < R; r++) x[r] = tiles + r * layer.channels;
    Vec sum[R][C] = {};
    constexpr int LINES = (C * LANES + FLOATS_PER_LINE - 1) / FLOATS_PER_LINE;
    if (step > FLOATS_PER_LINE)  // few tiles, each of which has many lines to ask for
      add_products<LINES>(x, layer.channels, weights, next, step, sum);
    else
      add_products<1>(x, layer.channels, weights, next, step, sum);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) store(sums + r * row + c * LANES, sum[r][c]);
  }

  // Products of `count` tiles with the filters from `first` to `last`, for each of the POINTS.
  void multiply_tiles(int64_t group, const float* tiles, int64_t tile_plane, int64_t count, int64_t first, int64_t last,
                      float* sums, int64_t sum_plane) const {
    const int64_t chunks = (count + ROWS - 1) / ROWS, row = last - first, depth = layer.channels;
    for (int p = 0; p < POINTS; p++) {
      const float* weights = layer.weights + (group * POINTS + p) * depth * layer.filters;
      for (int64_t f = first; f < last; f += PANEL) {
        const int columns = std::min(PANEL, last - f) / LANES;
        const float* next = weights + (f + PANEL < last ? f + PANEL : first + layer.filters) * depth;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          const int64_t from = chunk * count / chunks;
          with_sizes((chunk + 1) * count / chunks - from, columns, [&](auto rows, auto vectors) {
            multiply<rows, vectors>(tiles + p * tile_plane + from * depth, weights + f * depth,
                                    next + chunk * columns * LANES * depth / chunks, (columns * LANES + chunks - 1) / chunks,
                                    sums + p * sum_plane + from * row + f - first, row);
          });
        }
      }
    }
  }

  // Planes that are a multiple of 4 KiB apart would all fall into the same few lines of the cache.
  static int64_t pad(int64_t floats) { return floats % 1024 ? floats : floats + LANES; }

  bool run(int threads) const {
    const int64_t tiles = layer.batch * layer.tile_rows * layer.tile_columns;
    if (!tiles) return true;
    // From a quarter as many tiles as filters on, reading the weights again costs little beside the block's own values.
    const int64_t most = std::max<int64_t>(4 * ROWS, layer.filters / 4), least = 2 * ROWS;
    int64_t blocks = (tiles + most - 1) / most;
    if (layer.groups * blocks < 4 * threads) {  // few jobs: as many for each thread
      const int64_t step = threads / std::gcd(layer.groups, int64_t(threads));
      blocks = (blocks + step - 1) / step * step;
    }
    if (tiles < least * blocks) {
      const int64_t panels = (layer.filters + PANEL - 1) / PANEL, short_blocks = std::max<int64_t>(1, tiles / ROWS);
      if (layer.groups < threads && panels > short_blocks) return run_filters_apart(tiles, threads);
      blocks = std::min(blocks, short_blocks);
    }
    return run_tiles_apart(tiles, blocks, threads);
  }

  // Each thread takes blocks of tiles.
  bool run_tiles_apart(int64_t tiles, int64_t blocks, int threads) const {
    const int64_t size = (tiles + blocks - 1) / blocks;
    const int64_t tile_plane = pad(size * layer.channels), sum_plane = pad(size * layer.filters);
    bool enough = true;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(&& : enough)
    for (int64_t job = 0; job < layer.groups * blocks; job++) {
      const int64_t group = job / blocks, block = job % blocks;
      const int64_t from = block * tiles / blocks, count = (block + 1) * tiles / blocks - from;
      float* values = tiles_scratch.at_least(POINTS * tile_plane);
      float* sums = sums_scratch.at_least(POINTS * sum_plane);
      enough = enough && values && sums;
      if (!values || !sums) continue;
      for (int64_t t = 0; t < count; t++)
        transform_input(group, from + t, values + t * layer.channels, tile_plane);
      multiply_tiles(group, values, tile_plane, count, 0, layer.filters, sums, sum_plane);
      for (int64_t t = 0; t < count; t++)
        transform_output(group, from + t, sums + t * layer.filters, sum_plane, 0, layer.filters);
    }
    return enough;
  }

  // Too few tiles for all threads: they share the transforms, and then each takes some of the filters.
  bool run_filters_apart(int64_t tiles, int threads) const {
    const int64_t tile_plane = pad(tiles * layer.channels), sum_plane = pad(tiles * PANEL);
    float* values = tiles_scratch.at_least(POINTS * tile_plane);
    if (!values) return false;
    bool enough = true;
    for (int64_t group = 0; group < layer.groups; group++) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
      for (int64_t t = 0; t < tiles; t++) transform_input(group, t, values + t * layer.channels, tile_plane);
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(&& : enough)
      for (int64_t f = 0; f < layer.filters; f += PANEL) {
        const int64_t filters = std::min(PANEL, layer.filters - f);
        float* sums = sums_scratch.at_least(POINTS * sum_plane);
        enough = enough && sums;
        if (!sums) continue;
        multiply_tiles(group, values, tile_plane, tiles, f, f + filters, sums, sum_plane);
        for (int64_t t = 0; t < tiles; t++) transform_output(group, t, sums + t * filters, sum_plane, f, filters);
      }
    }
    return enough;
  }
};

// (filters, channels, 3, 3) -> POINTS planes of panels of (channels, up to PANEL filters).
template <int TILE>
void pack(const float* weights, float* packed, int64_t filters, int64_t channels) {
  constexpr int SIDE = TILE + 2;
  for (int64_t f = 0; f < filters; f++) {
    const int64_t panel = f / PANEL * PANEL, width = std::min(PANEL, filters - panel);
    for (int64_t c = 0; c < channels; c++) {
      double w[9], t[3 * SIDE], u[SIDE * SIDE];
      for (int i = 0; i < 9; i++) w[i] = weights[(f * channels + c) * 9 + i];
      for (int j = 0; j < 3; j++) Form<TILE>::weights(w + j, 3, t + j, 3);
      for (int i = 0; i < SIDE; i++) Form<TILE>::weights(t + 3 * i, 1, u + SIDE * i, 1);
      for (int p = 0; p < SIDE * SIDE; p++)
        packed[p * filters * channels + panel * channels + c * width + f - panel] = static_cast<float>(u[p]);
    }
  }
}

}  // namespace

extern "C" {

int winograd_pack(int tile, const float* weights, float* packed, int64_t filters, int64_t channels) {
  if (tile == 4) pack<4>(weights, packed, filters, channels);
  if (tile == 2) pack<2>(weights, packed, filters, channels);
  return tile == 2 || tile == 4;
}

// 1 if it is done; 0 if the tile is unknown or there is no memory. `y` may be `other`, which none is where the maxima
// of 2x2 pixels are wanted.
int winograd_convolve(int tile, const float* x, const float* weights, const float* bias, const float* other, float* y,
                      const int64_t* sizes, int relu, int halved, int threads) {
  Layer layer{x, weights, bias, other, y, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7],
              0, 0, 0, 0, relu != 0, halved != 0};
  layer.out_height = layer.height + 2 * layer.top - 2;
  layer.out_width = layer.width + 2 * layer.left - 2;
  layer.tile_rows = (layer.out_height + tile - 1) / tile;
  layer.tile_columns = (layer.out_width + tile - 1) / tile;
  if (tile == 4) return Winograd<4>{layer}.run(threads);
  if (tile == 2) return Winograd<2>{layer}.run(threads);
  return 0;
}
}
