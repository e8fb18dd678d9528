// Blocks, warps, barriers, memory and its checks.
#include "machine.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace ptx {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
void fail(const std::string& what) { throw Failure(what); }
int lane_now = 0;

namespace {

// What is known of a byte of shared memory. An epoch lasts from one barrier to the next.
struct Byte {
  uint32_t written, read;     // the epoch, 0: never
  uint32_t writers, readers;  // warps that did so in that epoch, a bit each
  uint32_t atomic;            // the epoch in which warps last took turns at it
  bool pending;               // an asynchronous copy to it is under way
  uint32_t products;          // warps whose wgmma may still read it, a bit each
  uint32_t fences;            // that all warps had made at the last write
  uint32_t unfenced;          // writers that had made none behind theirs then, a bit each
};

struct Range {  // of a tensor
  uint64_t begin, end;
  const uint8_t* holes;  // 0 for a byte that is not the tensor's; null: all are
};

struct Launch {  // as launch() of machine.py makes it
  const Instruction* code;
  uint64_t rows;
  const char* frame;  // a warp's registers at the start: the constants
  uint64_t frame_bytes;
  const char* parameters;
  uint64_t parameter_bytes;
  const Range* tensors;
  uint64_t tensor_count;
  const uint64_t* blocks;  // those to run, numbered along x, then y, then z
  uint64_t block_count;
  uint64_t (*counts)[kCounts];  // of each row; null: nothing is counted
  uint64_t* distinct;           // of each tensor: sectors read, sectors written
  uint64_t grid[3], warps, shared_bytes, local_bytes, backwards, fenced;
};

const Launch* launch = nullptr;
std::vector<char> memory;
std::vector<Byte> bytes_known;
size_t recent = 0;  // the tensor of the last access
uint32_t epoch = 0, block_start = 0;
struct Fence {             // the last fence.proxy.async of a warp
  uint32_t number, epoch;  // among those of all warps, from 1 on; 0: none
};
std::vector<Fence> fenced;
uint32_t fences = 0;                               // that all warps have made
std::vector<std::vector<Product>> group_products;  // of each four warps, since the last barrier

struct Touch {  // a lane's access, where accesses are counted
  uint64_t address;
  int bytes, lane;
};
std::vector<Touch> global_touched, shared_touched;
std::vector<std::vector<uint64_t>> sectors_touched;  // of each tensor: read, written
std::vector<uint32_t> visitors;  // of each row: the block's warps that were there, a bit each

template <class T>
void make_distinct(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

// 32-byte sectors that a warp's lanes touch in one instruction. An aligned access is in one.
void count_global(uint64_t* counts, bool stores) {
  std::vector<uint64_t> sectors;
  for (const Touch& t : global_touched) sectors.push_back(t.address / 32);
  make_distinct(sectors);
  ++counts[kAccesses];
  counts[kSectors] += sectors.size();
  auto& all = sectors_touched[2 * recent + stores];
  all.insert(all.end(), sectors.begin(), sectors.end());
  if (all.size() > 1 << 22) make_distinct(all);
}

// Passes over the 32 banks of 4 bytes: as many lanes together as ask for 128 bytes; in one pass a
// bank gives one word, to every lane that wants it.
void count_shared(uint64_t* counts) {
  std::vector<std::tuple<int, uint64_t, uint64_t>> words;  // phase, bank, word
  for (const Touch& t : shared_touched)
    for (uint64_t word = t.address / 4; word <= (t.address + t.bytes - 1) / 4; ++word)
      words.emplace_back(t.lane / (128 / std::max(t.bytes, 4)), word % 32, word);
  make_distinct(words);
  for (size_t k = 0, in_bank = 0, most = 0; k < words.size(); ++k) {
    const auto [phase, bank, word] = words[k];
    const bool same_phase = k && std::get<0>(words[k - 1]) == phase;
    in_bank = same_phase && std::get<1>(words[k - 1]) == bank ? in_bank + 1 : 1;
    if (!same_phase) most = 0;
    if (in_bank > most) {
      most = in_bank;
      ++counts[kWavefronts];
      if (in_bank > 1) ++counts[kConflicts];
    }
  }
}

enum Special { kTid, kCtaid = 3, kNtid = 6, kNctaid = 9, kLane = 12, kWarp, kLanemaskLt };

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// Once the lanes at work are where they wait for others, or have returned, others go on. A card
// does so too: lanes that come to the same row before they are to join do not go together there.
void go_on(Warp& w) {
  while (!w.active || w.pc == w.join) {
    if (w.waiting.empty()) {
      w.stopped = true;
      return;
    }
    std::tie(w.pc, w.active, w.join) = w.waiting.back();
    w.active &= w.alive;
    w.waiting.pop_back();
  }
}

void run_warp(Warp& w) {
  w.stopped = false;
  while (!w.stopped) {
    const Instruction& i = launch->code[w.pc];
    w.mask = w.active;
    if (i.guard >= 0) w.mask &= i.negated ? ~w.predicate(i.guard) : w.predicate(i.guard);
    const int row = w.pc++;
    if (!w.products.empty())
      for (size_t k = i.multiplies ? 4 : 0; k < std::size(i.operand); ++k)  // it may add to its own
        if (w.products.count(i.operand[k]))
          fail("it uses what a wgmma computes before the wait for that");
    if (w.mask) i.run(w, i);
    if (launch->counts) {
      uint64_t* const counts = launch->counts[row];
      ++counts[kVisits];
      counts[kBlocks] += !visitors[row];
      counts[kWarps] += ~visitors[row] >> w.id & 1;
      visitors[row] |= 1u << w.id;
      if (!global_touched.empty()) count_global(counts, i.stores);
      if (!shared_touched.empty()) count_shared(counts);
      global_touched.clear();
      shared_touched.clear();
    }
    go_on(w);
  }
}

// All four warps of each group have come to the products that one of them has come to.
void compare_products(std::vector<Warp>& warps, Warp*& running) {
  for (Warp& w : warps) {
    running = &w;
    if (w.group_products != group_products[w.id / 4].size())
      fail("a wgmma that not all four warps of a group reach");
    w.group_products = 0;
  }
  for (auto& products : group_products) products.clear();
}

// Warps that read, and that wrote, a byte since the last barrier.
inline uint32_t readers(const Byte& b) { return b.read == epoch ? b.readers : 0; }
inline uint32_t writers(const Byte& b) { return b.written == epoch ? b.writers : 0; }

// Warps that wrote a byte and have made no fence since.
uint32_t unfenced(const Byte& b) {
  uint32_t warps = b.unfenced;
  for (const Fence& fence : fenced)
    if (fence.number > b.fences) warps &= ~(1u << (&fence - fenced.data()));
  return warps;
}

inline void note_read(Byte& b, uint32_t warp) {
  b.readers = readers(b) | warp;
  b.read = epoch;
}
inline void note_write(Byte& b, uint32_t warp) {
  b.writers = writers(b) | warp;
  b.written = epoch;
  b.unfenced = b.writers == warp ? warp : (unfenced(b) & b.writers) | warp;
  b.fences = fences;
}

void check_place(uint64_t address, int bytes) {  // in shared memory
  if (address % bytes)
    fail("shared address " + hex(address) + " is no multiple of the " + std::to_string(bytes) +
         " bytes");
  if (address + bytes > memory.size())
    fail("shared address " + hex(address) + " is outside the block's " +
         std::to_string(memory.size()) + " bytes");
}

// Runs the block's warps from barrier to barrier.
void run_block(std::vector<Warp>& warps, Warp*& running) {
  block_start = ++epoch;
  visitors.assign(launch->rows, 0);
  for (;;) {
    int arrived = 0, at = -1;
    for (size_t k = 0; k < warps.size(); ++k) {
      Warp& w = warps[launch->backwards ? warps.size() - 1 - k : k];
      running = &w;
      run_warp(w);
      if (w.alive == 0) continue;
      if (arrived++ && w.pc != at) fail("warps of a block wait at different barriers");
      at = w.pc;
    }
    compare_products(warps, running);
    if (arrived == 0) return;
    if (arrived != static_cast<int>(warps.size()))
      fail("a barrier that only " + std::to_string(arrived) + " of " +
           std::to_string(warps.size()) + " warps reach");
    ++epoch;
  }
}

}  // namespace

void whole(const Warp& w, uint32_t members) {
  if (w.mask != (w.alive & members) || (members & ~w.alive))
    fail("lanes " + hex(w.mask) + " are here, lanes " + hex(members) + " must be");
}

void jump(Warp& w, int target, int join) {
  if (const uint32_t stay = w.active & ~w.mask) {
    if (launch->counts) ++launch->counts[w.pc - 1][kPartings];
    if (join != w.join) w.waiting.emplace_back(join, w.active, w.join);
    w.waiting.emplace_back(w.pc, stay, join);
    w.join = join;
  }
  w.active = w.mask;
  w.pc = target;
}

void leave(Warp& w) {
  w.alive &= ~w.mask;
  w.active &= ~w.mask;
}

char* global(uint64_t address, int bytes, int step) {
  if (!step) step = bytes;
  if (address % step)
    fail("address " + hex(address) + " is no multiple of the " + std::to_string(step) + " bytes");
  const auto inside = [&](const Range& r) {
    if (address < r.begin || address + bytes > r.end) return false;
    if (!r.holes) return true;
    const uint8_t* const at = r.holes + (address - r.begin);
    return std::all_of(at, at + bytes, [](uint8_t known) { return known; });
  };
  const auto found = [&] {
    if (recent < launch->tensor_count && inside(launch->tensors[recent])) return true;
    for (recent = 0; recent < launch->tensor_count; ++recent)
      if (inside(launch->tensors[recent])) return true;
    return false;
  };
  if (!found())
    fail("an access of " + std::to_string(bytes) + " bytes outside the tensors, at " +
         hex(address));
  if (launch->counts) global_touched.push_back({address, bytes, lane_now});
  return reinterpret_cast<char*>(address);
}

char* shared(Warp& w, uint64_t address, int bytes, const char* write, bool atomic) {
  check_place(address, bytes);
  if (launch->counts && lane_now != kNotCounted)
    shared_touched.push_back({address, bytes, lane_now});
  const uint32_t mine = 1u << w.id;
  for (uint64_t at = address; at < address + bytes; ++at) {
    Byte& b = bytes_known[at];
    const auto race = [&](const char* what) {
      fail("shared address " + hex(at) + ": " + what + " between the same barriers");
    };
    if (b.pending)
      fail("shared address " + hex(at) + " is " + (write ? "written" : "read") +
           " before the asynchronous copy to it is waited for");
    if ((write || atomic) && b.products)
      fail("shared address " + hex(at) +
           " is written before the wgmma that reads it is waited for");
    const bool others_wrote = writers(b) & ~mine;
    if (write || atomic) {
      // Triton lets warps that hold the same value all write it; that is no race.
      const bool agreed = atomic ? b.atomic == epoch : memory[at] == write[at - address];
      if (others_wrote && !agreed) race("two warps write it");
      if (readers(b) & ~mine) race("one warp writes what another reads");
    }
    if (!write) {
      if (b.written < block_start)
        fail("shared address " + hex(at) + " is read, and nobody wrote it");
      if (others_wrote && !atomic && !(b.writers & mine))
        race("one warp reads what another writes");
    }
    if (write || atomic) {
      note_write(b, mine);
      if (atomic) b.atomic = epoch;
      if (write) memory[at] = write[at - address];
    } else {
      note_read(b, mine);
    }
  }
  return memory.data() + address;
}

// It lies behind a warp's registers, all of a lane together.
char* local(Warp& w, uint64_t address, int bytes) {
  if (address % bytes || address + bytes > launch->local_bytes)
    fail("local address " + hex(address) + " is no multiple of the " + std::to_string(bytes) +
         " bytes, or outside the lane's " + std::to_string(launch->local_bytes));
  return w.registers + launch->frame_bytes + launch->local_bytes * lane_now + address;
}

const char* parameters(uint64_t offset, int bytes) {
  if (offset + bytes > launch->parameter_bytes) fail("a parameter that the launch does not give");
  return launch->parameters + offset;
}

void issue(Warp& w, const Copy& copy) {
  check_place(copy.to, copy.bytes);
  if (launch->counts) shared_touched.push_back({copy.to, copy.bytes, lane_now});
  for (int k = 0; k < copy.bytes; ++k) {
    Byte& b = bytes_known[copy.to + k];
    if (b.pending) fail("an asynchronous copy to where another is under way");
    if (b.products) fail("an asynchronous copy over what a wgmma may still read");
    if ((readers(b) | writers(b)) & ~(1u << w.id))
      fail("shared address " + hex(copy.to + k) +
           ": an asynchronous copy overwrites what another warp uses between the same barriers");
    b.pending = true;
  }
  w.copies.push_back(copy);
}

void wait_for_groups(Warp& w, int in_flight) {
  std::erase_if(w.copies, [&](const Copy& copy) {
    if (copy.group >= w.groups - in_flight) return false;
    std::memset(memory.data() + copy.to, 0, copy.bytes);
    if (copy.from) std::memcpy(memory.data() + copy.to, copy.from, copy.present);
    for (int k = 0; k < copy.bytes; ++k) {
      Byte& b = bytes_known[copy.to + k];
      note_write(b, 1u << w.id);
      b.pending = false;
    }
    return true;
  });
}

// What other instructions wrote, wgmma sees behind a fence only: of those who wrote it, or its own
// behind a barrier.
const char* read_by_product(Warp& w, uint32_t address) {
  const char* const data = shared(w, address, 16);
  const Byte* before = nullptr;
  for (uint32_t at = address; at < address + 16; ++at) {
    Byte& b = bytes_known[at];
    b.products |= 1u << w.id;
    // Most bytes are written with the one before.
    if (before && std::tie(b.written, b.unfenced, b.fences) ==
                      std::tie(before->written, before->unfenced, before->fences))
      continue;
    before = &b;
    if (launch->fenced && unfenced(b) && fenced[w.id].epoch <= b.written)
      fail("shared address " + hex(at) + ": no fence.proxy.async between its write and this read");
  }
  w.reading.emplace_back(address, w.product_groups);
  return data;
}

void wait_for_products(Warp& w, int in_flight) {
  const auto done = [&](int group) { return group < w.product_groups - in_flight; };
  std::erase_if(w.products, [&](const auto& product) { return done(product.second); });
  const auto under_way = std::stable_partition(w.reading.begin(), w.reading.end(),
                                               [&](auto& read) { return done(read.second); });
  const auto each_byte = [&](auto from, auto to, auto f) {
    for (; from != to; ++from)
      for (int k = 0; k < 16; ++k) f(bytes_known[from->first + k]);
  };
  each_byte(w.reading.begin(), under_way, [&](Byte& b) {  // it may have been read until now
    b.products &= ~(1u << w.id);
    note_read(b, 1u << w.id);
  });
  w.reading.erase(w.reading.begin(), under_way);
  each_byte(w.reading.begin(), w.reading.end(), [&](Byte& b) { b.products |= 1u << w.id; });
}

void fence_proxy(Warp& w) {
  if (w.mask != w.alive) return;  // what its other lanes wrote is not behind it
  fenced[w.id] = {++fences, epoch};
}

// The four warps of a group come to the same products, in the same order.
void multiply_together(Warp& w, const Product& product) {
  std::vector<Product>& products = group_products[w.id / 4];
  if (w.group_products == products.size()) products.push_back(product);
  if (products[w.group_products++] != product)
    fail("other warps of its group are at another wgmma, or give other descriptors");
}

}  // namespace ptx

