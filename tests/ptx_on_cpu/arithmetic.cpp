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

// An operand as f takes it: a T of each lane; a bool of a predicate; of a Low<T> the low bytes,
// where a register may have more. Those of a result get its sign.
template <class T>
struct Low {
  T value;
};
template <class T>
struct Operand {
  T* at;
  Operand(Warp& w, const Instruction& i, int k) : at(w.reg<T>(i.operand[k])) {}
  T operator[](int lane) const { return at[lane]; }
  void set(int lane, T value) const { at[lane] = value; }
  static constexpr char kCode[] = {' ', '0' + sizeof(T), 0};
};
template <>
struct Operand<bool> {
  const u32* at;
  Operand(Warp& w, const Instruction& i, int k) : at(w.reg<const u32>(i.operand[k])) {}
  bool operator[](int lane) const { return *at >> lane & 1; }
  static constexpr char kCode[] = " 0";
};
template <class T>
struct Operand<Low<T>> {
  char* at;
  int64_t width;
  Operand(Warp& w, const Instruction& i, int k)
      : at(w.registers + i.operand[k]), width(i.number[0]) {}
  Low<T> operator[](int lane) const { return *reinterpret_cast<Low<T>*>(at + width * lane); }
  void set(int lane, Low<T> low) const {
    const s64 all = low.value;
    std::memcpy(at + width * lane, &all, width);
  }
  static constexpr char kCode[] = {' ', 'w', '0' + sizeof(T), 0};
};

// A predicate = f(lane) in every lane.
template <class F>
void decide(Warp& w, int predicate, F f) {
  if (predicate < 0) return;
  u32 result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result |= u32(f(lane)) << lane;
  u32& p = w.predicate(predicate);
  p = (p & ~w.mask) | (result & w.mask);
}

// operand 0 = f(operand 1, operand 2, ...) in every lane.
template <class F, class D, class... A, size_t... K>
void lanes(Warp& w, const Instruction& i, std::index_sequence<K...>) {
  const std::tuple<Operand<A>...> a(Operand<A>(w, i, K + 1)...);
  if constexpr (std::is_same_v<D, bool>) {
    decide(w, i.operand[0], [&](int lane) { return F{}(std::get<K>(a)[lane]...); });
  } else {
    const u32 mask = w.mask;
    const Operand<D> d(w, i, 0);
    for (int lane = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1) d.set(lane, F{}(std::get<K>(a)[lane]...));
  }
}
template <class F, class D, class... A>
Entry entry(D (F::*)(A...) const) {
  const Handler run = [](Warp& w, const Instruction& i) {
    lanes<F, D, A...>(w, i, std::index_sequence_for<A...>{});
  };
  return {run, (std::string(Operand<D>::kCode) + ... + Operand<A>::kCode)};
}
template <class F>
Entry map(F) {
  return entry(&F::operator());
}

// One register ↔ {a, b, ...}; number 0: parts, 1: their bytes.
template <bool PACK>
void parts(Warp& w, const Instruction& i) {
  const int count = static_cast<int>(i.number[0]), bytes = static_cast<int>(i.number[1]);
  each(w, [&](int lane) {
    char* const one = w.registers + i.operand[PACK ? 0 : count] + count * bytes * lane;
    for (int k = 0; k < count; ++k) {
      if (i.operand[PACK + k] < 0) continue;
      char* const part = w.registers + i.operand[PACK + k] + bytes * lane;
      std::memcpy(PACK ? one + k * bytes : part, PACK ? part : one + k * bytes, bytes);
    }
  });
}
void add_parts(Table& t, int count, int bytes) {
  const std::string part = std::to_string(bytes), whole = " " + std::to_string(count * bytes);
  const std::string name = std::to_string(count) + ".b" + std::to_string(8 * count * bytes);
  const std::string values = several(count, part);
  const std::string numbers = " #" + std::to_string(count) + " #" + part;
  t["pack" + name] = {parts<true>, whole + values + numbers};
  t["unpack" + name] = {parts<false>, values + whole + numbers};
}

