"""The C++ of `fedmerge.covariances`, for one type T of numbers.

`add` multiplies the shifted features of two models, tile by tile, as fast as a processor multiplies: what it reads is
fetched while it multiplies what it read before, each number once for the model's own products and those with another
model's features together, and of the own ones, which are symmetric, the upper triangle, or their diagonal alone.
"""

SOURCE = r"""
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
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

// Shifted samples as panels of LANES units: panel p, sample s is at (p CHUNK + s) LANES. Adds them to the first row of
// totals, and their squares to the second.
void pack(const T* rows, const T* shift, int64_t samples, int64_t units, T* panels, T* totals) {
  for (int64_t u = 0; u < units; u += LANES) {
    const int64_t count = std::min(LANES, units - u);
    Lanes sum = {}, squares = {}, less = {}, *to = reinterpret_cast<Lanes*>(panels + u * CHUNK);
    for (int64_t i = 0; i < count; ++i) less[i] = shift[u + i];
    for (int64_t s = 0; s < samples; ++s) {
      __builtin_prefetch(rows + (s + CHUNK) * units + u, 0, 2);  // the next chunk's, while this one is multiplied
      Lanes row = {};
      if (count == LANES) std::memcpy(&row, rows + s * units + u, BYTES);
      else for (int64_t i = 0; i < count; ++i) row[i] = rows[s * units + u + i];
      to[s] = row -= less;
      sum += row;
      squares += row * row;
    }
    for (int64_t i = 0; totals && i < count; ++i) totals[u + i] += sum[i], totals[units + u + i] += squares[i];
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

struct Side {
  const T *shift, *rows;
};

}  // namespace

// Adds to each model's totals and own products, and to the products of the left and the right, where they are given.
extern "C" void add(int64_t samples, int64_t units, int64_t threads, const T* left_shift, const T* left, T* left_totals,
                    T* left_own, const T* right_shift, const T* right, T* right_totals, T* right_own, T* cross) {
  const int64_t panels = (units + LANES - 1) / LANES * LANES * CHUNK, square = units * units;
  const int64_t parts = (samples + PART - 1) / PART;
  const Side sides[] = {{left_shift, left}, {right_shift, right}};
  const std::array<std::pair<T*, int64_t>, 5> wanted = {
      {{left_totals, 2 * units}, {left_own, square}, {right_totals, 2 * units}, {right_own, square}, {cross, square}}};
  threads = std::max<int64_t>(1, std::min(threads, parts));
  std::vector<std::vector<T>> rooms(threads), sums(threads);
  const auto sum = [&](int64_t part, int64_t thread, const std::array<T*, 5>& to) {
    auto& room = rooms[thread];
    room.resize(2 * panels + LANES);
    T* packed = room.data() + (BYTES - reinterpret_cast<uintptr_t>(room.data()) % BYTES) % BYTES / sizeof(T);
    for (int64_t s = part * PART; s < std::min(samples, (part + 1) * PART); s += CHUNK) {
      const int64_t count = std::min(CHUNK, samples - s);
      for (int64_t i = 0; i < (cross ? 2 : 1); ++i) {
        T* own = packed + i * panels;
        pack(sides[i].rows + s * units, sides[i].shift, count, units, own, to[2 * i]);
        if (to[2 * i + 1]) multiply(own, own, count, units, true, to[2 * i + 1]);
      }
      if (cross) multiply(packed, packed + panels, count, units, false, to[4]);
    }
  };
  if (parts == 1) return sum(0, 0, {left_totals, left_own, right_totals, right_own, cross});
  for (int64_t part = 0; part < parts; part += threads) {
    const int64_t now = std::min(threads, parts - part);
    std::vector<std::thread> others;
    for (int64_t t = now - 1; t >= 0; --t) {
      std::array<T*, 5> to = {};
      sums[t].assign(4 * units + 3 * square, T(0));
      T* place = sums[t].data();
      for (size_t i = 0; i < to.size(); place += wanted[i++].second)
        if (wanted[i].first) to[i] = place;
      if (t > 0) others.emplace_back(sum, part + t, t, to);
      else sum(part, t, to);
    }
    for (auto& other : others) other.join();
    for (int64_t t = 0; t < now; ++t) {
      const T* some = sums[t].data();
      for (const auto& [to, size] : wanted)
        for (int64_t i = 0; i < size; ++i, ++some)
          if (to) to[i] += *some;
    }
  }
}
"""
