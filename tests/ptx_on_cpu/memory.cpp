// Loads, stores, asynchronous copies, matrices, control and what lanes do together.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>

#include "machine.h"

namespace ptx {
namespace {

enum Space { kParam, kGlobal, kShared, kLocal };

// An address is an operand (absent: 0) and two numbers: an offset, whether the operand has 64 bits.
uint64_t address_of(Warp& w, const Instruction& i, int operand, int number, int lane) {
  const int at = i.operand[operand];
  const int64_t offset = i.number[number];
  if (at < 0) return offset;
  return offset + (i.number[number + 1] ? w.reg<uint64_t>(at)[lane] : w.reg<uint32_t>(at)[lane]);
}

// Numbers behind the address's: bytes of a register; space, bytes of an element, elements, signed.
template <bool STORE>
void access(Warp& w, const Instruction& i) {
  const int width = i.number[2], space = i.number[3], bytes = i.number[4], count = i.number[5];
  const bool is_signed = i.number[6];
  each(w, [&](int lane) {
    const uint64_t address = address_of(w, i, STORE ? 0 : count, 0, lane);
    const auto value = [&](int k) { return w.registers + i.operand[STORE + k] + width * lane; };
    const auto place = [&] {
      return space == kLocal ? local(w, address, bytes * count) : global(address, bytes * count);
    };
    if (STORE) {
      char all[16];
      for (int k = 0; k < count; ++k) std::memcpy(all + k * bytes, value(k), bytes);
      if (space == kShared)
        shared(w, address, bytes * count, all);
      else
        std::memcpy(place(), all, bytes * count);
      return;
    }
    const char* const at = space == kShared  ? shared(w, address, bytes * count)
                           : space == kParam ? parameters(address, bytes * count)
                                             : place();
    for (int k = 0; k < count; ++k) {
      if (i.operand[k] < 0) continue;
      std::memset(value(k), is_signed && at[k * bytes + bytes - 1] < 0 ? 0xff : 0, width);
      std::memcpy(value(k), at + k * bytes, bytes);
    }
  });
}
void add_accesses(Table& table, const std::string& space, Space number) {
  for (const int count : {1, 2, 4})
    for (const char kind : {'b', 'u', 's', 'f'})
      for (const int bytes : {1, 2, 4, 8}) {
        if (count * bytes > 16) continue;
        const std::string vector = count > 1 ? ".v" + std::to_string(count) : "";
        const std::string name = space + vector + "." + kind + std::to_string(8 * bytes);
        const std::string values = several(count, "w" + std::to_string(bytes));
        std::ostringstream numbers;
        numbers << " #" << number << " #" << bytes << " #" << count << " #" << (kind == 's');
        table["ld" + name] = {access<false>, values + " a" + numbers.str()};
        if (number != kParam) table["st" + name] = {access<true>, "a" + values + numbers.str()};
      }
}

// Operands: to, from, the bytes that are there (absent: all). Numbers: both addresses', bytes.
void copy_async(Warp& w, const Instruction& i) {
  const int bytes = i.number[4];
  each(w, [&](int lane) {
    const int present = i.operand[2] < 0 ? bytes : w.reg<int>(i.operand[2])[lane];
    if (present < 0 || present > bytes) fail("an asynchronous copy of more than its size");
    const char* const from =
        present ? global(address_of(w, i, 1, 2, lane), present, bytes) : nullptr;
    const auto to = static_cast<uint32_t>(address_of(w, i, 0, 0, lane));
    issue(w, {to, from, bytes, present, w.groups});
  });
}

// ldmatrix and stmatrix: 8×8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of
// matrix i / 8. Operands: a register for each matrix, the address; of stmatrix that is the first.
template <bool STORE, int COUNT, bool TRANSPOSED>
void matrices(Warp& w, const Instruction& i) {
  whole(w, kAll);
  for (int k = 0; k < COUNT; ++k) {
    auto* const lanes = w.reg<uint16_t>(i.operand[STORE + k]);
    for (int r = 0; r < 8; ++r) {
      const uint64_t at = address_of(w, i, STORE ? 0 : COUNT, 0, lane_now = 8 * k + r);
      uint16_t row[8];
      if (!STORE) std::memcpy(row, shared(w, at, 16), 16);
      for (int c = 0; c < 8; ++c) {
        const int major = TRANSPOSED ? c : r, minor = TRANSPOSED ? r : c;
        uint16_t& element = lanes[8 * major + minor];
        (STORE ? row[c] : element) = STORE ? element : row[c];
      }
      if (STORE) shared(w, at, 16, reinterpret_cast<const char*>(row));
    }
  }
}
template <bool STORE, int COUNT>
void add_matrices(Table& table) {
  const std::string values = several(COUNT, "4"), operands = STORE ? "a" + values : values + " a";
  const std::string name = (STORE ? "stmatrix.x" : "ldmatrix.x") + std::to_string(COUNT);
  table[name + ".shared.b16"] = {matrices<STORE, COUNT, false>, operands};
  table[name + ".trans.shared.b16"] = {matrices<STORE, COUNT, true>, operands};
}

// Fragments of 16-bit numbers in registers: a 16×16 matrix in four.
template <class T>
void first_matrix(Warp& w, const Instruction& i, int operand, double (&a)[16][16]) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int k = 0; k < 4; ++k)
      for (int h = 0; h < 2; ++h)
        a[lane / 4 + 8 * (k % 2)][2 * (lane % 4) + h + 8 * (k / 2)] =
            w.reg<T>(i.operand[operand + k])[2 * lane + h];
}

