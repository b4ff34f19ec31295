// Every kernel once on a small case, or a small kernel with a planted fault: for compute-sanitizer,
// without Python, which would take it minutes. With BLEND_EMULATED, g++ makes it for the emulator.
//
//     selftest kernels | fault NUMBER | out-of-bounds | not-set    [ORDER EARLY, of the emulator]
//
// Ends with 0: right results; 1: the machine has found a fault; 2: other results.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/faults.cuh"
#include "cuda/attention_mass.cuh"
#include "cuda/deltas.cuh"
#include "cuda/deviation.cuh"
#include "cuda/gather.cuh"
#include "cuda/latent_attention.cuh"
#include "cuda/rotate_scatter.cuh"
#include "cuda/row_attention.cuh"
#include "cuda/select.cuh"

namespace {

void require(bool fine, const char* what) {
  if (!fine) throw std::logic_error(what);
}

// All that was launched is done, and nothing was wrong with it.
void finish() {
#if !defined(BLEND_EMULATED)
  const cudaError_t code = cudaDeviceSynchronize();
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
#endif
  if (const char* what = launch_error()) throw std::runtime_error(what);
}

// Of the device; `given` values, or `n` that are not set.
template <typename T>
class Memory {
 public:
  explicit Memory(size_t n) : n_(n) {
    const size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
#if defined(BLEND_EMULATED)
    at_ = static_cast<T*>(std::aligned_alloc(64, bytes));
#else
    void* at = nullptr;
    if (cudaMalloc(&at, bytes) != cudaSuccess) throw std::runtime_error("cudaMalloc");
    at_ = static_cast<T*>(at);
#endif
  }
  explicit Memory(const std::vector<T>& given) : Memory(given.size()) {
#if defined(BLEND_EMULATED)
    std::memcpy(at_, given.data(), n_ * sizeof(T));
#else
    cudaMemcpy(at_, given.data(), n_ * sizeof(T), cudaMemcpyHostToDevice);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
#if defined(BLEND_EMULATED)
    std::free(at_);
#else
    cudaFree(at_);
#endif
  }
  T* at() const { return at_; }
  char* bytes() const { return reinterpret_cast<char*>(at_); }
  std::vector<T> read() const {
    finish();
    std::vector<T> out(n_);
#if defined(BLEND_EMULATED)
    std::memcpy(out.data(), at_, n_ * sizeof(T));
#else
    cudaMemcpy(out.data(), at_, n_ * sizeof(T), cudaMemcpyDeviceToHost);
#endif
    return out;
  }

 private:
  T* at_;
  size_t n_;
};

constexpr int SLOTS = 150, TOKENS = 70, HEADS = 2, DIM = 64, SLOT = HEADS * DIM;

std::vector<int64_t> from(int64_t first, int64_t n) {
  std::vector<int64_t> out(n);
  for (int64_t i = 0; i < n; ++i) out[i] = first + i;
  return out;
}

// bf16 of small whole numbers: exact.
std::vector<__nv_bfloat16> pool(int seed) {
  std::vector<__nv_bfloat16> out(size_t(SLOTS) * SLOT);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = __float2bfloat16(static_cast<float>(int((i * 7 + seed) % 31) - 15));
  }
  return out;
}

float value(const std::vector<__nv_bfloat16>& pool, int64_t slot, int i) {
  return __bfloat162float(pool[slot * SLOT + i]);
}

