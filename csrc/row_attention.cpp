// Attention of gapped rows over paged keys, and the attention mass each key receives.
//
// Keys come in two runs, both ascending in position: the pool's, then the extras'. A row sees one
// contiguous part of each run, so no mask is ever built. Work is cut into items of (key head,
// chunk of rows x query heads of the group); an item walks the blocks of keys its rows see, packs
// each once, and multiplies it with tiles of rows, each tile cutting the block to what it sees.
// The scores of a tile never leave the cache, except for the mass: its tiles are kept until the
// rows' softmax is final, which spares a second product.
#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "attention_tile.h"

namespace blend {
namespace {

constexpr float LOG2E = 1.44269504f;
constexpr int64_t CHUNK = 16 * TILE;        // rows whose state stays in a core's L2
constexpr int64_t KEPT = int64_t{4} << 20;  // scores a thread may keep for the mass

constexpr int64_t BY_VALUE = 2;  // with_mass: times the length of the key's value, and plain

struct Span {
  int64_t low, high;
};

// One run of keys: where they lie, and what each row sees of them.
struct Run {
  Cache k, v;
  const int64_t* slots;
  int64_t keys;
  std::vector<Span> seen;  // per row

  // What rows [begin, end) see together. Both bounds ascend with the rows' positions.
  Span seen_by(int64_t begin, int64_t end) const { return {seen[begin].low, seen[end - 1].high}; }
};

struct Problem {
  Cache q, out;
  Run runs[2];
  int64_t rows, group, kv_heads, dim, value_dim;
  float scale, cap;
  bool with_mass;
  bool by_value;  // the mass counts a key as much as its value is long; the plain one follows
  const float* weights;  // per token row, of its part in the mass
  const float* sinks;    // per query head, or null

