// A machine that runs PTX: one block after another, a block's warps in turns from barrier to
// barrier, a warp's 32 lanes together. See docs/profile.md.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

struct bf16 {
  uint16_t bits;
  bf16() = default;
  bf16(float value) {  // to nearest, to even
    const auto all = __builtin_bit_cast(uint32_t, value);
    bits = value == value ? (all + 0x7fff + (all >> 16 & 1)) >> 16 : 0x7fff;
  }
  operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
};
struct f16 {
  _Float16 number;
  f16() = default;
  f16(float value)
      : number(value == value ? _Float16(value) : __builtin_bit_cast(_Float16, uint16_t(0x7fff))) {}
  operator float() const { return number; }
};
template <class T>
struct Pair {  // two numbers of half a register each
  T low, high;
};
template <class T>
Pair<T> operator+(Pair<T> a, Pair<T> b) {
  return {a.low + b.low, a.high + b.high};
}

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kLanes = 32;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&);

// Operands are byte offsets into a warp's registers, -1 where there is none. A register is 32
// values side by side, a lane each; a predicate is one word, a bit a lane. INSTRUCTION of
// machine.py is the same.
struct Instruction {
  Handler run;
  int guard;  // the predicate's offset, or -1
  int negated;
  int stores;      // to memory; an atomic one, too
  int multiplies;  // asynchronously
  int operand[17];
  int64_t number[7];
};

// What a launch is asked to count, a row of kCounts numbers an instruction; Counting of machine.py
// has their names.
enum Count { kVisits, kBlocks, kWarps, kAccesses, kSectors, kWavefronts, kConflicts, kPartings };
constexpr int kCounts = kPartings + 1;

struct Copy {  // of cp.async, from its issue to the wait for its group
  uint32_t to;
  const char* from;  // null: zeros
  int bytes, present, group;
};

struct Product {  // of a wgmma, by four warps
  int pc;
  uint64_t first, second;  // descriptors; 0 for a matrix in registers
  bool operator==(const Product&) const = default;
};

struct Warp {  // as it is at a block's start
  int id;
  char* registers;
  int pc = 0;
  uint32_t mask = 0;       // lanes that this instruction is for
  uint32_t active = kAll;  // lanes at pc
  uint32_t alive = kAll;   // lanes that have not returned
  int join = -1;           // row where those wait for others, or -1
  std::vector<std::tuple<int, uint32_t, int>> waiting = {};  // lanes elsewhere: pc, lanes, join
  bool stopped = false;                                      // at a barrier, or at the end
  int groups = 0;                                            // committed
  uint32_t carry = 0;                                        // of mad.cc, a bit a lane
  std::vector<Copy> copies = {};
  double a[16][16] = {};                               // the first matrix of the wgmma under way
  int product_groups = 0;                              // committed
  size_t group_products = 0;                           // since the last barrier
  std::map<int, int> products = {};                    // registers that they are for, their groups
  std::vector<std::pair<uint32_t, int>> reading = {};  // address of 16 bytes, group

  template <class T>
  T* reg(int offset) {
    return reinterpret_cast<T*>(registers + offset);
  }
  uint32_t& predicate(int offset) { return *reg<uint32_t>(offset); }
};

constexpr int kNotCounted = -1;
extern int lane_now;  // whose access it is, or kNotCounted
template <class F>
void each(const Warp& warp, F f) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (warp.mask >> lane & 1) f(lane_now = lane);
}
[[noreturn]] void fail(const std::string& what);
void whole(const Warp& warp, uint32_t members);  // fails unless all of them are here
void jump(Warp& warp, int target, int join);
void leave(Warp& warp);

// The memory at an address, checked: inside a tensor; written before, and so on. Shared memory is
// written, if there is something to write, by the function itself. An address is a multiple of the
// bytes, or of `step`.
char* global(uint64_t address, int bytes, int step = 0);
char* shared(Warp& warp, uint64_t address, int bytes, const char* write = nullptr,
             bool atomic = false);
char* local(Warp& warp, uint64_t address, int bytes);
const char* parameters(uint64_t offset, int bytes);
void issue(Warp& warp, const Copy& copy);
void wait_for_groups(Warp& warp, int in_flight);
const char* read_by_product(Warp& warp, uint32_t address);  // 16 bytes of shared memory
void wait_for_products(Warp& warp, int in_flight);
void fence_proxy(Warp& warp);
void multiply_together(Warp& warp, const Product& product);

// A handler, and its operands' codes, as handlers() of machine.py has them.
struct Entry {
  Handler run;
  std::string operands;
};
using Table = std::unordered_map<std::string, Entry>;
inline std::string several(int count, const std::string& code) {
  return count ? " " + code + several(count - 1, code) : "";
}
void add_arithmetic(Table& table);
void add_memory(Table& table);

}  // namespace ptx
