"""The C++ of `fedmerge.merge.kernels`: each function is one pass over a parameter, its arguments are explained there.

It is text, since a Flower app carries Python files only, for one type T of numbers. Loops are over blocks that stay in
the nearest cache, and compilers make vector instructions of them; no result depends on the number of threads.
"""

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr int64_t BLOCK = 256;
constexpr int64_t LEAST = 1 << 16;  // entries that are worth a thread

struct Rates { T rate, root, keep, first, second, epsilon; };
Rates rates_of(const double* r) { return {T(r[0]), T(r[1]), T(r[2]), T(r[3]), T(r[4]), T(r[5])}; }

// Calls run(begin, end) on parts of 0 … count, in threads where each has enough to do.
template <class F> void in_parts(int64_t count, int64_t entries_each, int64_t threads, F run) {
  threads = std::max<int64_t>(1, std::min({threads, count, count * entries_each / LEAST}));
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(run, count * t / threads, count * (t + 1) / threads);
  run(0, count / threads);
  for (auto& other : others) other.join();
}

// Calls run(place, length, row) for blocks that lie each within one row.
template <class F> void in_blocks(int64_t rows, int64_t width, int64_t threads, F run) {
  const int64_t each = (width + BLOCK - 1) / BLOCK;
  in_parts(rows * each, std::min(width, BLOCK), threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row = b / each, left = b % each * BLOCK;
      run(row * width + left, std::min(BLOCK, width - left), row);
    }
  });
}

// Adam's moments, and the root of the second that divides the step.
inline void moments(T* m, T* v, T* root, const T* g, int64_t length, const Rates& r) {
  for (int64_t i = 0; i < length; ++i) {
    m[i] += (T(1) - r.first) * (g[i] - m[i]);
    v[i] = r.second * v[i] + (T(1) - r.second) * g[i] * g[i];
    root[i] = std::sqrt(v[i]) * r.root;
  }
}

// The inner product of a direction and a gradient.
inline T product(const T* model, const T* centre, const T* g, int64_t length) {
  T sum = 0;
  if (centre) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < length; ++i) sum += (model[i] - centre[i]) * g[i];
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < length; ++i) sum += model[i] * g[i];
  }
  return sum;
}

// A row of the mixture, from place `at` of the models, with one coefficient of each.
void mixed(T* theta, const T* start, const T* const* models, const T* centre, const T* beta, int64_t rows, int64_t row,
           int64_t at, int64_t count, int64_t width) {
  for (int64_t left = 0; left < width; left += BLOCK) {
    const int64_t length = std::min(BLOCK, width - left);
    const T nothing[BLOCK] = {}, *middle = centre ? centre + at + left : nothing;
    T sum[BLOCK];
    std::copy_n(start + left, length, sum);
    for (int64_t k = 0; k < count; ++k) {
      const T *model = models[k] + at + left, share = beta[k * rows + row];
      for (int64_t i = 0; i < length; ++i) sum[i] += share * (model[i] - middle[i]);
    }
    std::copy_n(sum, length, theta + left);
  }
}

// Takes the mean from beta, and sets a block of theta = start + sum_k beta_k (model_k - middle); returns whether a
// coefficient, share + beta, has left [low, high].
bool centred(T* theta, const T* start, const T* const* models, const T* middle, T* beta, int64_t stride, const T* mean,
             const T* shares, int64_t rows, int64_t count, int64_t at, int64_t length, T low, T high) {
  T sum[BLOCK];
  int outside = 0;
  std::copy_n(start, length, sum);
  for (int64_t k = 0; k < count; ++k) {
    const T *model = models[k] + at, least = low - shares[k * rows], most = high - shares[k * rows];
    T* b = beta + k * stride;
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i) {
      const T x = b[i] - mean[i];
      outside |= (x < least) | (x > most);
      sum[i] += x * (model[i] - middle[i]);
      b[i] = x;
    }
  }
  std::copy_n(sum, length, theta);
  return outside;
}