  int64_t masses() const { return with_mass ? runs[0].keys * (by_value ? 2 : 1) : 0; }
};

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats allocate(int64_t count) {
  const auto bytes = std::max<int64_t>(count, 1) * sizeof(float);
  return Floats(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
}

// One thread's buffers, for chunks of up to `chunk` rows.
struct Scratch {
  Floats q, out, keys, values, scores, mass;
  std::vector<float> peaks;  // per kept block and row: the peak its scores were taken against
  std::vector<Softmax> state;
  int64_t kept_blocks = 0;

  Scratch(const Problem& p, int64_t chunk) : state(chunk) {
    q = allocate(chunk * p.dim);
    out = allocate(chunk * padded(p.value_dim));
    keys = allocate(BK * p.dim);
    values = allocate(BK * round_up(p.value_dim, NR));
    const int64_t pool_keys = p.runs[0].keys;
    kept_blocks = p.with_mass ? (pool_keys + BK - 1) / BK : 0;
    scores = allocate((kept_blocks * chunk + TILE) * BK);
    peaks.resize(kept_blocks * chunk);
    if (p.with_mass) {
      mass = allocate(p.masses());
      std::fill_n(mass.get(), p.masses(), 0.0f);
    }
  }

  static int64_t padded(int64_t dim) { return round_up(dim, W); }
};

// Rows of one item: `count` (token row, query head) pairs from token row `first` on.
struct Item {
  int64_t head, first, tokens;
};

template <typename T>
void pack_queries(const Problem& p, const Item& item, float* to) {
  const int64_t count = item.tokens * p.group;
  const float scale = p.cap > 0 ? p.scale / p.cap : p.scale * LOG2E;
  for (int64_t i = 0; i < round_up(count, MR); ++i) {
    float* column = to + i / MR * MR * p.dim + i % MR;
    if (i >= count) {
      for (int64_t d = 0; d < p.dim; ++d) column[d * MR] = 0;
      continue;
    }
    const auto* from = p.q.at<T>(item.first + i / p.group, item.head * p.group + i % p.group);
    for (int64_t d = 0; d < p.dim; ++d) column[d * MR] = T::get(from + d) * scale;
  }
}

template <typename T>
void write_rows(const Problem& p, const Item& item, const Scratch& s) {
  const int64_t stride = Scratch::padded(p.value_dim);
  for (int64_t i = 0; i < item.tokens * p.group; ++i) {
    const float total = s.state[i].total;
    const float inverse = total > 0 ? 1.0f / total : (total == 0 ? 0.0f : total);
    const float* from = s.out.get() + i * stride;
    auto* to = p.out.at<T>(item.first + i / p.group, item.head * p.group + i % p.group);
    int64_t d = 0;
    for (; d + W <= p.value_dim; d += W) T::write(to + d, load(from + d) * inverse);
    for (; d < p.value_dim; ++d) T::put(to + d, from[d] * inverse);
  }
}

// What tile [first, first + count) of the item's rows sees of keys [block, block + BK) of a run,
// relative to the block.
Span tile_span(const Problem& p, const Item& item, const Run& run, int64_t first, int64_t count,
               int64_t block, int64_t keys) {
  const int64_t begin = item.first + first / p.group;
  const int64_t end = item.first + (first + count - 1) / p.group + 1;
  const Span seen = run.seen_by(begin, end);
  return {std::max<int64_t>(seen.low - block, 0), std::min(seen.high - block, keys)};
}

// One tile against one packed block.
void attend_tile(const Problem& p, const Item& item, const Run& run, Scratch& s, float* scores,
                 float* peaks, int64_t first, int64_t count, int64_t block, Span span) {
  const int64_t begin = span.low / W * W, end = round_up(span.high, W);
  const int64_t groups = (count + MR - 1) / MR;
  for (int64_t strip = begin / NR; strip * NR < end; ++strip) {
    const int64_t vectors = std::min<int64_t>(NV, (end - strip * NR + W - 1) / W);
    const float* keys = s.keys.get() + strip * p.dim * NR;
    for (int64_t g = 0; g < groups; ++g) {
      const float* q = s.q.get() + (first + g * MR) * p.dim;
      product_of<1, MR, false>(vectors, q, keys, scores + g * MR * BK + strip * NR, p.dim, BK);
    }
  }
  const int64_t stride = Scratch::padded(p.value_dim);
  for (int64_t i = 0; i < count; ++i) {
    float* row = scores + i * BK;
    if (p.cap > 0) soft_cap(row, begin, end, p.cap * LOG2E);
    const Span seen = run.seen[item.first + (first + i) / p.group];
    const int64_t low = std::max(seen.low - block, span.low);
    const int64_t high = std::min(seen.high - block, span.high);
    const float factor = soften(row, begin, end, low, high, s.state[first + i]);
    if (peaks) peaks[first + i] = s.state[first + i].peak;
    if (factor == 1.0f) continue;
    float* out = s.out.get() + (first + i) * stride;
    for (int64_t d = 0; d < stride; d += W) store(out + d, load(out + d) * factor);
  }
  for (int64_t d = 0; d < p.value_dim; d += NR) {
    const int64_t vectors = std::min<int64_t>(NV, (stride - d) / W);
    const float* values = s.values.get() + (d / NR * BK + span.low) * NR;
    for (int64_t g = 0; g < groups; ++g) {
      product_of<BK, 1, true>(vectors, scores + g * MR * BK + span.low, values,
                              s.out.get() + (first + g * MR) * stride + d, span.high - span.low,
                              stride);
    }
  }
}

// The length of the value of pool key `j` in `head`.
template <typename T>
float length_of(const Run& run, int64_t j, int64_t head) {
  const typename T::type* value = run.v.at<T>(run.slots[j], head);
  vf lanes{};
  float rest = 0;
  int64_t i = 0;
  for (; i + W <= run.v.dim; i += W) {
    const vf x = T::read(value + i);
    lanes += x * x;
  }
  for (; i < run.v.dim; ++i) rest += T::get(value + i) * T::get(value + i);
  return std::sqrt(sum(lanes) + rest);
}

// mass[j] += weighted sum over the item's rows of the final probability of key j, from the kept
// tiles; where the length of its value counts, times it, and the plain sum behind all keys'.
template <typename T>
void add_mass(const Problem& p, const Item& item, Scratch& s, int64_t chunk, int64_t start,
              int64_t stop) {
  const Run& run = p.runs[0];
  const int64_t count = item.tokens * p.group;
  for (int64_t block = start, b = 0; block < stop; block += BK, ++b) {
    float lengths[BK];
    for (int64_t j = 0; j < BK; ++j) {
      const bool counts = p.by_value && block + j < stop;
      lengths[j] = counts ? length_of<T>(run, block + j, item.head) : 1.0f;
    }
    for (int64_t first = 0; first < count; first += TILE) {
      const int64_t size = std::min<int64_t>(TILE, count - first);
      const Span span =
          tile_span(p, item, run, first, size, block, std::min<int64_t>(BK, stop - block));
      if (span.low >= span.high) continue;
      float* mass = s.mass.get() + block;
      float sums[BK] = {};
      const int64_t begin = span.low / W * W, end = round_up(span.high, W);
      for (int64_t i = 0; i < size; ++i) {
        const Softmax& row = s.state[first + i];
        if (!(row.total > 0) || s.peaks[b * chunk + first + i] == NEVER) continue;
        const float part = p.weights[item.first + (first + i) / p.group];
        if (part == 0) continue;
        const float weight =
            part * std::exp2(s.peaks[b * chunk + first + i] - row.peak) / row.total;
        const float* scores = s.scores.get() + (b * chunk + first + i) * BK;
        for (int64_t j = begin; j < end; j += W) {
          store(sums + j, load(sums + j) + load(scores + j) * weight);
        }
      }
      for (int64_t j = span.low; j < span.high; ++j) mass[j] += sums[j] * lengths[j];
      if (!p.by_value) continue;
      for (int64_t j = span.low; j < span.high; ++j) mass[run.keys + j] += sums[j];
    }
  }
}

template <typename T, typename TQ>
void attend(const Problem& p, const Item& item, Scratch& s, int64_t chunk) {
  const int64_t count = item.tokens * p.group;
  pack_queries<TQ>(p, item, s.q.get());
  std::fill_n(s.out.get(), round_up(count, MR) * Scratch::padded(p.value_dim), 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    // A sink is a score that each row has seen before any key; its value is zero.
    s.state[i] =
        p.sinks ? Softmax{p.sinks[item.head * p.group + i % p.group] * LOG2E, 1.0f} : Softmax{};
  }
  for (const Run& run : p.runs) {
    if (run.keys == 0) continue;
    const bool keep = p.with_mass && &run == &p.runs[0];
    const Span seen = run.seen_by(item.first, item.first + item.tokens);
    for (int64_t block = seen.low, b = 0; block < seen.high; block += BK, ++b) {
      const int64_t keys = std::min<int64_t>(BK, seen.high - block);
      pack_keys<T>(run.k, run.slots + block, keys, item.head, s.keys.get());
      if (p.value_dim > 0)
        pack_values<T>(run.v, run.slots + block, keys, item.head, s.values.get());
      for (int64_t first = 0; first < count; first += TILE) {
        const int64_t size = std::min<int64_t>(TILE, count - first);
        const Span span = tile_span(p, item, run, first, size, block, keys);
        if (span.low >= span.high) continue;
        // What is not kept goes behind the last block.
        const int64_t place = keep ? b * chunk + first : s.kept_blocks * chunk;
        float* scores = s.scores.get() + place * BK;
        float* peaks = keep ? s.peaks.data() + b * chunk : nullptr;
        attend_tile(p, item, run, s, scores, peaks, first, size, block, span);
      }
    }
  }
  if (p.value_dim > 0) write_rows<TQ>(p, item, s);
  if (p.with_mass && p.runs[0].keys > 0) {
    const Span seen = p.runs[0].seen_by(item.first, item.first + item.tokens);
    add_mass<T>(p, item, s, chunk, seen.low, seen.high);
  }
}

// Rows per chunk: as many as the cache holds, fewer when threads would stand idle or the kept
// scores would grow too large; whole tiles of whole token rows where the group allows it.
int64_t tokens_per_chunk(const Problem& p, int64_t threads) {
  int64_t rows = CHUNK;
  const int64_t fair = p.rows * p.group * p.kv_heads / (2 * threads);
  rows = std::min(rows, std::max<int64_t>(fair / TILE * TILE, TILE));
  if (p.with_mass) {
    const int64_t fits = KEPT / (p.runs[0].keys + 2 * BK);
    rows = std::min(rows, std::max<int64_t>(fits / TILE * TILE, TILE));
  }
  return std::max<int64_t>(rows / p.group, 1);
}

template <typename T, typename TQ>
void run_all(const Problem& p, float* mass, int64_t threads) {
  const int64_t tokens = tokens_per_chunk(p, threads);
  const int64_t chunk = round_up(tokens * p.group, TILE);
  std::vector<Item> items;
  // Late rows see most keys: largest items first, so that threads finish together.
  for (int64_t c = (p.rows - 1) / tokens; c >= 0; --c) {
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      items.push_back({h, c * tokens, std::min(tokens, p.rows - c * tokens)});
    }
  }
  const int64_t total = items.size();
  threads = std::min(threads, total);
  std::vector<Scratch> scratch;
  for (int64_t t = 0; t < threads; ++t) scratch.emplace_back(p, chunk);
  if (p.with_mass) {
    // Fixed shares: which thread sums which item must not change from run to run, or equal
    // inputs could select different rows.
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t t = 0; t < threads; ++t) {
      for (int64_t i = t; i < total; i += threads) attend<T, TQ>(p, items[i], scratch[t], chunk);
    }
    for (const Scratch& s : scratch) {
      for (int64_t j = 0; j < p.masses(); ++j) mass[j] += s.mass[j];
    }
  } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < total; ++i) {
      attend<T, TQ>(p, items[i], scratch[omp_get_thread_num()], chunk);
    }
  }
}