// A turn by 90 degrees: halves change places, one of them its sign.
void copies() {
  const auto keys = pool(0), values = pool(3);
  const Memory<__nv_bfloat16> k(keys), v(values);
  const Memory<int64_t> src(from(1, TOKENS)), dst(from(1 + TOKENS, TOKENS));
  const Memory<float> cos(std::vector<float>(TOKENS * DIM / 2, 0.0f)),
      sin(std::vector<float>(TOKENS * DIM / 2, 1.0f));
  std::vector<uint8_t> run(TOKENS, 0);
  run[5] = 1;
  const Memory<uint8_t> runs(run);
  const int64_t stride = SLOT * sizeof(__nv_bfloat16);
  rotate_scatter<__nv_bfloat16>({k.bytes(), v.bytes(), src.at(), stride, stride, nullptr, 0},
                                {k.bytes(), v.bytes(), dst.at(), stride, stride, runs.at()},
                                {cos.at(), sin.at()}, Bias{}, {HEADS, DIM, DIM, DIM}, TOKENS, true,
                                0, nullptr);
  const auto k_now = k.read(), v_now = v.read();
  for (int64_t t = 0; t < TOKENS; ++t) {
    const int64_t slot = 1 + TOKENS + t, old = run[t] ? slot : 1 + t;
    for (int i = 0; i < SLOT; ++i) {
      require(value(v_now, slot, i) == value(values, old, i), "rotate_scatter: V");
      const int half = i % DIM < DIM / 2 ? DIM / 2 : -DIM / 2;
      const float turned = half > 0 ? -value(keys, old, i + half) : value(keys, old, i + half);
      const float wanted = run[t] ? value(keys, old, i) : turned;
      require(value(k_now, slot, i) == wanted, "rotate_scatter: K");
    }
  }
}

void deviations() {
  const auto values = pool(1);
  const Memory<__nv_bfloat16> v(values);
  const Memory<int64_t> src(from(1, TOKENS)), fresh(from(1 + TOKENS, TOKENS));
  const Memory<float> out(size_t{TOKENS});
  Deviation p{};
  p.v = v.bytes(), p.fresh = fresh.at(), p.src = src.at(), p.out = out.at();
  p.v_stride = SLOT * sizeof(__nv_bfloat16);
  p.heads = HEADS, p.v_dim = DIM, p.n = TOKENS;
  deviation<__nv_bfloat16>(p, true, nullptr);
  const auto now = out.read();
  for (int64_t t = 0; t < TOKENS; ++t) {
    float sum = 0;
    for (int i = 0; i < SLOT; ++i) {
      const float apart = value(values, 1 + t, i) - value(values, 1 + TOKENS + t, i);
      sum += apart * apart;
    }
    require(now[t] == sum, "deviation");
  }
}

// Two documents' tokens, whose K is turned by 90 degrees where it is fresh and not at all
// elsewhere.
void means() {
  constexpr int DOCUMENTS = 2;
  const auto keys = pool(2), values = pool(4);
  const Memory<__nv_bfloat16> k(keys), v(values);
  const int64_t bounds_of[] = {0, 30, TOKENS};
  const Memory<int64_t> fresh(from(1, TOKENS)), old(from(1 + TOKENS, TOKENS)),
      bounds(std::vector<int64_t>(bounds_of, bounds_of + 3));
  const Memory<float> zero(std::vector<float>(TOKENS * DIM / 2, 0.0f)),
      one(std::vector<float>(TOKENS * DIM / 2, 1.0f)), scale(std::vector<float>{1.0f, 2.0f}),
      out_k(size_t{DOCUMENTS * SLOT}), out_v(size_t{DOCUMENTS * SLOT});
  const int64_t stride = SLOT * sizeof(__nv_bfloat16);
  const Kept kept{k.bytes(), v.bytes(), stride, stride};
  Deltas p{};
  p.fresh = {kept, fresh.at(), zero.at(), one.at()};
  p.old = {kept, old.at(), one.at(), zero.at()};
  p.bounds = bounds.at(), p.scale = scale.at(), p.k = out_k.at(), p.v = out_v.at();
  p.heads = HEADS, p.dim = p.v_dim = p.rotary_dim = DIM;
  deltas<__nv_bfloat16>(p, DOCUMENTS, true, nullptr);
  const auto of_k = out_k.read(), of_v = out_v.read();
  for (int d = 0; d < DOCUMENTS; ++d) {
    for (int i = 0; i < SLOT; ++i) {
      const int half = i % DIM < DIM / 2 ? DIM / 2 : -DIM / 2;
      float sum_k = 0, sum_v = 0;
      for (int64_t t = bounds_of[d]; t < bounds_of[d + 1]; ++t) {
        const float turned = value(keys, 1 + t, i + half);
        sum_k += (half > 0 ? -turned : turned) - value(keys, 1 + TOKENS + t, i);
        sum_v += value(values, 1 + t, i) - value(values, 1 + TOKENS + t, i);
      }
      require(of_k[d * SLOT + i] == sum_k * (d + 1), "deltas: K");
      require(of_v[d * SLOT + i] == sum_v * (d + 1), "deltas: V");
    }
  }
}

