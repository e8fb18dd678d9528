// What each lane computes for itself: integers, floating point, conversions, predicates.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptx {
namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

// operand 0 = f(operand 1, operand 2, ...) in every lane; the registers' types are those of f.
template <class F, class D, class... A, size_t... K>
void lanes(Warp& w, const Instruction& i, std::index_sequence<K...>) {
  D* const d = w.reg<D>(i.operand[0]);
  const std::tuple<const A*...> a(w.reg<const A>(i.operand[K + 1])...);
  for (int lane = 0; lane < kLanes; ++lane)
    if (w.mask >> lane & 1) d[lane] = F{}(std::get<K>(a)[lane]...);
}
template <class F, class D, class... A>
Handler handler(D (F::*)(A...) const) {
  return [](Warp& w, const Instruction& i) {
    lanes<F, D, A...>(w, i, std::index_sequence_for<A...>{});
  };
}
template <class F>
Handler map(F) {
  return handler(&F::operator());
}

// setp: operands p, q (its complement, may be absent), a, b and, combined with a predicate, c.
enum Combine { kNone, kAnd, kOr, kXor };  // number 0
template <class F, class T>
void compare(Warp& w, const Instruction& i) {
  const T *const a = w.reg<T>(i.operand[2]), *const b = w.reg<T>(i.operand[3]);
  uint32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= uint32_t(F{}(a[lane], b[lane])) << lane;
  const auto how = static_cast<Combine>(i.number[0]);
  const uint32_t c = how == kNone ? 0 : w.predicate(i.operand[4]);
  const auto set = [&](int operand, uint32_t bits) {
    if (operand < 0) return;
    bits = how == kAnd ? bits & c : how == kOr ? bits | c : how == kXor ? bits ^ c : bits;
    uint32_t& p = w.predicate(operand);
    p = (p & ~w.mask) | (bits & w.mask);
  };
  set(i.operand[0], found);
  set(i.operand[1], ~found);
}

template <class T>
void select(Warp& w, const Instruction& i) {
  T* const d = w.reg<T>(i.operand[0]);
  const T *const a = w.reg<T>(i.operand[1]), *const b = w.reg<T>(i.operand[2]);
  const uint32_t p = w.predicate(i.operand[3]), mask = w.mask;
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) d[lane] = p >> lane & 1 ? a[lane] : b[lane];
}

template <class F>
void predicates(Warp& w, const Instruction& i) {
  const uint32_t result =
      F{}(w.predicate(i.operand[1]), i.operand[2] < 0 ? 0u : w.predicate(i.operand[2]));
  uint32_t& p = w.predicate(i.operand[0]);
  p = (p & ~w.mask) | (result & w.mask);
}
template <class F>
Handler logic(F) {
  return &predicates<F>;
}

// {a, b, ...} ↔ one register; number 0: parts, 1: their bytes.
template <bool PACK>
void parts(Warp& w, const Instruction& i) {
  const int count = static_cast<int>(i.number[0]), bytes = static_cast<int>(i.number[1]);
  const int whole_operand = PACK ? 0 : count, first = PACK ? 1 : 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(w.mask >> lane & 1)) continue;
    char* const one = w.registers + i.operand[whole_operand] + count * bytes * lane;
    for (int k = 0; k < count; ++k) {
      if (i.operand[first + k] < 0) continue;
      char* const part = w.registers + i.operand[first + k] + bytes * lane;
      std::memcpy(PACK ? one + k * bytes : part, PACK ? part : one + k * bytes, bytes);
    }
  }
}

