"""The C++ of `fedmerge.covariances`, for one type T of numbers.

`add` multiplies the shifted features of two models, tile by tile, as fast as a processor multiplies: what it reads is
fetched while it multiplies what it read before, each number once for the model's own products and those with another
model's features together, and of the own ones, which are symmetric, the upper triangle.
"""

SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t BYTES = 64, ROWS = 8;  // ROWS × two vectors of sums stay in registers
#elif defined(__AVX__)
constexpr int64_t BYTES = 32, ROWS = 4;
#else
constexpr int64_t BYTES = 16, ROWS = 4;
#endif
typedef T Lanes __attribute__((vector_size(BYTES)));
constexpr int64_t LANES = BYTES / sizeof(T), HEIGHT = LANES < ROWS ? LANES : ROWS;
constexpr int64_t CHUNK = 128;  // samples whose panels stay in the nearest caches
constexpr int64_t PART = 8192;  // samples that a thread sums by itself; results do not depend on how many threads do

// Shifted samples as panels of LANES units: panel p, sample s is at (p CHUNK + s) LANES. Adds them to total.
void pack(const T* rows, const T* shift, int64_t samples, int64_t units, T* panels, T* total) {
  for (int64_t u = 0; u < units; u += LANES) {
    const int64_t count = std::min(LANES, units - u);
    Lanes sum = {}, less = {}, *to = reinterpret_cast<Lanes*>(panels + u * CHUNK);
    for (int64_t i = 0; i < count; ++i) less[i] = shift[u + i];
    for (int64_t s = 0; s < samples; ++s) {
      __builtin_prefetch(rows + (s + CHUNK) * units + u, 0, 2);  // the next chunk's, while this one is multiplied
      Lanes row = {};
      if (count == LANES) std::memcpy(&row, rows + s * units + u, BYTES);
      else for (int64_t i = 0; i < count; ++i) row[i] = rows[s * units + u + i];
      sum += to[s] = row - less;
    }
    for (int64_t i = 0; total && i < count; ++i) total[u + i] += sum[i];
  }
}

// Adds the products of HEIGHT units of the left panel with one or two right panels to the matrix out.
template <int PANELS> void tile(const T* left, const T* right, int64_t samples, T* out, int64_t stride, int64_t height,
                                int64_t width) {
  Lanes sum[HEIGHT][PANELS] = {};
  for (int64_t s = 0; s < samples; ++s) {
    Lanes row[PANELS];
    for (int p = 0; p < PANELS; ++p) row[p] = reinterpret_cast<const Lanes*>(right + p * CHUNK * LANES)[s];
    for (int64_t h = 0; h < HEIGHT; ++h)
      for (int p = 0; p < PANELS; ++p) sum[h][p] += left[s * LANES + h] * row[p];
  }
  for (int64_t h = 0; h < height; ++h)
    for (int p = 0; p < PANELS; ++p)
      for (int64_t i = 0; i < std::min(LANES, width - p * LANES); ++i) out[h * stride + p * LANES + i] += sum[h][p][i];
}

// Adds all products of left and right panels, or those of the upper triangle alone.
void multiply(const T* left, const T* right, int64_t samples, int64_t units, bool upper, T* product) {
  for (int64_t v = 0; v < units; v += 2 * LANES)
    for (int64_t u = 0; u < (upper ? std::min(units, v + 2 * LANES) : units); u += HEIGHT) {
      const int64_t at = upper && u >= v + LANES ? v + LANES : v;  // left of it, it would be below the diagonal
      const T *rows = left + u / LANES * LANES * CHUNK + u % LANES, *columns = right + at * CHUNK;
      const bool two = at == v && units - v > LANES;
      (two ? tile<2> : tile<1>)(rows, columns, samples, product + u * units + at, units, std::min(HEIGHT, units - u),
                                units - at);
    }
}

}  // namespace

extern "C" void add(int64_t samples, int64_t units, int64_t threads, int64_t swapped, const T* left_shift,
                    const T* left, const T* right_shift, const T* right, T* total, T* own, T* cross) {
  const int64_t panels = (units + LANES - 1) / LANES * LANES * CHUNK, square = units * units;
  const int64_t parts = (samples + PART - 1) / PART;
  threads = std::max<int64_t>(1, std::min(threads, parts));
  std::vector<std::vector<T>> rooms(threads), sums(threads);
  const auto sum = [&](int64_t part, int64_t thread, T* of_total, T* of_own, T* of_cross) {
    auto& room = rooms[thread];
    room.resize(2 * panels + LANES);
    T* first = room.data() + (BYTES - reinterpret_cast<uintptr_t>(room.data()) % BYTES) % BYTES / sizeof(T);
    T* second = first + panels;
    for (int64_t s = part * PART; s < std::min(samples, (part + 1) * PART); s += CHUNK) {
      const int64_t count = std::min(CHUNK, samples - s);
      pack(right + s * units, right_shift, count, units, second, of_total);
      if (own) multiply(second, second, count, units, true, of_own);
      if (!left) continue;
      pack(left + s * units, left_shift, count, units, first, nullptr);
      multiply(swapped ? second : first, swapped ? first : second, count, units, false, of_cross);
    }
  };
  if (parts == 1) return sum(0, 0, total, own, cross);
  for (int64_t part = 0; part < parts; part += threads) {
    const int64_t now = std::min(threads, parts - part);
    std::vector<std::thread> others;
    for (int64_t t = now - 1; t >= 0; --t) {
      sums[t].assign(units + 2 * square, T(0));
      T *of_total = sums[t].data(), *of_own = of_total + units, *of_cross = of_own + square;
      if (t > 0) others.emplace_back(sum, part + t, t, of_total, of_own, of_cross);
      else sum(part, t, of_total, of_own, of_cross);
    }
    for (auto& other : others) other.join();
    for (int64_t t = 0; t < now; ++t) {
      const T* some = sums[t].data();
      for (int64_t i = 0; own && i < units; ++i) total[i] += some[i];
      for (int64_t i = 0; own && i < square; ++i) own[i] += some[units + i];
      for (int64_t i = 0; left && i < square; ++i) cross[i] += some[units + square + i];
    }
  }
}
"""
