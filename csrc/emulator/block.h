// A block of CUDA threads on one CPU thread. Made to find faults, not to be fast.
//
// A thread runs until it waits: in a collective of its warp (a shuffle, ldmatrix, mma) or in
// __syncthreads. Between two waits threads run one after another, lanes and warps in an order that
// is chosen: forward, reverse, or shuffled by a seed. Shared memory begins as NaN. What a kernel
// may not do ends the launch with block, thread and place.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulator {

constexpr int WARP = 32;
constexpr size_t CELL = 64;  // bytes that a lane can give to a collective

// How the next launches run. order: 0 forward, 1 reverse, others: the seed of a shuffle. An
// asynchronous copy may arrive at any time between its issue and the wait for it: early_copies is
// the one end, late ones the other. The first finds missing barriers behind the use of a stage, the
// second missing waits and barriers before it.
struct Settings {
  int order = 0;
  bool early_copies = false;
};
inline Settings settings;

struct Counts {
  long switches = 0, collectives = 0, barriers = 0, launches = 0;
};
inline Counts counts;

struct Cells {
  alignas(64) unsigned char in[WARP][CELL];
  alignas(64) unsigned char out[WARP][CELL];
  template <typename T>
  T of(int lane) const {
    static_assert(sizeof(T) <= CELL);
    T value;
    std::memcpy(&value, out[lane], sizeof(T));
    return value;
  }
};

struct Size {
  int x = 1, y = 1, z = 1;
  long count() const { return long(x) * y * z; }
};

class Block;
inline Block* block = nullptr;  // that runs
inline Fiber* self = nullptr;   // its thread that runs

class Block {
 public:
  const Size threads, blocks;
  Size id;

