// A fiber: one CUDA thread of an emulated block, with a stack of its own. x86-64 with System V's
// ABI.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

namespace emulator {

inline const size_t GUARD = sysconf(_SC_PAGESIZE);  // a page below each stack that faults
constexpr size_t STACK = 64 << 10;

// A place in a kernel: collectives are told apart by it.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const { return file == other.file && line == other.line; }
  std::string text() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

// One asynchronous copy into shared memory: `filled` bytes of the source, then zeros.
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes, filled;
};

enum class State : uint8_t { READY, IN_WARP, IN_BLOCK, DONE };

// rdi: where the stack pointer that is left is kept; rsi: the one that is taken. The registers that
// a callee must keep go onto the stack that is left.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

class Stack {
 public:
  Stack() {
    void* at =
        mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect(at, GUARD, PROT_NONE)) {
      throw std::runtime_error("CUDA emulator: no memory for stacks");
    }
    base_ = static_cast<char*>(at);
  }
  Stack(Stack&& other) noexcept : base_(other.base_) { other.base_ = nullptr; }
  Stack(const Stack&) = delete;
  ~Stack() {
    if (base_) munmap(base_, GUARD + STACK);
  }

  // A stack pointer that switch_stack can take: six registers, then where to return to.
  void* entering(void (*begin)()) const {
    auto** words = reinterpret_cast<void**>(base_ + GUARD + STACK) - 8;
    words[6] = reinterpret_cast<void*>(begin);
    words[7] = nullptr;
    return words;
  }

 private:
  char* base_;
};

struct Fiber {
  Stack stack;
  void* sp = nullptr;
  int x = 0, y = 0, z = 0;  // threadIdx
  int warp = 0, lane = 0;
  State state = State::READY;
  unsigned mask = 0;           // of the collective it waits in
  const char* what = nullptr;  // its name
  Site site{};
  std::vector<std::vector<Copy>> groups;  // committed and not waited for, oldest first
  std::vector<Copy> open;                 // not committed
};

}  // namespace emulator