// Brings points + shares of sum 1 to the nearest of sum 1 in [low, high]^count: clip(x - tau), tau by Newton's steps
// within a bracket.
void onto_box(T* points, int64_t stride, const T* shares, int64_t rows, int64_t count, int64_t length, T low, T high) {
  const T least_excess = T(4 * count) * std::numeric_limits<T>::epsilon();
  T tau[BLOCK] = {}, left[BLOCK], right[BLOCK];
  int outside = 0;
  std::fill_n(left, length, std::numeric_limits<T>::infinity());
  std::fill_n(right, length, -std::numeric_limits<T>::infinity());
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < length; ++i) {
      const T x = points[k * stride + i] + shares[k * rows];
      left[i] = std::min(left[i], x - high), right[i] = std::max(right[i], x - low);
      outside |= (x < low) | (x > high);
    }
  if (!outside) return;
  for (int64_t step = 0; step < 4 * count + 60; ++step) {
    T excess[BLOCK], free[BLOCK] = {};
    std::fill_n(excess, length, T(-1));
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < length; ++i) {
        const T x = points[k * stride + i] + shares[k * rows] - tau[i];
        excess[i] += std::min(std::max(x, low), high);
        free[i] += (x > low) & (x < high) ? T(1) : T(0);
      }
    int moved = 0;
    for (int64_t i = 0; i < length; ++i) {
      const T now = tau[i], over = excess[i], some = free[i], was_left = left[i], was_right = right[i];
      const T low_end = over >= 0 ? now : was_left, high_end = over <= 0 ? now : was_right;
      const T newton = now + over / (some > T(1) ? some : T(1)), halved = (low_end + high_end) * T(0.5);
      const T above = newton > low_end ? newton : halved, inner = newton < high_end ? above : halved;
      const T next = std::abs(over) <= least_excess ? now : some > 0 ? inner : halved;
      left[i] = low_end, right[i] = high_end, tau[i] = next;
      moved |= next != now;
    }
    if (!moved) break;
  }
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < length; ++i)
      points[k * stride + i] = std::min(std::max(points[k * stride + i] + shares[k * rows] - tau[i], low), high) -
                               shares[k * rows];
}

// exp by 2^n times a Taylor polynomial on |r| <= ln(2) / 2, in one form that becomes vector instructions.
inline T exponential(T x) {
  constexpr bool is_float = sizeof(T) == 4;
  using Whole = std::conditional_t<is_float, int32_t, int64_t>;
  x = std::min(std::max(x, T(is_float ? -87 : -700)), T(is_float ? 87 : 700));
  const T n = std::nearbyint(x * T(1.44269504088896340736));
  const T r = x - n * T(is_float ? 0.693145751953125 : 0.693147180369123816490)
                - n * T(is_float ? 1.428606765330187e-6 : 1.90821492927058770002e-10);
  T sum = 1;
  for (int k = is_float ? 7 : 13; k > 0; --k) sum = T(1) + sum * r * (T(1) / T(k));
  const Whole bits = (Whole(n) + Whole(is_float ? 127 : 1023)) << (is_float ? 23 : 52);
  T power;
  std::memcpy(&power, &bits, sizeof(T));
  return sum * power;
}

}  // namespace