// f of each number of a 16×8 matrix of float32 that is in four registers, and of its place in c.
template <class F>
void each_element(Warp& w, const Instruction& i, int operand, float (&c)[16][8], F f) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int k = 0; k < 4; ++k)
      f(w.reg<float>(i.operand[operand + k])[lane],
        c[lane / 4 + 8 * (k / 2)][2 * (lane % 4) + k % 2]);
}
const auto load = [](float number, float& place) { place = number; };
const auto store = [](float& number, float place) { number = place; };

// c += a · b. Exact products and sums, truncated to float32 every 8 of the 16, as tests/cuda_on_cpu
// does.
void add_product(const double (&a)[16][16], const double (&b)[16][8], float (&c)[16][8]) {
  for (int row = 0; row < 16; ++row)
    for (int step = 0; step < 16; step += 8) {
      double sum[8];
      for (int n = 0; n < 8; ++n) sum[n] = c[row][n];
      for (int k = step; k < step + 8; ++k)
        for (int n = 0; n < 8; ++n) sum[n] += a[row][k] * b[k][n];
      for (int n = 0; n < 8; ++n) {
        float result = static_cast<float>(sum[n]);
        if (std::isfinite(result) && std::fabs(result) > std::fabs(sum[n]))
          result = std::nextafterf(result, 0.0f);
        c[row][n] = result;
      }
    }
}

// d = a · b + c: a 16×16 by rows, b 16×8 by columns.
template <class T>
void multiply(Warp& w, const Instruction& i) {
  whole(w, kAll);
  double a[16][16], b[16][8];
  float c[16][8];
  first_matrix<T>(w, i, 4, a);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int k = 0; k < 2; ++k)
      for (int h = 0; h < 2; ++h)
        b[2 * (lane % 4) + h + 8 * k][lane / 4] = w.reg<T>(i.operand[8 + k])[2 * lane + h];
  each_element(w, i, 10, c, load);
  add_product(a, b, c);
  each_element(w, i, 0, c, store);
}