using namespace ptx;

extern "C" {

// A line for each handler: its name, its address, its operands' codes.
const char* ptx_handlers() {
  static const std::string lines = [] {
    Table table;
    add_arithmetic(table);
    add_memory(table);
    std::ostringstream text;
    for (const auto& [name, entry] : table)
      text << name << ' ' << reinterpret_cast<uint64_t>(entry.run) << ' ' << entry.operands << '\n';
    return text.str();
  }();
  return lines.c_str();
}

// Runs the blocks. Returns -1, or the row at which it failed, and says where and why in `message`.
int ptx_launch(const Launch* asked, char* message, int message_bytes) {
  launch = asked;
  memory.assign(launch->shared_bytes, char(0xff));
  bytes_known.assign(launch->shared_bytes, Byte{});
  epoch = 0;
  global_touched.clear();
  shared_touched.clear();
  sectors_touched.assign(2 * launch->tensor_count, {});
  const uint64_t frame = (launch->frame_bytes + kLanes * launch->local_bytes + 63) / 64 * 64;
  std::vector<char> registers(frame * launch->warps + 64);
  char* const first = registers.data() + (64 - reinterpret_cast<uint64_t>(registers.data()) % 64);
  fences = 0;
  fenced.assign(launch->warps, {});
  std::vector<Warp> warps(launch->warps);
  group_products.assign((launch->warps + 3) / 4, {});
  for (Warp& w : warps) {
    w.id = static_cast<int>(&w - warps.data());
    w.registers = first + frame * w.id;
    std::memcpy(w.registers, launch->frame, launch->frame_bytes);
  }
  Warp* running = nullptr;
  for (uint64_t k = 0; k < launch->block_count; ++k) {
    const uint64_t n = launch->blocks[k], rows = n / launch->grid[0];
    const uint64_t block[3] = {n % launch->grid[0], rows % launch->grid[1], rows / launch->grid[1]};
    for (Warp& w : warps) {
      w = Warp{.id = w.id, .registers = w.registers};
      const auto set = [&](int special, int lane, uint32_t value) {
        w.reg<uint32_t>(128 * special)[lane] = value;
      };
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int d = 0; d < 3; ++d) {
          set(kTid + d, lane, d ? 0 : 32 * w.id + lane);
          set(kCtaid + d, lane, block[d]);
          set(kNtid + d, lane, d ? 1 : 32 * launch->warps);
          set(kNctaid + d, lane, launch->grid[d]);
        }
        set(kLane, lane, lane);
        set(kWarp, lane, w.id);
        set(kLanemaskLt, lane, (1u << lane) - 1);
      }
    }
    for (Byte& b : bytes_known) b.pending = false, b.products = 0;
    try {
      run_block(warps, running);
    } catch (const Failure& failure) {
      std::snprintf(message, message_bytes, "%s; block (%lu, %lu, %lu), warp %d", failure.what(),
                    block[0], block[1], block[2], running->id);
      return running->pc - 1;
    }
  }
  for (uint64_t k = 0; launch->counts && k < 2 * launch->tensor_count; ++k) {
    make_distinct(sectors_touched[k]);
    launch->distinct[k] = sectors_touched[k].size();
  }
  return -1;
}
}