  Block(Size threads_, Size blocks_, size_t shared, void (*kernel)(void*), void* arguments)
      : threads(threads_),
        blocks(blocks_),
        kernel_(kernel),
        arguments_(arguments),
        fibers_(threads_.count()),
        cells_((threads_.count() + WARP - 1) / WARP),
        shared_(shared + ALIGNMENT),
        random_(settings.order) {
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& f = fibers_[i];
      f.x = i % threads.x, f.y = i / threads.x % threads.y, f.z = i / (threads.x * threads.y);
      f.warp = i / WARP, f.lane = i % WARP;
    }
  }

  unsigned char* shared() {
    const auto at = reinterpret_cast<uintptr_t>(shared_.data());
    return shared_.data() + (ALIGNMENT - at % ALIGNMENT) % ALIGNMENT;
  }

  // Runs block `at` to its end. Throws std::runtime_error with the first fault.
  void run(Size at) {
    id = at;
    std::memset(shared_.data(), 0xff, shared_.size());  // NaN in every floating type
    for (Fiber& f : fibers_) {
      f.sp = f.stack.entering(&Block::begin);
      f.state = State::READY;
      f.groups.clear(), f.open.clear();
    }
    block = this;
    while (true) {
      for (int w : permuted(cells_.size())) run_warp(w);
      if (!failure_.empty() || !release_barrier()) break;
    }
    if (!failure_.empty()) {  // each thread that waits unwinds its stack
      for (size_t w = 0; w < cells_.size(); ++w) run_warp(w);
    }
    block = nullptr, self = nullptr;
    if (!failure_.empty()) throw std::runtime_error("CUDA emulator: " + failure_);
  }

  // -- called by threads ----------------------------------------------------------------------

  [[noreturn]] void fault(const std::string& what) {
    blame(*self, what);
    throw Unwind{};
  }

  void wait_for_block(Site site) {
    self->what = "__syncthreads", self->site = site;
    wait(State::IN_BLOCK);
  }

  // What the lanes of `mask` gave to the same collective.
  const Cells& exchange(const char* what, Site site, unsigned mask, const void* data,
                        size_t bytes) {
    Cells& cells = cells_[self->warp];
    std::memcpy(cells.in[self->lane], data, bytes);
    self->mask = mask, self->what = what, self->site = site;
    wait(State::IN_WARP);
    return cells;
  }

 private:
  static constexpr size_t ALIGNMENT = 1024;
  struct Unwind {};

  void (*kernel_)(void*);
  void* arguments_;
  std::vector<Fiber> fibers_;
  std::vector<Cells> cells_;
  std::vector<unsigned char> shared_;
  std::mt19937 random_;
  std::string failure_;
  void* sp_ = nullptr;  // of the scheduler

  std::vector<int> permuted(size_t n) {
    std::vector<int> order(n);
    for (size_t i = 0; i < n; ++i) order[i] = settings.order == 1 ? n - 1 - i : i;
    if (settings.order > 1) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  void blame(const Fiber& f, const std::string& what) {
    if (!failure_.empty()) return;
    const auto place = [](int x, int y, int z) {
      return std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z);
    };
    failure_ =
        what + " (block " + place(id.x, id.y, id.z) + ", thread " + place(f.x, f.y, f.z) + ")";
  }

  static void begin() {  // of every thread
    try {
      if (block->failure_.empty()) {
        block->kernel_(block->arguments_);
        if (!self->open.empty()) block->fault("asynchronous copies were never committed");
        for (const auto& group : self->groups) {
          if (!group.empty()) block->fault("the thread ended with asynchronous copies in flight");
        }
      }
    } catch (Unwind&) {
    }
    self->state = State::DONE;
    switch_stack(&self->sp, block->sp_);
    __builtin_trap();  // nobody enters a thread that is done
  }

  void wait(State state) {
    self->state = state;
    ++counts.switches;
    switch_stack(&self->sp, sp_);
    if (!failure_.empty()) throw Unwind{};
  }

  // Runs a warp until each of its threads is done or waits for the block; after a fault, until all
  // are done, so that every stack is unwound.
  void run_warp(int w) {
    const int first = w * WARP, last = std::min<int>(first + WARP, fibers_.size());
    while (true) {
      for (int lane : permuted(last - first)) {
        Fiber& f = fibers_[first + lane];
        if (f.state != State::READY) continue;
        self = &f;
        switch_stack(&sp_, f.sp);
      }
      if (!failure_.empty()) {
        bool done = true;
        for (Fiber& f : fibers_) {
          if (f.warp == w && f.state != State::DONE) f.state = State::READY, done = false;
        }
        if (done) return;
      } else if (!exchange_lanes(first, last)) {
        return;
      }
    }
  }

  // Completes each collective of the warp whose lanes are all there. False: no thread waits in one.
  bool exchange_lanes(int first, int last) {
    unsigned alive = 0, waiting = 0;
    for (int i = first; i < last; ++i) {
      const unsigned bit = 1u << fibers_[i].lane;
      if (fibers_[i].state != State::DONE) alive |= bit;
      if (fibers_[i].state == State::IN_WARP) waiting |= bit;
    }
    if (!waiting) return false;
    bool moved = false;
    for (int i = first; i < last && failure_.empty(); ++i) {
      const Fiber& f = fibers_[i];
      if (f.state != State::IN_WARP) continue;
      if (!(f.mask >> f.lane & 1)) {
        blame(f, std::string(f.what) + " at " + f.site.text() + ": the thread is not in its mask");
      } else if ((f.mask & ~alive) != 0) {
        blame(f, std::string(f.what) + " at " + f.site.text() + ": lanes of its mask have ended");
      } else if ((waiting & f.mask) == f.mask) {
        complete(f, first, last);
        waiting &= ~f.mask, moved = true;
      }
    }
    if (!moved && failure_.empty()) {
      const Fiber& f = fibers_[first + __builtin_ctz(waiting)];
      blame(f, std::string(f.what) + " at " + f.site.text() + ": lanes of its mask never come");
    }
    return true;
  }

  void complete(const Fiber& of, int first, int last) {
    const unsigned mask = of.mask;
    Cells& cells = cells_[of.warp];
    for (int i = first; i < last; ++i) {
      Fiber& f = fibers_[i];
      if (!(mask >> f.lane & 1)) continue;
      if (std::strcmp(f.what, of.what) || !(f.site == of.site) || f.mask != mask) {
        blame(f, std::string(f.what) + " at " + f.site.text() + " meets " + of.what + " at " +
                     of.site.text() + " within one warp");
        return;
      }
      std::memcpy(cells.out[f.lane], cells.in[f.lane], CELL);
      f.state = State::READY;
    }
    ++counts.collectives;
  }

  // All threads that are not done wait for the block: lets them go on. False: all are done.
  bool release_barrier() {
    const Fiber* one = nullptr;
    const Fiber* ended = nullptr;
    for (Fiber& f : fibers_) (f.state == State::DONE ? ended : one) = &f;
    if (!one) return false;
    for (Fiber& f : fibers_) {
      if (f.state != State::DONE && !(f.site == one->site)) {
        blame(f, "__syncthreads at " + f.site.text() + " meets one at " + one->site.text());
      }
    }
    if (ended) blame(*ended, "ended before __syncthreads at " + one->site.text());
    ++counts.barriers;
    for (Fiber& f : fibers_) {
      if (f.state != State::DONE) f.state = State::READY;
    }
    return failure_.empty();
  }
};

}  // namespace emulator
