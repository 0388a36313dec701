// The arithmetic of mirror_step. Formula: include/pysteep/mirror_step.h.
//
// With y = z + balance the equation of the balanced factors is (y - balance) y^(L-1) = |x|^q. Their step needs y alone: with
// u and s the signed powers of g and x, and k = 1 - lr weight_decay,
//
//     x <- (k x - lr u y^(L-1)) (k - lr u s / y)^(L-1)
//
// since w_2 = y^(1/q), |w_1|^q = |x|^q / y^(L-1). mirror_excess is of the equation as it stands. Where its powers overflow or
// underflow, and on a GPU for every element, it is solved in units of unit = max(balance, root), root = |x|^(q/L): there
// low = balance / unit <= 1, size = root / unit <= 1, and
//
//     (r - low) r^(L-1) = size^L,   1 <= r = y / unit <= 1 + at_one,   at_one (1 + at_one)^(L-1) = 1
//
// has one solution, on which nothing overflows.
#pragma once

#include "math/factor_step.h"
#include "pysteep/mirror_step.h"

namespace pysteep {
inline namespace PYSTEEP_ISA {

template <typename T>
struct MirrorNumbers {
  T gradient_factor, step, decay_rate;  // decay_rate = lr weight_decay
  T balance;
  T depth, others;                   // L, L - 1
  T at_one, slope, curvature;        // of the first guess
  T close;                           // so close iterates make the next one right to 2 ulp
  PowerExponent<T> root, direction;  // q / L, q - 1
};

PYSTEEP_INLINE double mirror_at_one(int64_t depth) {
  double low = 0, high = 1;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (middle * integer_power(1 + middle, depth - 1) < 1 ? low : high) = middle;
  }
  return low;
}

// So close iterates make the next one right to 2 ulp: Halley's iteration cubes the error, times (L^2 - 1) / 12 at most.
template <typename T>
PYSTEEP_INLINE double mirror_close(double depth) {
  return (sizeof(T) == sizeof(float) ? 7.5e-3 : 8e-6) / ::cbrt(depth * depth);
}

// But for the balance, which is one number for each weight. `at_one` is mirror_at_one(depth).
template <typename T>
PYSTEEP_INLINE MirrorNumbers<T> mirror_numbers(const pysteep_steepest_options& options, int64_t depth, double at_one) {
  const double lr = read(options.lr), inverse_scale = 1.0 / read(options.grad_scale);
  const double count = double(depth), q = options.q;
  return {T(options.maximize ? -inverse_scale : inverse_scale),
          T(lr),
          T(lr * options.weight_decay),
          T(0),
          T(count),
          T(count - 1),
          T(at_one),
          T(1 / count),
          T(at_one - 1 / count),
          T(mirror_close<T>(count)),
          PowerExponent<T>::of(q / count),
          PowerExponent<T>::of(q - 1)};
}

template <typename T>
PYSTEEP_INLINE T mirror_unit(T root, const MirrorNumbers<T>& numbers) {
  return root > numbers.balance ? root : numbers.balance;
}

// Exact where low or size^L is 0 or 1, within 3 % of the solution in between.
template <typename T>
PYSTEEP_INLINE T mirror_guess(T low, T size_power, const MirrorNumbers<T>& numbers) {
  return T(1) +
         low * (numbers.slope + numbers.curvature * low) * size_power / (numbers.at_one + size_power * (T(1) - numbers.at_one));
}

// One step of Halley's iteration; `power` = r^(L-1). The function is increasing and convex.
template <typename T>
PYSTEEP_INLINE T mirror_halley(T r, T power, T low, T size_power, const MirrorNumbers<T>& numbers) {
  const T value = (r - low) * power - size_power;
  const T first = power * (numbers.depth * r - numbers.others * low);  // times r: the derivatives are r^-1 and r^-2 of these
  const T second = numbers.others * power * (numbers.depth * r - (numbers.others - T(1)) * low);
  return r - r * (T(2) * value * first) / (T(2) * first * first - value * second);
}

constexpr int mirror_iterations = 6;  // of Halley's; the few that are left then are bisected

// For the few that the iteration leaves: bisection as long as Halley's step leaves the bracket.
template <typename T>
PYSTEEP_INLINE T mirror_safeguarded(T r, T low, T size_power, int64_t depth, const MirrorNumbers<T>& numbers) {
  T below = T(1), above = T(1) + numbers.at_one;
  for (int i = 0; i < 100; ++i) {
    const T power = integer_power(r, depth - 1);
    ((r - low) * power < size_power ? below : above) = r;
    T next = mirror_halley(r, power, low, size_power, numbers);
    if (!(next >= below && next <= above)) next = T(0.5) * (below + above);
    const T change = magnitude(next - r);
    r = next;
    if (!(change > numbers.close * r)) break;
  }
  return r;
}

// ---- The same equation without a root, for vectors: (y - balance) y^(L-1) = |x|^q ----

// What one balance makes of the equation: numbers of the first guess and of Halley's iteration.
template <typename T>
struct MirrorSearch {
  T slope, shift, balance_bits, height, left, right;  // of the guess, which reckons in bits
  T depth, balance, bound, half_others, half_bound;   // bound = (L - 1) balance
  typename FloatBits<T>::Int close;                   // so near iterates make the next one right to 2 ulp
  T smallest;                                         // y whose powers in mirror_excess have all their digits
};

// Mitchell's approximation: the bits of a positive number, read as an integer, are its logarithm to 6 %.
template <typename T>
PYSTEEP_INLINE T mitchell_bits(T x) {
  return T(bit_cast<typename FloatBits<T>::Int>(x));
}

// log2 y is max(log2 root, log2 balance) and a hill where the two meet, here a parabola on either side.
template <typename T>
PYSTEEP_INLINE MirrorSearch<T> mirror_search(double q, int64_t depth, double at_one, T balance) {
  const double count = double(depth), slope = q / count, others = count - 1;
  const double unit = double(typename FloatBits<T>::Int(1) << FloatBits<T>::mantissa);
  const double middle = 0.043 * unit;  // of the approximation's errors, which lie in 0 to 0.086
  return {T(slope),
          T(double(mitchell_bits(T(1))) * (1 - slope) + middle * (slope - 1)),
          mitchell_bits(balance),
          T(::log2(1 + at_one) * unit),
          T(-(0.2 + 0.1 * count) / unit),
          T(0.2 * ::pow(count, 0.28) / unit),
          T(count),
          balance,
          T(others * double(balance)),
          T(0.5 * others),
          T(0.5 * others * double(balance)),
          typename FloatBits<T>::Int((::log2(mirror_close<T>(count)) + 0.086) * unit),
          T(::exp2((sizeof(T) == sizeof(float) ? -100 : -960) / (count + 1)))};
}

// L log y to 0.5 at L = 10, 2 at L = 64; balance > 0.
template <typename T>
PYSTEEP_INLINE T mirror_first_guess(T size, const MirrorSearch<T>& search) {
  using Int = typename FloatBits<T>::Int;
  const T root = multiply_add(mitchell_bits(size), search.slope, search.shift), beyond = root - search.balance_bits;
  const T larger = root > search.balance_bits ? root : search.balance_bits;
  const T before = search.left * beyond, after = search.right * beyond;
  const T side = T(1) - (before > after ? before : after), hill = side > T(0) ? side : T(0);
  return bit_cast<T>(Int(multiply_add(search.height * hill, hill, larger)));
}

// y less what Halley's iteration makes of it; power = y^(L-1).
template <typename T>
PYSTEEP_INLINE T mirror_excess(T y, T power, T power_of_x, const MirrorSearch<T>& search) {
  const T value = multiply_add(y - search.balance, power, -power_of_x);
  const T first = multiply_add(search.depth, y, -search.bound);                 // of the derivatives: times power / y
  const T second = multiply_add(search.half_others, first, search.half_bound);  // times 2 power / y^2
  return y * (value * first) / multiply_add(-value, second, first * power * first);
}

// No NaN goes on, and nothing below the smallest solution.
template <typename T>
PYSTEEP_INLINE T mirror_next(T y, T excess, const MirrorSearch<T>& search) {
  return y - excess > search.balance ? y - excess : search.balance;
}

// log2 |excess / y| in bits, to 0.086; larger than any where the excess is not a number.
template <typename T>
PYSTEEP_INLINE typename FloatBits<T>::Int mirror_nearness(T excess, T y) {
  using Int = typename FloatBits<T>::Int;
  return bit_cast<Int>(magnitude(excess)) - bit_cast<Int>(y);
}

// ---- The step ----

// (1 + e)^n - 1 without a loop; `Bits` is highest_bit(n), n > 0.
template <int Bits, typename T>
PYSTEEP_INLINE T relative_power(T e, int64_t n) {
  if constexpr (Bits == 0) {
    return e;
  } else {
    const T half = relative_power<Bits - 1>(e, n >> 1), both = half * (T(2) + half);
    return multiply_add((n & 1) != 0 ? e : T(0), T(1) + both, both);
  }
}

// How far w_2 moves, in units of itself: its gradient is g x / w_2.
template <typename T>
PYSTEEP_INLINE T mirror_relative_move(T u_of_x, T u, T y, const MirrorNumbers<T>& numbers) {
  return u_of_x == T(0) ? -numbers.decay_rate : -multiply_add(numbers.step * u, u_of_x / y, numbers.decay_rate);
}

// The new x. power = y^(L-1) = w_2^(q (L-1)); growth = (1 + relative move)^(L-1) - 1.
template <typename T>
PYSTEEP_INLINE T mirror_moved(T x, T u, T power, T growth, const MirrorNumbers<T>& numbers) {
  const T move = -multiply_add(numbers.decay_rate, x, numbers.step * u * power);  // of w_1, times w_2^(L-1)
  return x + multiply_add(x + move, growth, move);
}

// The whole step at depth 2: the moves of w_1 and w_2 need no factor, only z + y = 2 sqrt((balance/2)^2 + |x|^q). `u_of_x` and
// `u` are the signed powers of x and of the gradient; `power` is that of q. Range::normal: no square of these overflows or
// vanishes.
template <Range R = Range::any, typename T>
PYSTEEP_INLINE T mirror_step_two(Power power, T x, T u_of_x, T u, const MirrorNumbers<T>& numbers) {
  const T half = T(0.5) * numbers.balance;
  T middle = T(0);  // (z + y) / 2
  if (R == Range::normal || power == Power::sign) {
    middle = square_root(multiply_add(half, half, magnitude(x * u_of_x)));
  } else {
    const T size = magnitude(x);
    const T root = power == Power::identity ? size : square_root(size) * square_root(magnitude(u_of_x));
    const T large = root > half ? root : half, small = root > half ? half : root;
    const T ratio = large == T(0) ? T(0) : small / large;
    middle = large * square_root(T(1) + ratio * ratio);
    if (root != root) middle = root;
  }
  const T kept = T(1) - numbers.decay_rate, move = numbers.step * u;
  const T along = multiply_add(kept + kept, middle, -(move * u_of_x));
  return x - multiply_add(numbers.decay_rate * (T(1) + kept), x, move * along);
}

// One element at a time, with the power and the depth chosen at run time, as a GPU runs it: the steps of
// csrc/cpu/mirror_step.cpp.

// y from root = |x|^(q/L); balance > 0.
template <typename T>
PYSTEEP_INLINE T mirror_solution(T root, int64_t depth, const MirrorNumbers<T>& numbers) {
  const T unit = mirror_unit(root, numbers);
  const T low = numbers.balance / unit, size_power = integer_power(root / unit, depth);
  T r = mirror_guess(low, size_power, numbers);
  bool close = false;
  for (int iteration = 0; iteration < mirror_iterations && !close; ++iteration) {
    const T next = mirror_halley(r, integer_power(r, depth - 1), low, size_power, numbers);
    close = !(magnitude(next - r) > numbers.close);
    r = next;
  }
  if (!close) r = mirror_safeguarded(r, low, size_power, depth, numbers);
  return r * unit;
}

template <typename T>
PYSTEEP_INLINE T relative_power(T e, int64_t n) {
  T power = e;
  for (int bit = highest_bit(n) - 1; bit >= 0; --bit) {
    power = power * (T(2) + power);
    if ((n >> bit & 1) != 0) power = power + e * (T(1) + power);
  }
  return power;
}

template <typename T>
PYSTEEP_INLINE T mirror_step(Power power, T x, T gradient, int64_t depth, const MirrorNumbers<T>& numbers) {
  const T u_of_x = signed_power(power, x, numbers.direction);
  const T u = signed_power(power, gradient * numbers.gradient_factor, numbers.direction);
  if (depth == 2) return mirror_step_two(power, x, u_of_x, u, numbers);
  const T root = signed_power(Power::general, magnitude(x), numbers.root);
  const T y = numbers.balance == T(0) ? root : mirror_solution(root, depth, numbers);
  const T growth = relative_power(mirror_relative_move(u_of_x, u, y, numbers), depth - 1);
  return mirror_moved(x, u, integer_power(y, depth - 1), growth, numbers);
}

}  // namespace PYSTEEP_ISA
}  // namespace pysteep