extern "C" {

void span(int64_t rows, int64_t width, int64_t threads, int64_t count, const T* const* models, const T* centre,
          double factor, const double* rates, const T* start, T* theta, T* m, T* v, const T* g, T* beta) {
  const Rates r = rates_of(rates);
  const T f = T(factor);
  in_blocks(1, rows * width, threads, [=](int64_t at, int64_t length, int64_t) {
    T root[BLOCK], sum[BLOCK] = {};
    const T nothing[BLOCK] = {}, *middle = centre ? centre + at : nothing;
    moments(m + at, v + at, root, g + at, length, r);
    for (int64_t k = 0; k < count; k += 2) {  // two fractions take one division: their common denominator is safe
      const T *one = models[k] + at, *other = k + 1 < count ? models[k + 1] + at : middle;
      for (int64_t i = 0; i < length; ++i) {
        const T x = f * (one[i] - middle[i]), y = f * (other[i] - middle[i]);
        const T under_x = std::abs(x) * root[i] + r.epsilon, under_y = std::abs(y) * root[i] + r.epsilon;
        sum[i] += (x * x * under_y + y * y * under_x) / (under_x * under_y);
      }
    }
    for (int64_t k = 0; beta && k < count; ++k) {
      const T* model = models[k] + at;
      T* b = beta + k * rows * width + at;
      for (int64_t i = 0; i < length; ++i) {
        const T x = f * (model[i] - middle[i]);
        b[i] = r.keep * b[i] - r.rate * x * m[at + i] / (std::abs(x) * root[i] + r.epsilon);
      }
    }
    if (r.keep != T(1))
      for (int64_t i = at; i < at + length; ++i) theta[i] = start[i] + r.keep * (theta[i] - start[i]);
    for (int64_t i = at; i < at + length; ++i) theta[i] -= r.rate / f * m[i] * sum[i - at];
  });
}

void box(int64_t rows, int64_t width, int64_t threads, int64_t count, const T* const* models, const T* centre,
         double factor, const double* rates, const T* start, T* theta, T* m, T* v, const T* g, T* beta,
         const T* shares, double low, double high) {
  const Rates r = rates_of(rates);
  const T f = T(factor), part = T(1) / T(count);
  in_blocks(rows, width, threads, [=](int64_t at, int64_t length, int64_t row) {
    const T nothing[BLOCK] = {}, *middle = centre ? centre + at : nothing;
    T root[BLOCK], mean[BLOCK] = {};
    moments(m + at, v + at, root, g + at, length, r);
    for (int64_t k = 0; k < count; k += 2) {  // two fractions take one division: their common denominator is safe
      const int64_t next = std::min(k + 1, count - 1);
      const T *one = models[k] + at, *other = models[next] + at, weight = part * T(next - k);
      T *b = beta + k * rows * width + at, *c = beta + next * rows * width + at;
#pragma GCC ivdep
      for (int64_t i = 0; i < length; ++i) {
        const T x = f * (one[i] - middle[i]), y = f * (other[i] - middle[i]);
        const T under_x = std::abs(x) * root[i] + r.epsilon, under_y = std::abs(y) * root[i] + r.epsilon;
        const T step = r.rate * m[at + i] / (under_x * under_y);
        const T p = r.keep * b[i] - x * under_y * step, q = r.keep * c[i] - y * under_x * step;
        b[i] = p, c[i] = q;
        mean[i] += part * p + weight * q;
      }
    }
    const auto mix = [&] {
      return centred(theta + at, start + at, models, middle, beta + at, rows * width, mean, shares + row, rows, count,
                     at, length, T(low), T(high));
    };
    if (!mix()) return;  // as in most blocks: then it is mixed already, in the pass that looked
    onto_box(beta + at, rows * width, shares + row, rows, count, length, T(low), T(high));
    std::fill_n(mean, length, T(0));
    mix();
  });
}

void channel(int64_t rows, int64_t width, int64_t threads, int64_t count, const T* const* models, const T* centre,
             double factor, const double* rates, const T* start, T* theta, T* m, T* v, const T* g, T* beta,
             const T* shares, double low, double high) {
  const Rates r = rates_of(rates);
  in_parts(rows, width * count, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * width;
      T mean = 0;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t place = k * rows + row;
        const T x = T(factor) * product(models[k] + at, centre ? centre + at : nullptr, g + at, width);
        T root;
        moments(m + place, v + place, &root, &x, 1, r);
        beta[place] = r.keep * beta[place] - r.rate * m[place] / (root + r.epsilon);
        mean += beta[place] / T(count);
      }
      if (shares) {
        for (int64_t k = 0; k < count; ++k) beta[k * rows + row] -= mean;
        onto_box(beta + row, rows, shares + row, rows, count, 1, T(low), T(high));
      }
      mixed(theta + at, start + at, models, centre, beta, rows, row, at, count, width);
    }
  });
}

void products(int64_t rows, int64_t width, int64_t threads, int64_t count, const T* const* models, const T* centre,
              double factor, const T* g, T* out) {
  in_parts(rows, width * count, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t k = 0, at = row * width; k < count; ++k)
        out[k * rows + row] = T(factor) * product(models[k] + at, centre ? centre + at : nullptr, g + at, width);
  });
}

void mix(int64_t rows, int64_t width, int64_t threads, int64_t count, const T* const* models, const T* centre,
         const T* start, T* theta, const T* beta) {
  in_parts(rows, width * count, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * width;
      mixed(theta + at, start + at, models, centre, beta, rows, row, at, count, width);
    }
  });
}

void pair(int64_t rows, int64_t width, int64_t threads, const T* first, const T* second, const double* rates,
          T* theta, T* m, T* v, const T* g, T* raw) {
  const Rates r = rates_of(rates);
  in_blocks(1, rows * width, threads, [=](int64_t at, int64_t length, int64_t) {
    T x[BLOCK], root[BLOCK];
    for (int64_t i = 0; i < length; ++i) {
      const T share = T(1) / (T(1) + exponential(-raw[at + i]));
      x[i] = (first[at + i] - second[at + i]) * g[at + i] * share * (T(1) - share);
    }
    moments(m + at, v + at, root, x, length, r);
    for (int64_t i = at; i < at + length; ++i) {
      raw[i] = r.keep * raw[i] - r.rate * m[i] / (root[i - at] + r.epsilon);
      theta[i] = second[i] + (first[i] - second[i]) / (T(1) + exponential(-raw[i]));
    }
  });
}

}  // extern C
"""