// a·b + c of 32 bits: its low half, whose carry is kept; its high half, to which that is added.
template <bool HIGH>
void half_product(Warp& w, const Instruction& i) {
  const auto in = [&](int operand, int lane) { return u64(w.reg<u32>(i.operand[operand])[lane]); };
  each(w, [&](int lane) {
    const u64 product = in(1, lane) * in(2, lane), half = HIGH ? product >> 32 : u32(product);
    const u64 sum = half + in(3, lane) + (HIGH ? w.carry >> lane & 1 : 0);
    w.reg<u32>(i.operand[0])[lane] = sum;
    if (!HIGH) w.carry = (w.carry & ~(1u << lane)) | u32(sum >> 32) << lane;
  });
}

template <class T, class V>
V same(T value) {
  return value;
}
template <class T>
T flush(T value) {
  return std::fabs(value) < std::numeric_limits<T>::min() ? std::copysign(T(0), value) : value;
}

// What rounding to fewer bits makes of it is what that makes of `exact`: where bits are lost, the
// last one is 1.
f32 to_odd(long double exact) {
  const auto nearest = static_cast<f32>(exact);
  if (nearest == exact || __builtin_bit_cast(u32, nearest) & 1) return nearest;
  return std::nextafter(nearest, exact < nearest ? -INFINITY : INFINITY);
}

// Of a's upper half, and itself no more; NaN is always the same.
f64 half_rsqrt(f64 a) {
  const auto upper = [](f64 b) { return __builtin_bit_cast(u64, b) >> 32 << 32; };
  const f64 root = std::sqrt(flush(__builtin_bit_cast(f64, upper(a)))), result = 1 / root;
  const bool number = a == a && root == root;
  return __builtin_bit_cast(f64, number ? upper(result) : u64(0x7fffffff) << 32);
}

// a·b + c is sum + error: the product is exact in double, and so is the sum with its error.
struct Fused {
  f64 sum, error;
  Fused(f32 a, f32 b, f32 c) {
    const f64 product = f64(a) * b;
    sum = product + c;
    const f64 part = sum - product;
    error = (product - (sum - part)) + (c - part);
  }
};
f32 fused_down(f32 a, f32 b, f32 c) {
  const Fused exact(a, b, c);
  const auto nearest = static_cast<f32>(exact.sum);
  return nearest > exact.sum || (nearest == exact.sum && exact.error < 0)
             ? std::nextafter(nearest, -INFINITY)
             : nearest;
}
f32 fused_to_odd(f32 a, f32 b, f32 c) {
  const Fused exact(a, b, c);
  const bool keep = __builtin_bit_cast(u64, exact.sum) & 1 || !(exact.error < 0 || exact.error > 0);
  return to_odd(keep ? exact.sum : std::nextafter(exact.sum, exact.error * INFINITY));
}