// Tokens as one chunk of one layer, and every second one by its address.
void gathers() {
  const auto keys = pool(4), values = pool(5);
  const Memory<__nv_bfloat16> k(keys), v(values);
  const int64_t bytes = SLOT * sizeof(__nv_bfloat16);
  const Words words{SLOT / 8, SLOT / 8};
  const auto at = [](const Memory<__nv_bfloat16>& pool) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pool.at()));
  };
  const Memory<int64_t> slots(from(3, TOKENS)), chunk(std::vector<int64_t>{0, TOKENS, 0}),
      layers(std::vector<int64_t>{at(k), at(v), bytes, bytes});
  const Memory<__nv_bfloat16> out(size_t{2 * TOKENS * SLOT}), some_k(size_t{TOKENS / 2 * SLOT}),
      some_v(size_t{TOKENS / 2 * SLOT});
  gather({layers.at(), 1, slots.at(), chunk.at(), out.bytes(), words}, 1, TOKENS, nullptr);
  std::vector<int64_t> place(4 * TOKENS, 0), which(TOKENS / 2);
  for (int64_t t = 0; t < TOKENS; ++t) {
    place[t] = at(k) + t * bytes, place[TOKENS + t] = at(v) + t * bytes;
    if (t % 2) which[t / 2] = t;
  }
  const Memory<int64_t> places(place), index(which);
  take({places.at(), TOKENS, 0, index.at(), TOKENS / 2, some_k.bytes(), some_v.bytes(), words}, 2,
       nullptr);
  const auto all = out.read(), of_k = some_k.read(), of_v = some_v.read();
  for (int64_t t = 0; t < TOKENS; ++t) {
    for (int i = 0; i < SLOT; ++i) {
      require(value(all, t, i) == value(keys, 3 + t, i), "gather: K");
      require(value(all, TOKENS + t, i) == value(values, 3 + t, i), "gather: V");
      if (t % 2 == 0) continue;
      require(value(of_k, t / 2, i) == value(keys, t, i), "take: K");
      require(value(of_v, t / 2, i) == value(values, t, i), "take: V");
    }
  }
}

// Two segments; scores rise in the first and fall in the second.
void choices() {
  const int64_t n[2] = {700, 40}, k[2] = {33, 8};
  std::vector<float> score(n[0] + n[1]);
  for (int64_t i = 0; i < n[0] + n[1]; ++i) score[i] = i < n[0] ? float(i) : float(-i);
  const Memory<float> scores(score);
  const Memory<int64_t> segments(std::vector<int64_t>{0, n[0], k[0], 0, n[0], n[1], k[1], k[0]});
  const Memory<int64_t> chosen(k[0] + k[1]), rest(n[0] + n[1] - k[0] - k[1]);
  const Memory<uint8_t> runs(n[0] + n[1]);
  select({scores.at(), segments.at(), chosen.at(), rest.at(), runs.at()}, 2, n[0], nullptr);
  const auto now = chosen.read(), others = rest.read();
  const auto flags = runs.read();
  for (int64_t i = 0; i < k[0]; ++i) require(now[i] == n[0] - k[0] + i, "select: chosen");
  for (int64_t i = 0; i < k[1]; ++i) require(now[k[0] + i] == i, "select: chosen");
  for (int64_t i = 0; i < n[0] - k[0]; ++i) require(others[i] == i, "select: rest");
  for (int64_t i = 0; i < n[0]; ++i) require(flags[i] == (i >= n[0] - k[0]), "select: runs");
}

constexpr int ROWS = 40, GROUP = 2;