// `count` rows from `first` on, 16 numbers of each, of a matrix in shared memory that a descriptor
// of wgmma stands for: put(row, column, value). Where its columns are contiguous, not its rows, it
// is transposed. It is read in pieces of 16 bytes, each counted as a load by the next lane from
// lane_now on. (PTX ISA, asynchronous warpgroup matrix instructions: canonical layouts.)
template <class T, class F>
void matrix_in_shared(Warp& w, uint64_t descriptor, int first, int count, bool transposed, F put) {
  const auto field = [&](int bit) { return static_cast<int>((descriptor >> bit & 0x3fff) << 4); };
  const int mode = descriptor >> 62, width = mode ? 256 >> mode : 16;  // of a swizzled row, bytes
  int leading = field(16), stride = field(32);
  if (transposed && !mode) std::swap(leading, stride);
  if (descriptor >> 49 & 7) fail("a matrix descriptor with a base offset");
  const int rows = transposed ? 0 : first, pieces = transposed ? first / 8 : 0;
  for (int piece = pieces; piece < pieces + (transposed ? count / 8 : 2); ++piece)
    for (int row = rows; row < rows + (transposed ? 16 : count); ++row) {
      uint32_t at = field(0) + row % 8 * width + row / 8 * stride;
      at += piece % (width / 16) * 16 + piece / (width / 16) * leading;
      T values[8];
      std::memcpy(values, read_by_product(w, at ^ (at >> 3 & (width - 16))), sizeof values);
      for (int k = 0; k < 8; ++k) {
        const int other = 8 * piece + k;
        put(transposed ? other : row, transposed ? row : other, values[k]);
      }
      if (lane_now != kNotCounted) ++lane_now;
    }
}

// 8 columns of wgmma's product, of which a warp has 16 rows. Operands: d, a (four registers, or a
// descriptor), b's descriptor, whether d is added. Numbers: the first column, a's and b's sign,
// whether they are transposed. Nothing but another wgmma may use d before its group is waited for.
template <class T, bool REGISTERS>
void multiply_async(Warp& w, const Instruction& i) {
  whole(w, kAll);
  const int column = i.number[0], at_b = REGISTERS ? 8 : 5, row = 16 * (w.id % 4);
  const auto descriptor = [&](int operand) {
    const uint64_t* const lanes = w.reg<uint64_t>(i.operand[operand]);
    if (std::count(lanes, lanes + kLanes, lanes[0]) != kLanes)
      fail("lanes give different descriptors");
    return lanes[0];
  };
  if (column == 0) multiply_together(w, {w.pc, REGISTERS ? 0 : descriptor(4), descriptor(at_b)});
  if (column == 0 && REGISTERS) first_matrix<T>(w, i, 4, w.a);
  for (int rows = 0; column == 0 && !REGISTERS && rows < 64; rows += 16) {
    const bool own = rows == row;  // the others' must be there, too
    lane_now = own ? 0 : kNotCounted;
    matrix_in_shared<T>(w, descriptor(4), rows, 16, i.number[3], [&](int m, int k, float value) {
      if (own) w.a[m - row][k] = value;
    });
  }
  double b[16][8];
  lane_now = w.id % 4 ? kNotCounted : kLanes;  // four warps read it together
  matrix_in_shared<T>(w, descriptor(at_b), column, 8, i.number[4], [&](int n, int k, float value) {
    b[k][n - column] = value * i.number[1] * i.number[2];
  });
  float c[16][8] = {};
  if (w.predicate(i.operand[at_b + 1])) each_element(w, i, 0, c, load);
  add_product(w.a, b, c);
  each_element(w, i, 0, c, store);
  for (int k = 0; k < 4; ++k) w.products[i.operand[k]] = w.product_groups;
}
template <class T>
void add_products(Table& table, const std::string& type) {
  const std::string suffix = ".f32." + type + "." + type, numbers = " 0 n n n n n";
  table["mma.m16n8k16" + suffix + ".f32"] = {multiply<T>, several(14, "4")};
  table["wgmma.registers.m64n8k16" + suffix] = {multiply_async<T, true>,
                                                several(8, "4") + " 8" + numbers};
  table["wgmma.shared.m64n8k16" + suffix] = {multiply_async<T, false>,
                                             several(4, "4") + " 8 8" + numbers};
}