template <class T>
T from_float(f32 value);
template <>
f16 from_float<f16>(f32 value) {
  return value == value ? static_cast<f16>(value) : __builtin_bit_cast(f16, u16(0x7fff));
}
template <>
bf16 from_float<bf16>(f32 value) {
  const u32 bits = __builtin_bit_cast(u32, value);
  return {value == value ? u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : u16(0x7fff)};
}
template <class T>
T same(T value) {
  return value;
}
f32 flush(f32 value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

// a·b + c rounded down. The product is exact in double, and so is the sum with its error.
f32 fused_down(f32 a, f32 b, f32 c) {
  const f64 product = f64(a) * b, sum = product + c, part = sum - product;
  const f64 error = (product - (sum - part)) + (c - part);
  const auto found = static_cast<f32>(sum);
  return found > sum || (found == sum && error < 0) ? std::nextafter(found, -INFINITY) : found;
}

template <class T>
T least(T a, T b) {  // of -0 and +0 it is -0, of a number and NaN the number
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T>
T most(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? b : a) : a < b ? b : a;
}

// Two halves of a 32-bit register, each with F.
template <class T, class F, class... A>
u32 both(A... words) {
  u32 result = 0;
  for (int h = 0; h < 2; ++h) {
    const auto part = [h](u32 word) {
      return to_float(__builtin_bit_cast(T, static_cast<u16>(word >> (16 * h))));
    };
    result |= u32(__builtin_bit_cast(u16, from_float<T>(F{}(part(words)...)))) << (16 * h);
  }
  return result;
}

// A whole float as an integer: held to the type's range, NaN is 0.
template <class D, class S>
D held(S value) {
  if (value != value) return 0;
  if (value <= static_cast<S>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  if (value >= static_cast<S>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  return static_cast<D>(value);
}

template <class T>
void comparisons(Table& t, const std::string& type) {
  const auto add = [&](const char* name, auto f) {
    t[std::string("setp.") + name + "." + type] = compare<decltype(f), T>;
  };
  add("eq", [](T a, T b) { return a == b; });
  if constexpr (std::is_floating_point_v<T>) {
    add("ne", [](T a, T b) { return a < b || a > b; });
    add("equ", [](T a, T b) { return !(a < b || a > b); });
    add("neu", [](T a, T b) { return a != b; });
    add("ltu", [](T a, T b) { return !(a >= b); });
    add("leu", [](T a, T b) { return !(a > b); });
    add("gtu", [](T a, T b) { return !(a <= b); });
    add("geu", [](T a, T b) { return !(a < b); });
    add("num", [](T a, T b) { return a == a && b == b; });
    add("nan", [](T a, T b) { return a != a || b != b; });
  } else {
    add("ne", [](T a, T b) { return a != b; });
  }
  add("lt", [](T a, T b) { return a < b; });
  add("le", [](T a, T b) { return a <= b; });
  add("gt", [](T a, T b) { return a > b; });
  add("ge", [](T a, T b) { return a >= b; });
}

template <class T>
void selections(Table& t, const std::string& type) {
  t["mov." + type] = map([](T a) { return a; });
  t["selp." + type] = select<T>;
}

template <class T>
void integers(Table& t, const std::string& type) {
  constexpr int kBits = 8 * sizeof(T);
  using U = std::make_unsigned_t<T>;
  const auto on = [&](const char* name) -> Handler& { return t[name + ("." + type)]; };
  comparisons<T>(t, type), selections<T>(t, type);
  on("add") = map([](U a, U b) { return U(a + b); });
  on("sub") = map([](U a, U b) { return U(a - b); });
  on("mul.lo") = map([](U a, U b) { return U(u64(a) * b); });
  on("mad.lo") = map([](U a, U b, U c) { return U(u64(a) * b + c); });
  on("neg") = map([](U a) { return U(-a); });
  on("not") = map([](U a) { return U(~a); });
  on("and") = map([](U a, U b) { return U(a & b); });
  on("or") = map([](U a, U b) { return U(a | b); });
  on("xor") = map([](U a, U b) { return U(a ^ b); });
  on("min") = map([](T a, T b) { return b < a ? b : a; });
  on("max") = map([](T a, T b) { return a < b ? b : a; });
  on("min.relu") = map([](T a, T b) { return std::max(T(0), std::min(a, b)); });
  on("max.relu") = map([](T a, T b) { return std::max({T(0), a, b}); });
  on("abs") = map([](T a) { return a < 0 ? T(-U(a)) : a; });
  on("shl") = map([](U a, u32 b) { return b < kBits ? U(a << b) : U(0); });
  on("shr") = map([](T a, u32 b) { return T(b < kBits ? a >> b : a < 0 ? -1 : 0); });
  on("div") = map([](T a, T b) {
    return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(-U(a)) : T(a / b);
  });
  on("rem") = map([](T a, T b) {
    return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
  });
  if constexpr (kBits == 16) on("mul.hi") = map([](T a, T b) { return T(s64(a) * b >> 16); });
  if constexpr (kBits == 32 || kBits == 64) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    on("mul.hi") = map([](T a, T b) { return T(Wide(a) * b >> kBits); });
    on("bfe") = map([](T a, u32 start, u32 count) {
      start &= 255, count &= 255;
      if (count == 0) return T(0);
      const bool sign =
          std::is_signed_v<T> && (U(a) >> std::min<u32>(start + count - 1, kBits - 1) & 1);
      U bits = start < kBits ? U(a) >> start : 0;
      const u32 there = start < kBits ? std::min<u32>(count, kBits - start) : 0;
      if (there < kBits) bits = (bits & ((U(1) << there) - 1)) | (sign ? U(~U(0)) << there : U(0));
      return T(bits);
    });
    on("bfi") = map([](U a, U b, u32 start, u32 count) {
      start &= 255, count &= 255;
      if (count == 0 || start >= kBits) return b;
      const U field = (count >= kBits ? U(~U(0)) : U((U(1) << count) - 1)) << start;
      return U((b & ~field) | ((a << start) & field));
    });
    on("brev") = map([](U a) {
      U r = 0;
      for (int k = 0; k < kBits; ++k) r |= (a >> k & 1) << (kBits - 1 - k);
      return r;
    });
  }
  if constexpr (kBits < 64) {
    using D = std::conditional_t<std::is_signed_v<T>, std::conditional_t<kBits == 32, s64, s32>,
                                 std::conditional_t<kBits == 32, u64, u32>>;
    on("mul.wide") = map([](T a, T b) { return D(D(a) * D(b)); });
    on("mad.wide") = map([](T a, T b, D c) { return D(u64(D(a) * D(b)) + u64(c)); });
  }
}

// What goes in and comes out is put through Q: as it is, or flushed.
template <class T, T (*Q)(T)>
void floats(Table& t, const std::string& type) {
  const auto on = [&](const std::string& name) -> Handler& { return t[name + "." + type]; };
  // Sums and products without .rn may be contracted by ptxas; here they are not.
  on("add") = map([](T a, T b) { return Q(Q(a) + Q(b)); });
  on("sub") = map([](T a, T b) { return Q(Q(a) - Q(b)); });
  on("mul") = map([](T a, T b) { return Q(Q(a) * Q(b)); });
  on("div") = on("div.approx") = map([](T a, T b) { return Q(Q(a) / Q(b)); });
  on("fma") = map([](T a, T b, T c) { return Q(std::fma(Q(a), Q(b), Q(c))); });
  on("neg") = map([](T a) { return Q(-a); });
  on("abs") = map([](T a) { return Q(std::fabs(a)); });
  on("min") = map([](T a, T b) { return least(Q(a), Q(b)); });
  on("max") = map([](T a, T b) { return most(Q(a), Q(b)); });
  on("min.NaN") = map([](T a, T b) { return a != a || b != b ? T(NAN) : least(Q(a), Q(b)); });
  on("max.NaN") = map([](T a, T b) { return a != a || b != b ? T(NAN) : most(Q(a), Q(b)); });
  on("sqrt") = on("sqrt.approx") = map([](T a) { return Q(std::sqrt(Q(a))); });
  on("rcp") = on("rcp.approx") = map([](T a) { return Q(1 / Q(a)); });
  on("ex2.approx") = map([](T a) { return Q(std::exp2(Q(a))); });
  on("lg2.approx") = map([](T a) { return Q(std::log2(Q(a))); });
}

template <class T>
void halves(Table& t, const std::string& type) {
  const auto two = [&](const char* name, auto f) {
    using F = decltype(f);
    t[name + ("." + type)] =
        map([](T a, T b) { return from_float<T>(F{}(to_float(a), to_float(b))); });
    t[name + ("." + type + "x2")] = map([](u32 a, u32 b) { return both<T, F>(a, b); });
  };
  two("add", [](f32 a, f32 b) { return a + b; });
  two("sub", [](f32 a, f32 b) { return a - b; });
  two("mul", [](f32 a, f32 b) { return a * b; });
  two("min", [](f32 a, f32 b) { return least(a, b); });
  two("max", [](f32 a, f32 b) { return most(a, b); });
  // Exact in double, but for a double rounding that takes a sum within 2^-53 of a tie.
  const auto fused = [](f32 a, f32 b, f32 c) { return f32(f64(a) * b + c); };
  using Fused = decltype(fused);
  t["fma." + type] = map(
      [](T a, T b, T c) { return from_float<T>(Fused{}(to_float(a), to_float(b), to_float(c))); });
  t["fma." + type + "x2"] = map([](u32 a, u32 b, u32 c) { return both<T, Fused>(a, b, c); });
  // Mixed, from sm_100 on.
  t["add.f32." + type] = map([](T a, f32 b) { return to_float(a) + b; });
  t["sub.f32." + type] = map([](T a, f32 b) { return to_float(a) - b; });
  t["fma.f32." + type] = map([](T a, T b, f32 c) { return std::fma(to_float(a), to_float(b), c); });
  t["neg." + type] = map([](u16 a) { return u16(a ^ 0x8000); });
  t["neg." + type + "x2"] = map([](u32 a) { return a ^ 0x80008000u; });
  t["abs." + type] = map([](u16 a) { return u16(a & 0x7fff); });
  t["abs." + type + "x2"] = map([](u32 a) { return a & 0x7fff7fffu; });
  t["cvt.f64." + type] = map([](T a) { return f64(to_float(a)); });
  t["cvt.f32." + type] = map([](T a) { return to_float(a); });
  t["cvt." + type + ".f32"] = map([](f32 a) { return from_float<T>(a); });
  t["cvt." + type + "x2.f32"] = map([](f32 high, f32 low) {
    return u32(__builtin_bit_cast(u16, from_float<T>(high))) << 16 |
           __builtin_bit_cast(u16, from_float<T>(low));
  });
}

// Of dp2a: two 16-bit numbers times the two low bytes of another word, added up.
u32 dot(u32 a, u32 b, u32 c) { return (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255) + c; }

// Two float32 in a 64-bit register, from sm_100 on.
struct Pair {
  f32 low, high;
};
void pairs(Table& t) {
  using P = Pair;
  t["add.f32x2"] = map([](P a, P b) { return P{a.low + b.low, a.high + b.high}; });
  t["sub.f32x2"] = map([](P a, P b) { return P{a.low - b.low, a.high - b.high}; });
  t["mul.f32x2"] = map([](P a, P b) { return P{a.low * b.low, a.high * b.high}; });
  t["fma.f32x2"] = map([](P a, P b, P c) {
    return P{std::fma(a.low, b.low, c.low), std::fma(a.high, b.high, c.high)};
  });
}

// Conversions of integers: a register of S holds an N in its low bytes.
template <class S, class N>
void from_integer(Table& t, const std::string& from) {
  const auto to = [&](auto d, const char* name, auto narrow) {
    using D = decltype(d);
    using M = decltype(narrow);
    t["cvt." + std::string(name) + "." + from] = map([](S a) { return D(M(N(a))); });
  };
  to(u16{}, "u8", u8{}), to(s16{}, "s8", s8{}), to(u16{}, "u16", u16{}), to(s16{}, "s16", s16{});
  to(u32{}, "u32", u32{}), to(s32{}, "s32", s32{}), to(u64{}, "u64", u64{}),
      to(s64{}, "s64", s64{});
  to(f32{}, "f32", f32{}), to(f64{}, "f64", f64{});
}

// Conversions of a float that are rounded to a whole number.
template <class S, class F>
void rounded(Table& t, const std::string& how, const std::string& from, F) {
  const auto to = [&](auto d, const char* name) {
    using D = decltype(d);
    t["cvt." + how + "." + name + "." + from] = map([](S a) { return held<D>(F{}(a)); });
  };
  to(s32{}, "s32"), to(u32{}, "u32"), to(s64{}, "s64"), to(u64{}, "u64");
  t["cvt." + how + "." + from + "." + from] = map([](S a) { return F{}(a); });
}
template <class S>
void roundings(Table& t, const std::string& from) {
  rounded<S>(t, "rzi", from, [](S a) { return std::trunc(a); });
  rounded<S>(t, "rmi", from, [](S a) { return std::floor(a); });
  rounded<S>(t, "rpi", from, [](S a) { return std::ceil(a); });
  rounded<S>(t, "rni", from, [](S a) { return std::nearbyint(a); });
}

}  // namespace

void add_arithmetic(Table& t) {
  integers<u16>(t, "u16"), integers<s16>(t, "s16"), integers<u16>(t, "b16");
  integers<u32>(t, "u32"), integers<s32>(t, "s32"), integers<u32>(t, "b32");
  integers<u64>(t, "u64"), integers<s64>(t, "s64"), integers<u64>(t, "b64");
  comparisons<f32>(t, "f32"), comparisons<f64>(t, "f64");
  selections<f32>(t, "f32"), selections<f64>(t, "f64");
  floats<f32, same>(t, "f32"), floats<f64, same>(t, "f64"), floats<f32, flush>(t, "ftz.f32");
  t["fma.rm.f32"] = map([](f32 a, f32 b, f32 c) { return fused_down(a, b, c); });
  t["fma.rm.ftz.f32"] =
      map([](f32 a, f32 b, f32 c) { return flush(fused_down(flush(a), flush(b), flush(c))); });
  halves<f16>(t, "f16"), halves<bf16>(t, "bf16");
  pairs(t);
  t["prmt.b32"] = map([](u32 a, u32 b, u32 c) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
      const u32 pick = c >> (4 * k) & 15;
      u32 byte = bytes >> (8 * (pick & 7)) & 255;
      if (pick & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << (8 * k);
    }
    return result;
  });
  t["dp2a.lo"] = map([](u32 a, u32 b, u32 c) { return dot(a, b, c); });
  t["dp2a.hi"] = map([](u32 a, u32 b, u32 c) { return dot(a, b >> 16, c); });
  t["and.pred"] = logic([](u32 a, u32 b) { return a & b; });
  t["or.pred"] = logic([](u32 a, u32 b) { return a | b; });
  t["xor.pred"] = logic([](u32 a, u32 b) { return a ^ b; });
  t["not.pred"] = logic([](u32 a, u32) { return ~a; });
  t["mov.pred"] = logic([](u32 a, u32) { return a; });
  t["pack"] = parts<true>;
  t["unpack"] = parts<false>;
  from_integer<u16, u8>(t, "u8"), from_integer<s16, s8>(t, "s8");
  // The same, from the low bytes of a register of 4 or 8.
  from_integer<u32, u8>(t, "u8in4"), from_integer<u32, s8>(t, "s8in4");
  from_integer<u32, u16>(t, "u16in4"), from_integer<u32, s16>(t, "s16in4");
  from_integer<u64, u8>(t, "u8in8"), from_integer<u64, s8>(t, "s8in8");
  from_integer<u64, u32>(t, "u32in8"), from_integer<u64, s32>(t, "s32in8");
  from_integer<u16, u16>(t, "u16"), from_integer<s16, s16>(t, "s16");
  from_integer<u32, u32>(t, "u32"), from_integer<s32, s32>(t, "s32");
  from_integer<u64, u64>(t, "u64"), from_integer<s64, s64>(t, "s64");
  roundings<f32>(t, "f32"), roundings<f64>(t, "f64");
  t["cvt.f64.f32"] = map([](f32 a) { return f64(a); });
  t["cvt.f32.f64"] = map([](f64 a) { return f32(a); });
  t["cvt.sat.f32.f32"] = map([](f32 a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; });
  t["popc.b32"] = map([](u32 a) { return u32(__builtin_popcount(a)); });
  t["cvt.ftz.sat.f32.f32"] = map([](f32 a) { return flush(a) > 0 ? std::min(a, 1.0f) : 0.0f; });
  t["shf.l.wrap.b32"] = map(
      [](u32 low, u32 high, u32 by) { return u32((u64(high) << 32 | low) << (by & 31) >> 32); });
  t["shf.r.wrap.b32"] =
      map([](u32 low, u32 high, u32 by) { return u32((u64(high) << 32 | low) >> (by & 31)); });
  t["bfind.u32"] = map([](u32 a) { return a ? u32(31 - __builtin_clz(a)) : kAll; });
  t["bfind.shiftamt.u32"] = map([](u32 a) { return a ? u32(__builtin_clz(a)) : kAll; });
  t["cvt.ftz.f32.f32"] = map([](f32 a) { return flush(a); });
  t["cvt.rmi.ftz.f32.f32"] = map([](f32 a) { return std::floor(flush(a)); });
}

}  // namespace ptx