// Queries of the pool's first tokens.
std::vector<__nv_bfloat16> queries(const std::vector<__nv_bfloat16>& pool) {
  return {pool.begin(), pool.begin() + ROWS * GROUP * SLOT};
}

Head head_of(const Memory<__nv_bfloat16>& pool, const int64_t* slots) {
  constexpr int64_t SIZE = sizeof(__nv_bfloat16);
  return {pool.bytes(), slots, SLOT * SIZE, DIM * SIZE, DIM, KeyType::SAME};
}

// Every key is attended to alike where the scale is 0; by value it counts as much as it is long.
void masses() {
  const auto keys = pool(2);
  const Memory<__nv_bfloat16> k(keys), q(queries(keys));
  const Memory<int64_t> slots(from(1, TOKENS)), rows(from(TOKENS, ROWS));
  const Memory<float> lse(std::vector<float>(ROWS * GROUP * HEADS, std::log(float(TOKENS)))),
      weights(std::vector<float>(ROWS, 1.0f)), out(std::vector<float>(HEADS * TOKENS, 0.0f)),
      late(std::vector<float>(HEADS * TOKENS, 0.0f));
  Mass p{};
  p.q = q.at(), p.k = p.v = head_of(k, slots.at()), p.row_pos = rows.at();
  p.lse = lse.at(), p.weights = weights.at(), p.mass = out.at(), p.late = late.at();
  p.q_row = GROUP * SLOT, p.q_head = DIM, p.value_unit = 0.5f;
  p.window = -1, p.n = TOKENS, p.rows = ROWS, p.heads = GROUP * HEADS, p.group = GROUP;
  attention_mass<__nv_bfloat16, DIM>(p, nullptr);
  const auto valued = out.read(), plain = late.read();
  const float all = float(ROWS * GROUP) / TOKENS;
  for (int i = 0; i < HEADS * TOKENS; ++i) {
    float norm = 0;
    for (int d = 0; d < DIM; ++d) {
      const float x = value(keys, 1 + i % TOKENS, i / TOKENS * DIM + d);
      norm += x * x;
    }
    require(std::fabs(plain[i] - all) < 1e-3f, "attention_mass");
    require(std::fabs(valued[i] / (all * std::sqrt(norm) / 2) - 1) < 1e-3f, "mass by value");
  }
}

// So is the mean of the values that a row sees, in two parts of the keys that are joined. A scale
// of 0 would make what is hidden, minus infinity, NaN.
void rows() {
  constexpr int HEADS_Q = GROUP * HEADS, CELLS = ROWS * HEADS_Q, PARTS = 2;
  const auto keys = pool(2), values = pool(6);
  const Memory<__nv_bfloat16> k(keys), v(values), q(queries(keys)), out(size_t{CELLS * DIM});
  const Memory<int64_t> slots(from(1, TOKENS)), at(from(TOKENS - ROWS, ROWS)),
      tiles(std::vector<int64_t>{0, ROWS, 0, TOKENS, 0, 0, ROWS, 0, TOKENS, ROW_TILE});
  const Memory<float> part_out(size_t{PARTS * CELLS * DIM}), part_lse(size_t{PARTS * CELLS});
  Rows p{};
  p.q = q.at(), p.k = head_of(k, slots.at()), p.v = head_of(v, slots.at());
  p.part_out = part_out.at(), p.part_lse = part_lse.at();
  p.tiles = tiles.at(), p.row_pos = at.at(), p.q_row = GROUP * SLOT, p.q_head = DIM;
  p.window = -1, p.rows = ROWS, p.heads = HEADS_Q, p.group = GROUP, p.dim = DIM, p.parts = PARTS;
  p.scale_log2 = 1e-9f;
  row_attention<__nv_bfloat16, DIM>(p, 2, nullptr);
  p.out = out.at();
  join_parts<__nv_bfloat16>(p, nullptr);
  const auto now = out.read();
  for (int i = 0; i < CELLS * DIM; ++i) {
    const int row = i / (HEADS_Q * DIM), head = i / DIM % HEADS_Q / GROUP;
    const int seen = TOKENS - ROWS + row + 1;
    float off = __bfloat162float(now[i]);
    for (int t = 0; t < seen; ++t) off -= value(values, 1 + t, head * DIM + i % DIM) / seen;
    require(std::fabs(off) < 0.1f, "row_attention");
  }
}