template <class T>
T least(T a, T b) {  // of -0 and +0 it is -0, of a number and NaN the number
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T>
T most(T a, T b) {
  return -least(-a, -b);
}

// setp of both numbers of two pairs: a predicate each.
template <class T, class F>
void compare_pairs(Warp& w, const Instruction& i) {
  const Operand<Pair<T>> a(w, i, 2), b(w, i, 3);
  decide(w, i.operand[0], [&](int lane) { return F{}(a[lane].low, b[lane].low); });
  decide(w, i.operand[1], [&](int lane) { return F{}(a[lane].high, b[lane].high); });
}

// What types of all kinds have. Comparisons with a u are true for NaN, too.
template <class T>
void every(Table& t, const std::string& type) {
  t["mov." + type] = map([](T a) { return a; });
  t["selp." + type] = map([](T a, T b, bool p) { return p ? a : b; });
  const auto compared = [&](const std::string& name, auto f) {
    using F = decltype(f);
    const std::string of = "setp." + name + "." + type;
    t[of] = map([](T a, T b) { return F{}(a, b); });
    if constexpr (std::is_class_v<T>) t[of + "x2"] = {compare_pairs<T, F>, "0 0 4 4"};
  };
  const auto both = [&](const std::string& name, auto f) {
    using F = decltype(f);
    compared(name, f);
    if constexpr (!std::is_integral_v<T>)
      compared(name + "u", [](T a, T b) { return a != a || b != b || F{}(a, b); });
  };
  both("eq", [](T a, T b) { return a == b; });
  both("ne", [](T a, T b) { return a < b || a > b; });
  both("lt", [](T a, T b) { return a < b; });
  both("le", [](T a, T b) { return a <= b; });
  both("gt", [](T a, T b) { return a > b; });
  both("ge", [](T a, T b) { return a >= b; });
  compared("num", [](T a, T b) { return a == a && b == b; });
  compared("nan", [](T a, T b) { return a != a || b != b; });
}

template <int BITS, class A, class B, class C>
using Of16Or32Or64 = std::conditional_t<BITS == 16, A, std::conditional_t<BITS == 32, B, C>>;

template <class T>
void integers(Table& t, const std::string& type) {
  constexpr int kBits = 8 * sizeof(T);
  using U = std::make_unsigned_t<T>;
  using Wide = std::conditional_t<std::is_signed_v<T>, Of16Or32Or64<kBits, s32, s64, __int128>,
                                  Of16Or32Or64<kBits, u32, u64, unsigned __int128>>;
  const auto on = [&](const char* name) -> Entry& { return t[name + ("." + type)]; };
  every<T>(t, type);
  on("add") = map([](U a, U b) { return U(a + b); });
  on("sub") = map([](U a, U b) { return U(a - b); });
  on("mul.lo") = map([](U a, U b) { return U(u64(a) * b); });
  on("mul.hi") = map([](T a, T b) { return T(Wide(a) * b >> kBits); });
  on("mad.lo") = map([](U a, U b, U c) { return U(u64(a) * b + c); });
  on("neg") = map([](U a) { return U(-a); });
  on("not") = map([](U a) { return U(~a); });
  on("and") = map([](U a, U b) { return U(a & b); });
  on("or") = map([](U a, U b) { return U(a | b); });
  on("xor") = map([](U a, U b) { return U(a ^ b); });
  on("min") = map([](T a, T b) { return b < a ? b : a; });
  on("max") = map([](T a, T b) { return a < b ? b : a; });
  on("min.relu") = map([](T a, T b) { return std::max(T(0), std::min(a, b)); });
  on("abs") = map([](T a) { return a < 0 ? T(-U(a)) : a; });
  on("shl") = map([](U a, u32 b) { return b < kBits ? U(a << b) : U(0); });
  on("shr") = map([](T a, u32 b) { return T(b < kBits ? a >> b : a < 0 ? -1 : 0); });
  on("div") = map([](T a, T b) { return b == 0 ? T(-1) : T(Wide(a) / b); });
  on("rem") = map([](T a, T b) { return b == 0 ? a : T(Wide(a) % b); });
  if constexpr (kBits >= 32) {
    on("bfe") = map([](T a, u32 start, u32 count) {  // bits beyond a's are its sign
      const u32 unused = 2 * kBits - std::min<u32>(count & 255, 2 * kBits);
      const Wide moved = Wide(a) >> std::min<u32>(start & 255, kBits);
      return count & 255 ? T(moved << unused >> unused) : T(0);
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
    on("mul.wide") = map([](T a, T b) { return Wide(Wide(a) * b); });
    on("mad.wide") = map([](T a, T b, Wide c) { return Wide(u64(Wide(a) * b) + u64(c)); });
  }
}

// What goes in and comes out is put through Q: as it is, or flushed.
template <class T, T (*Q)(T)>
void floats(Table& t, const std::string& type) {
  const auto on = [&](const std::string& name) -> Entry& { return t[name + "." + type]; };
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
  // With three operands, from sm_100 on.
  on("min3") = map([](T a, T b, T c) { return least(least(Q(a), Q(b)), Q(c)); });
  on("max3") = map([](T a, T b, T c) { return most(most(Q(a), Q(b)), Q(c)); });
  on("min.NaN") = map([](T a, T b) { return a != a || b != b ? T(NAN) : least(Q(a), Q(b)); });
  on("max.NaN") = map([](T a, T b) { return a != a || b != b ? T(NAN) : most(Q(a), Q(b)); });
  on("sqrt") = on("sqrt.approx") = map([](T a) { return Q(std::sqrt(Q(a))); });
  on("rsqrt.approx") = map([](T a) { return Q(1 / std::sqrt(Q(a))); });
  on("rcp") = on("rcp.approx") = map([](T a) { return Q(1 / Q(a)); });
  on("ex2.approx") = map([](T a) { return Q(std::exp2(Q(a))); });
  on("lg2.approx") = map([](T a) { return Q(std::log2(Q(a))); });
}

template <class T, class F, class... A>  // f of float32, for T and for pairs of it
void lift(Table& t, const std::string& name, f32 (F::*)(A...) const) {
  const auto one = [](auto... each) { return T(F{}(f32(each)...)); };
  using One = decltype(one);
  t[name] = map([](std::conditional_t<true, T, A>... a) { return One{}(a...); });
  t[name + "x2"] = map([](std::conditional_t<true, Pair<T>, A>... a) {
    return Pair<T>{One{}(a.low...), One{}(a.high...)};
  });
}
template <class T>
void pairs(Table& t, const std::string& type) {
  const auto on = [&](const std::string& name, auto f) {
    lift<T>(t, name + "." + type, &decltype(f)::operator());
  };
  on("add", [](f32 a, f32 b) { return a + b; });
  on("sub", [](f32 a, f32 b) { return a - b; });
  on("mul", [](f32 a, f32 b) { return a * b; });
  if constexpr (std::is_same_v<T, f32>)
    on("fma", [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
  else
    on("fma", [](f32 a, f32 b, f32 c) { return fused_to_odd(a, b, c); });
}

// Of dp2a: two 16-bit numbers times the two low bytes of another word, added up.
u32 dot(u32 a, u32 b, u32 c) { return (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255) + c; }

// A function of a number of each integer type, and the type's name.
template <class F>
void each_integer(F f) {
  f(u8{}, "u8"), f(s8{}, "s8"), f(u16{}, "u16"), f(s16{}, "s16");
  f(u32{}, "u32"), f(s32{}, "s32"), f(u64{}, "u64"), f(s64{}, "s64");
}
template <class T>  // 8 bits are in a register of 16
using Register =
    std::conditional_t<sizeof(T) == 1, std::conditional_t<std::is_signed_v<T>, s16, u16>, T>;

// A whole float as an integer: held to the type's range. NaN is 0, with 64 bits the first bit
// alone.
template <class D, class S>
D held(S value) {
  using Limits = std::numeric_limits<D>;
  if (value != value)
    return std::max(sizeof(D), sizeof(S)) < 8 ? D(0) : D(1ull << (8 * sizeof(D) - 1));
  if (value <= static_cast<S>(Limits::min())) return Limits::min();
  return value >= static_cast<S>(Limits::max()) ? Limits::max() : static_cast<D>(value);
}

// Conversions of a float that are rounded to a whole number; what goes in is put through Q.
template <class S, class V, V (*Q)(S)>
void roundings(Table& t, const std::string& ftz, const std::string& from) {
  const auto on = [&](const std::string& how, auto f) {
    using F = decltype(f);
    const std::string name = "cvt." + how + ftz + ".";
    each_integer([&](auto d, const char* to) {
      t[name + to + "." + from] = map([](S a) { return Low{held<decltype(d)>(F{}(Q(a)))}; });
    });
    t[name + from + "." + from] = map([](S a) { return S(F{}(Q(a))); });
  };
  on("rzi", [](V a) { return std::trunc(a); });
  on("rmi", [](V a) { return std::floor(a); });
  on("rpi", [](V a) { return std::ceil(a); });
  on("rni", [](V a) { return std::nearbyint(a); });
}

template <class T>
void halves(Table& t, const std::string& type) {
  every<T>(t, type), pairs<T>(t, type), roundings<T, f32, same>(t, "", type);
  // Mixed, from sm_100 on.
  t["add.f32." + type] = map([](T a, f32 b) { return a + b; });
  t["sub.f32." + type] = map([](T a, f32 b) { return a - b; });
  t["fma.f32." + type] = map([](T a, T b, f32 c) { return std::fma(f32(a), f32(b), c); });
  t["cvt.f64." + type] = map([](T a) { return f64(a); });
  t["cvt.f32." + type] = map([](T a) { return f32(a); });
  t["cvt." + type + ".f32"] = map([](f32 a) { return T(a); });
  t["cvt." + type + "x2.f32"] = map([](f32 high, f32 low) { return Pair<T>{low, high}; });
  each_integer([&](auto s, const char* from) {
    t["cvt." + type + "." + from] = map([](Low<decltype(s)> a) { return T(to_odd(a.value)); });
  });
}

}  // namespace

void add_arithmetic(Table& t) {
  integers<u16>(t, "u16"), integers<s16>(t, "s16"), integers<u16>(t, "b16");
  integers<u32>(t, "u32"), integers<s32>(t, "s32"), integers<u32>(t, "b32");
  integers<u64>(t, "u64"), integers<s64>(t, "s64"), integers<u64>(t, "b64");
  every<f32>(t, "f32"), every<f64>(t, "f64");
  floats<f32, same>(t, "f32"), floats<f64, same>(t, "f64"), floats<f32, flush>(t, "ftz.f32");
  pairs<f32>(t, "f32"), halves<f16>(t, "f16"), halves<bf16>(t, "bf16");
  t["rsqrt.approx.ftz.f64"] = map([](f64 a) { return half_rsqrt(a); });
  t["fma.rm.f32"] = map([](f32 a, f32 b, f32 c) { return fused_down(a, b, c); });
  t["fma.rm.ftz.f32"] =
      map([](f32 a, f32 b, f32 c) { return flush(fused_down(flush(a), flush(b), flush(c))); });
  each_integer([&](auto s, const std::string& from) {
    using S = decltype(s);
    each_integer([&](auto d, const std::string& to) {
      using D = decltype(d);
      t["cvt." + to + "." + from] = map([](Low<S> a) { return Register<D>(D(a.value)); });
    });
    t["cvt.f32." + from] = map([](Low<S> a) { return f32(a.value); });
    t["cvt.f64." + from] = map([](Low<S> a) { return f64(a.value); });
  });
  roundings<f32, f32, same>(t, "", "f32"), roundings<f64, f64, same>(t, "", "f64");
  roundings<f32, f32, flush>(t, ".ftz", "f32");
  t["cvt.f32.f32"] = map([](f32 a) { return a; });
  t["cvt.f64.f64"] = map([](f64 a) { return a; });
  t["cvt.f64.f32"] = map([](f32 a) { return f64(a); });
  t["cvt.f32.f64"] = map([](f64 a) { return f32(a); });
  t["cvt.ftz.f32.f32"] = map([](f32 a) { return flush(a); });
  t["cvt.sat.f32.f32"] = map([](f32 a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; });
  t["cvt.ftz.sat.f32.f32"] = map([](f32 a) { return flush(a) > 0 ? std::min(a, 1.0f) : 0.0f; });
  t["cvta.to.global.u64"] = t["cvta.global.u64"] = map([](u64 a) { return a; });
  add_parts(t, 2, 1), add_parts(t, 2, 2), add_parts(t, 4, 1);
  add_parts(t, 2, 4), add_parts(t, 4, 2);
  t["and.pred"] = map([](bool a, bool b) { return a && b; });
  t["or.pred"] = map([](bool a, bool b) { return a || b; });
  t["xor.pred"] = map([](bool a, bool b) { return a != b; });
  t["not.pred"] = map([](bool a) { return !a; });
  t["mov.pred"] = map([](bool a) { return a; });
  t["mad.lo.cc.u32"] = {half_product<false>, "4 4 4 4"};
  t["madc.hi.u32"] = {half_product<true>, "4 4 4 4"};
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
  t["dp2a.lo.u32.u32"] = map([](u32 a, u32 b, u32 c) { return dot(a, b, c); });
  t["dp2a.hi.u32.u32"] = map([](u32 a, u32 b, u32 c) { return dot(a, b >> 16, c); });
  t["popc.b32"] = map([](u32 a) { return u32(__builtin_popcount(a)); });
  t["shf.l.wrap.b32"] = map(
      [](u32 low, u32 high, u32 by) { return u32((u64(high) << 32 | low) << (by & 31) >> 32); });
  t["shf.r.wrap.b32"] =
      map([](u32 low, u32 high, u32 by) { return u32((u64(high) << 32 | low) >> (by & 31)); });
  t["bfind.u32"] = map([](u32 a) { return a ? u32(31 - __builtin_clz(a)) : kAll; });
  t["bfind.shiftamt.u32"] = map([](u32 a) { return a ? u32(__builtin_clz(a)) : kAll; });
}

}  // namespace ptx