// Pool keys at kv_pos0, kv_pos0 + 1, ...
void see_pool(Run& run, const int64_t* q_pos, int64_t rows, int64_t window, int64_t kv_pos0) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = q_pos[r] - kv_pos0;
    const int64_t high = std::clamp<int64_t>(at + 1, 0, run.keys);
    run.seen.push_back({window < 0 ? 0 : std::clamp<int64_t>(at - window, 0, high), high});
  }
}

// Extra keys at ascending positions `pos`.
void see_extras(Run& run, const int64_t* pos, const int64_t* q_pos, int64_t rows, int64_t window) {
  const int64_t* end = pos + run.keys;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t high = std::upper_bound(pos, end, q_pos[r]) - pos;
    const int64_t low = window < 0 ? 0 : std::lower_bound(pos, end, q_pos[r] - window) - pos;
    run.seen.push_back({std::min(low, high), high});
  }
}

void row_attention(TensorView q_t, TensorView k_t, TensorView v_t, TensorView slots_t,
                   TensorView extra_k_t, TensorView extra_v_t, TensorView order_t,
                   TensorView extra_pos_t, TensorView q_pos_t, TensorView out_t, TensorView mass_t,
                   TensorView weights_t, TensorView sinks_t, double scale, int64_t window,
                   double cap, int64_t kv_pos0, int64_t with_mass, int64_t threads) {
  const int64_t keys = slots_t.numel(), extras = order_t.numel();
  Problem p{Cache(q_t, "q: expected [R, Hq, D]"),
            Cache(out_t, "out: expected [R, Hq, Dv]"),
            {Run{Cache(k_t, "k_cache: expected [n, Hk, D]"),
                 Cache(v_t, "v_cache: expected [n, Hk, Dv]"),
                 indices(slots_t, keys, "kv_slots: expected int64 [S]"),
                 keys,
                 {}},
             Run{Cache(extra_k_t, "k_extra: expected [E, Hk, D]"),
                 Cache(extra_v_t, "v_extra: expected [E, Hk, Dv]"),
                 indices(order_t, extras, "extra order: expected int64 [E]"),
                 extras,
                 {}}},
            0,
            0,
            0,
            0,
            0,
            (float)scale,
            (float)cap,
            with_mass != 0,
            with_mass == BY_VALUE,
            nullptr,
            nullptr};
  p.rows = p.q.tokens, p.dim = p.q.dim, p.value_dim = p.out.dim;
  p.kv_heads = p.runs[0].k.heads;
  expect(p.kv_heads > 0 && p.dim > 0 && p.q.heads % p.kv_heads == 0, "q heads over key heads");
  p.group = p.q.heads / p.kv_heads;
  expect(p.out.tokens == p.rows && p.out.heads == p.q.heads, "out does not fit q");
  for (const Run& run : p.runs) {
    expect(run.k.heads == p.kv_heads && run.k.dim == p.dim && run.v.heads == p.kv_heads &&
               run.v.dim == p.value_dim,
           "keys, values and queries differ in heads or head size");
    const int64_t stored = p.value_dim > 0 ? std::min(run.k.tokens, run.v.tokens) : run.k.tokens;
    expect_inside(run.slots, run.keys, stored, "a slot lies outside its cache");
  }
  const int64_t* q_pos = indices(q_pos_t, p.rows, "q_pos: expected int64 [R]");
  expect(std::is_sorted(q_pos, q_pos + p.rows), "q_pos must be ascending");
  const int64_t* extra_pos = indices(extra_pos_t, extras, "extra_pos: expected int64 [E]");
  expect(std::is_sorted(extra_pos, extra_pos + extras), "extra_pos must be ascending");
  float* mass = floats(mass_t, p.masses(), "mass: expected float32 [S], by value [2 S]");
  p.weights = floats(weights_t, with_mass ? p.rows : 0, "row weights: expected float32 [R]");
  if (sinks_t.numel() > 0) p.sinks = floats(sinks_t, p.q.heads, "sinks: expected float32 [Hq]");
  if (p.rows == 0 || p.group == 0) return;
  see_pool(p.runs[0], q_pos, p.rows, window, kv_pos0);
  see_extras(p.runs[1], extra_pos, q_pos, p.rows, window);
  threads = std::max<int64_t>(threads, 1);
  by_pool_dtype(k_t, [&](auto type) {
    by_dtype(q_t,
             [&](auto q_type) { run_all<decltype(type), decltype(q_type)>(p, mass, threads); });
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_attention, row_attention);

}  // namespace blend
