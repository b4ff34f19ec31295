// One head of K turned by one token's (cos, sin), in fp32.
#pragma once

#include <vector>

#include "simd.h"

namespace blend {

// One token's rotation, laid out for its pairing: halves keep cos and sin as they are; GPT-J
// pairs hold each cos twice and each sin as (-sin, +sin), so that out = x cos + swap(x) sin.
class Turn {
 public:
  Turn(int64_t rotary_dim, bool neox)
      : half_(rotary_dim / 2), neox_(neox), cos_(rotary_dim), sin_(rotary_dim) {}

  void set(const float* cos, const float* sin) {
    for (int64_t i = 0; i < half_; ++i) {
      if (neox_) {
        cos_[i] = cos[i], sin_[i] = sin[i];
      } else {
        cos_[2 * i] = cos_[2 * i + 1] = cos[i];
        sin_[2 * i] = -sin[i], sin_[2 * i + 1] = sin[i];
      }
    }
  }

  // For each rotated element of the head at `x`: emit_vector(i, value) or emit(i, value).
  template <typename T, typename EmitVector, typename Emit>
  void apply(const typename T::type* x, EmitVector&& emit_vector, Emit&& emit) const {
    const float *c = cos_.data(), *s = sin_.data();
    if (neox_) {
      int64_t i = 0;
      for (; i + W <= half_; i += W) {
        const vf a = T::read(x + i), b = T::read(x + half_ + i);
        const vf cos = load(c + i), sin = load(s + i);
        emit_vector(i, a * cos - b * sin);
        emit_vector(half_ + i, b * cos + a * sin);
      }
      for (; i < half_; ++i) {
        const float a = T::get(x + i), b = T::get(x + half_ + i);
        emit(i, a * c[i] - b * s[i]);
        emit(half_ + i, b * c[i] + a * s[i]);
      }
    } else {
      int64_t i = 0;
      for (; i + W <= 2 * half_; i += W) {
        const vf a = T::read(x + i);
        emit_vector(i, a * load(c + i) + swap_pairs(a) * load(s + i));
      }
      for (; i < 2 * half_; i += 2) {
        const float a = T::get(x + i), b = T::get(x + i + 1);
        emit(i, a * c[i] + b * s[i]);
        emit(i + 1, b * c[i + 1] + a * s[i + 1]);
      }
    }
  }

 private:
  int64_t half_;
  bool neox_;
  std::vector<float> cos_, sin_;
};

}  // namespace blend