// What a whole warp does at once, some with a number.
template <auto DO>
Entry together() {
  const auto run = [](Warp& w, const Instruction& i) {
    whole(w, kAll);
    if constexpr (std::is_invocable_v<decltype(DO), Warp&>)
      DO(w);
    else
      DO(w, static_cast<int>(i.number[0]));
  };
  return {run, std::is_invocable_v<decltype(DO), Warp&> ? "" : "n"};
}

// The lanes that an operand names; fails unless those are here.
uint32_t members_of(Warp& w, const Instruction& i, int operand) {
  const uint32_t members = w.reg<uint32_t>(i.operand[operand])[__builtin_ctz(w.mask)];
  whole(w, members);
  return members;
}

// shfl: operands d, its predicate, a, b (lane, or how far), c (clamp), members.
enum Shuffle { kIndex, kButterfly, kUp, kDown };
template <int MODE>
void shuffle(Warp& w, const Instruction& i) {
  const uint32_t members = members_of(w, i, 5);
  uint32_t from[kLanes];
  std::memcpy(from, w.reg<uint32_t>(i.operand[2]), sizeof from);
  uint32_t inside = 0;
  each(w, [&](int lane) {
    const int b = w.reg<uint32_t>(i.operand[3])[lane] & 31;
    const int c = w.reg<uint32_t>(i.operand[4])[lane];
    const int segment = c >> 8 & 31, clamp = c & 31;
    const int low = lane & segment, high = low | (clamp & ~segment);
    int source = MODE == kIndex       ? low | (b & ~segment)
                 : MODE == kButterfly ? lane ^ b
                 : MODE == kUp        ? lane - b
                                      : lane + b;
    const bool there = MODE == kUp ? source >= high : source <= high;
    if (!there) source = lane;
    if (!(members >> source & 1)) fail("a shuffle reads a lane that is no member");
    inside |= uint32_t(there) << lane;
    w.reg<uint32_t>(i.operand[0])[lane] = from[source];
  });
  if (i.operand[1] >= 0) {
    uint32_t& p = w.predicate(i.operand[1]);
    p = (p & ~w.mask) | inside;
  }
}

// redux, vote.ballot: operands d, a, members.
template <class T, class F>
void reduce(Warp& w, const Instruction& i) {
  members_of(w, i, 2);
  bool first = true;
  T total{};
  each(w, [&](int lane) {
    const T value = w.reg<T>(i.operand[1])[lane];
    total = first ? value : F{}(total, value);
    first = false;
  });
  each(w, [&](int lane) { w.reg<T>(i.operand[0])[lane] = total; });
}
template <class T, class F>
Entry reduction(F) {
  return {reduce<T, F>, "4 4 4"};
}

void ballot(Warp& w, const Instruction& i) {
  members_of(w, i, 2);
  const uint32_t votes = w.predicate(i.operand[1]) & w.mask;
  each(w, [&](int lane) { w.reg<uint32_t>(i.operand[0])[lane] = votes; });
}

// Atomics on shared or global memory. Lanes take turns in their order. Operands: d for each number,
// address, their values, and a second one of cas.
template <class T, Space SPACE, int COUNT, class F>
void atomic(Warp& w, const Instruction& i) {
  each(w, [&](int lane) {
    const uint64_t at = address_of(w, i, COUNT, 0, lane);
    constexpr int kSize = COUNT * sizeof(T);
    char* place = SPACE == kGlobal ? global(at, kSize) : shared(w, at, kSize, nullptr, true);
    for (int k = 0; k < COUNT; ++k, place += sizeof(T)) {
      T before, after;
      std::memcpy(&before, place, sizeof(T));
      const T value = w.reg<T>(i.operand[COUNT + 1 + k])[lane];
      if constexpr (std::is_invocable_v<F, T, T, T>)
        after = F{}(before, value, w.reg<T>(i.operand[3])[lane]);
      else
        after = F{}(before, value);
      std::memcpy(place, &after, sizeof(T));
      if (i.operand[k] >= 0) w.reg<T>(i.operand[k])[lane] = before;
    }
  });
}
template <class T, int COUNT = 1, class F>
void add_atomics(Table& table, const std::string& name, F) {
  const std::string values = several(COUNT, std::to_string(sizeof(T)));
  const std::string operands =
      values + " a" + values + (std::is_invocable_v<F, T, T, T> ? values : "");
  table["atom.global." + name] = {atomic<T, kGlobal, COUNT, F>, operands};
  table["atom.shared." + name] = {atomic<T, kShared, COUNT, F>, operands};
}

}  // namespace