// The same of one head of latents, whose first columns are the values.
void latents() {
  constexpr int CELLS = ROWS * GROUP, VALUE = 48;
  const auto keys = pool(4);
  const Memory<__nv_bfloat16> k(keys), q(queries(keys)), out(size_t{CELLS * VALUE});
  const Memory<int64_t> slots(from(1, TOKENS)), at(from(TOKENS - ROWS, ROWS)),
      tiles(std::vector<int64_t>{0, ROWS, 0, TOKENS, 0});
  Rows p{q.at(), head_of(k, slots.at())};
  p.v.dim = VALUE, p.out = out.at(), p.tiles = tiles.at(), p.row_pos = at.at();
  p.q_row = SLOT, p.q_head = p.dim = DIM, p.window = -1, p.scale_log2 = 1e-9f;
  p.rows = ROWS, p.heads = p.group = GROUP, p.parts = 1;
  latent_attention<__nv_bfloat16>(p, 1, most_shared(0), nullptr);
  const auto now = out.read();
  for (int i = 0; i < CELLS * VALUE; ++i) {
    const int seen = TOKENS - ROWS + i / (GROUP * VALUE) + 1;
    float off = __bfloat162float(now[i]);
    for (int t = 0; t < seen; ++t) off -= value(keys, 1 + t, i % VALUE) / seen;
    require(std::fabs(off) < 0.1f, "latent_attention");
  }
}

template <int FAULT = NONE>
void fault(int number) {
  if (number == FAULT) {
    constexpr int STEPS = 4;
    constexpr bool SUMS = FAULT >= SHUFFLE_OF_HALF_A_WARP;
    std::vector<float> given(SUMS ? 64 : STEPS * 256);
    for (size_t i = 0; i < given.size(); ++i) given[i] = float(i % 17);
    const Memory<float> x(given), out(size_t{64});
    if (SUMS) {
      launch(warp_sum<FAULT>, Extent{1}, Extent{64}, 8, nullptr, x.at(), out.at());
    } else {
      launch(pipeline<FAULT>, Extent{1}, Extent{64}, 2048, nullptr, x.at(), out.at(), STEPS);
    }
    const auto now = out.read();
    for (int i = 0; i < 64; ++i) {
      float wanted = 0;
      for (int j = 0; j < (SUMS ? 32 : 4 * STEPS); ++j) {
        wanted += SUMS ? given[i / 32 * 32 + j] : given[j / 4 * 256 + (i + 32) % 64 * 4 + j % 4];
      }
      require(now[i] == wanted, "results with the fault are others");
    }
  } else if constexpr (FAULT + 1 < FAULTS) {
    fault<FAULT + 1>(number);
  }
}

#if !defined(BLEND_EMULATED)
// For memcheck and initcheck: of memory that is the device's own.
__global__ void add_next(const float* x, float* out) {
  out[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x + 1];
}

void of_memory(bool set) {
  const Memory<float> given(std::vector<float>(64, 1.0f)), unset(size_t{128}), out(size_t{32});
  launch(add_next, Extent{1}, Extent{32}, 0, nullptr, set ? given.at() + 48 : unset.at(), out.at());
  out.read();
}
#endif

void run(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "kernels";
#if defined(BLEND_EMULATED)
  if (count > 3) {
    emulator::settings = {std::atoi(words[count - 2]), std::atoi(words[count - 1]) != 0};
  }
#else
  if (what == "out-of-bounds" || what == "not-set") return of_memory(what == "out-of-bounds");
#endif
  if (what == "fault") return fault(std::atoi(words[2]));
  copies(), gathers(), deviations(), means(), choices(), masses(), rows(), latents();
}

}  // namespace

int main(int count, char** words) {
  try {
    run(count, words);
  } catch (const std::logic_error& error) {
    std::printf("%s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::puts("right");
  return 0;
}