void add_memory(Table& table) {
  const auto add = [](auto a, auto b) { return a + b; };
  const auto min = [](auto a, auto b) { return b < a ? b : a; };
  const auto max = [](auto a, auto b) { return a < b ? b : a; };
  add_accesses(table, ".param", kParam);
  add_accesses(table, ".global", kGlobal);
  add_accesses(table, ".shared", kShared);
  add_accesses(table, ".local", kLocal);
  table["cp.async.ca.shared.global"] = {copy_async, "a a n 4"};
  table["cp.async.cg.shared.global"] = {copy_async, "a a n 4"};
  table["cp.async.commit_group"] = together<[](Warp& w) { ++w.groups; }>();
  table["cp.async.wait_group"] = together<wait_for_groups>();
  add_matrices<false, 1>(table), add_matrices<false, 2>(table), add_matrices<false, 4>(table);
  add_matrices<true, 1>(table), add_matrices<true, 2>(table), add_matrices<true, 4>(table);
  add_products<bf16>(table, "bf16"), add_products<f16>(table, "f16");
  table["wgmma.fence"] = together<[](Warp&) {}>();
  table["wgmma.commit_group"] = together<[](Warp& w) { ++w.product_groups; }>();
  table["wgmma.wait_group"] = together<wait_for_products>();
  table["fence.proxy"].run = [](Warp& w, const Instruction&) { fence_proxy(w); };
  table["shfl.idx.b32"] = {shuffle<kIndex>, "4 0 4 4 4 4"};
  table["shfl.bfly.b32"] = {shuffle<kButterfly>, "4 0 4 4 4 4"};
  table["shfl.up.b32"] = {shuffle<kUp>, "4 0 4 4 4 4"};
  table["shfl.down.b32"] = {shuffle<kDown>, "4 0 4 4 4 4"};
  table["redux.add.s32"] = table["redux.add.u32"] = reduction<uint32_t>(add);
  table["redux.min.u32"] = reduction<uint32_t>(min);
  table["redux.max.u32"] = reduction<uint32_t>(max);
  table["vote.ballot.b32"] = {ballot, "4 0 4"};
  add_atomics<float>(table, "add.f32", add);
  add_atomics<float, 2>(table, "add.v2.f32", add), add_atomics<float, 4>(table, "add.v4.f32", add);
  add_atomics<bf16, 2>(table, "add.v2.bf16", add), add_atomics<bf16, 4>(table, "add.v4.bf16", add);
  add_atomics<bf16, 8>(table, "add.v8.bf16", add);
  add_atomics<bf16>(table, "add.bf16", add), add_atomics<Pair<bf16>>(table, "add.bf16x2", add);
  add_atomics<f16>(table, "add.f16", add), add_atomics<Pair<f16>>(table, "add.f16x2", add);
  add_atomics<int32_t>(table, "min.s32", min);
  add_atomics<uint32_t>(table, "cas.b32", [](uint32_t is, uint32_t expected, uint32_t next) {
    return is == expected ? next : is;
  });
  table["bar"] = together<[](Warp& w) { w.stopped = true; }>();
  table["bar.warp"] = {[](Warp& w, const Instruction& i) { members_of(w, i, 0); }, "4"};
  table["bra"] = {[](Warp& w, const Instruction& i) { jump(w, i.number[0], i.number[1]); }, "n"};
  table["ret"].run = [](Warp& w, const Instruction&) { leave(w); };
  table["nop"].run = [](Warp&, const Instruction&) {};
}

}  // namespace ptx
