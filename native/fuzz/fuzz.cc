// Computes updates of random shapes, compares them with sums in double precision, and repeats each with its tasks in
// another order, which must not change a bit; then writes into weights, on one thread and on three. Buffers are as long as their contents, for AddressSanitizer.
//
//     fuzz [count] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"
#include "low_rank.h"

extern "C" void LoracNativeWriteSparse(
    void* const*, const int64_t* const*, const void* const*, const int64_t*, int64_t, int64_t, int64_t);
extern "C" void LoracNativeWriteProduct(
    const float*, const float*, bool, const float*, bool, float*, int64_t, int64_t, int64_t, int64_t);

namespace {

using Random = std::mt19937_64;
constexpr double kLimit = 1e-6;  // of the norm of what is added

int64_t Pick(Random& random, int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(random);
}

class Ordered final : public lorac::Parallel {
 public:
  explicit Ordered(bool forwards) : forwards_(forwards) {}
  void For(size_t total, void (*function)(void*, size_t), void* data) const override {
    for (size_t i = 0; i < total; ++i) function(data, forwards_ ? i : total - 1 - i);
  }

 private:
  bool forwards_;
};

std::vector<float> Floats(Random& random, int64_t count, double scale) {
  std::normal_distribution<float> normal(0, static_cast<float>(scale));
  std::vector<float> values(count);
  std::generate(values.begin(), values.end(), [&] { return normal(random); });
  return values;
}

// A factor, and its values; in float16 these are multiples of 2^-14 below 1/8.
struct Factor {
  std::vector<float> values;
  std::vector<uint16_t> halves;

  Factor(Random& random, int64_t count, double scale, bool half) : values(Floats(random, count, scale)) {
    if (!half) return;
    for (float& value : values) {
      const auto code = static_cast<uint16_t>(Pick(random, 0, 2047) | Pick(random, 0, 1) << 15);
      const int magnitude = code & 0x7fff;  // subnormals, and two binades above them
      const double exact = magnitude < 1024 ? magnitude : (1024 + magnitude % 1024);
      value = static_cast<float>((code >> 15 ? -1 : 1) * std::ldexp(exact, -24));
      halves.push_back(code);
    }
  }
  const void* data() const {
    return halves.empty() ? static_cast<const void*>(values.data()) : static_cast<const void*>(halves.data());
  }
};

struct Slots {
  Factor a, b;
  std::vector<float> g, h, c, r;
  bool has_g, has_h, has_c, has_r;
};

bool Check(Random& random) {
  const bool half = Pick(random, 0, 2) == 0;
  const int64_t places = Pick(random, 1, 5), segment = Pick(random, 0, 4) ? Pick(random, 1, 9) : Pick(random, 10, 70);
  const int64_t features = Pick(random, 0, 3) ? Pick(random, 1, 200) : Pick(random, 500, 1200);
  const int64_t rows = places * segment;
  lorac::Update update;
  std::vector<Slots> slots;
  for (int64_t i = Pick(random, 1, 4); i > 0; --i) {
    lorac::Layer layer;
    layer.rank = Pick(random, 0, 3) ? Pick(random, 0, 40) : Pick(random, 41, 256);
    layer.width = Pick(random, 0, 3) ? Pick(random, 1, 150) : Pick(random, 151, 700);
    const double scale = 1 / std::sqrt(double(features));
    slots.push_back({Factor(random, places * features * layer.rank, scale, half),
                     Factor(random, places * layer.rank * layer.width, 1, half),
                     Floats(random, places * layer.rank, 1), Floats(random, places * layer.width, 1),
                     Floats(random, places * layer.width, 1), Floats(random, rows * layer.width, half ? 1e-6 : 1),
                     Pick(random, 0, 1) == 1, Pick(random, 0, 1) == 1, Pick(random, 0, 1) == 1, Pick(random, 0, 1) == 1});
    update.layers.push_back(layer);
  }
  int64_t width = 0;
  std::vector<std::vector<float>> outputs, again;
  for (size_t i = 0; i < slots.size(); ++i) {
    lorac::Layer& layer = update.layers[i];
    layer.a = slots[i].a.data();
    layer.b = slots[i].b.data();
    layer.g = slots[i].has_g ? slots[i].g.data() : nullptr;
    layer.h = slots[i].has_h ? slots[i].h.data() : nullptr;
    layer.c = slots[i].has_c ? slots[i].c.data() : nullptr;
    layer.r = slots[i].has_r ? slots[i].r.data() : nullptr;
    outputs.emplace_back(rows * layer.width);
    again.emplace_back(rows * layer.width);
    width += layer.width;
  }
  const std::vector<float> x = Floats(random, rows * features, 1), base = Floats(random, rows * width, half ? 1e-6 : 1);
  update.x = x.data();
  update.base = base.data();
  update.rows = rows;
  update.features = features;
  update.places = places;
  update.half = half;
  std::vector<int64_t> place_of(rows);
  const bool uneven = Pick(random, 0, 1) == 1;
  for (int64_t row = 0; row < rows; ++row) place_of[row] = uneven ? Pick(random, 0, places - 1) : row / segment;
  std::sort(place_of.begin(), place_of.end());
  if (uneven) {
    update.segments.assign(places, 0);
    for (const int64_t place : place_of) ++update.segments[place];
  }
  const bool side_by_side = Pick(random, 0, 1) == 1;
  for (auto* into : {&outputs, &again}) {
    std::vector<float> joined(side_by_side ? rows * width : 0);
    int64_t offset = 0;
    for (size_t i = 0; i < slots.size(); ++i) {
      lorac::Layer& layer = update.layers[i];
      layer.y = side_by_side ? joined.data() + offset : (*into)[i].data();
      layer.stride = side_by_side ? width : 0;
      offset += layer.width;
    }
    lorac::Compute(update, Ordered(into == &outputs));
    for (size_t i = 0; i < slots.size() && side_by_side; ++i) {
      const lorac::Layer& layer = update.layers[i];
      for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(layer.y + row * width, layer.width, (*into)[i].data() + row * layer.width);
      }
    }
  }
  int64_t offset = 0;
  for (size_t i = 0; i < slots.size(); ++i) {
    const lorac::Layer& layer = update.layers[i];
    if (std::memcmp(outputs[i].data(), again[i].data(), outputs[i].size() * sizeof(float)) != 0) {
      std::printf("the order of tasks changes layer %zu\n", i);
      return false;
    }
    double wrong = 0, added = 0, whole = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t place = place_of[row];
      std::vector<double> u(layer.rank);
      for (int64_t r = 0; r < layer.rank; ++r) {
        for (int64_t k = 0; k < features; ++k) {
          u[r] += double(x[row * features + k]) * slots[i].a.values[(place * features + k) * layer.rank + r];
        }
        if (layer.g != nullptr) u[r] *= layer.g[place * layer.rank + r];
      }
      for (int64_t n = 0; n < layer.width; ++n) {
        double sum = 0;
        for (int64_t r = 0; r < layer.rank; ++r) sum += u[r] * slots[i].b.values[(place * layer.rank + r) * layer.width + n];
        if (layer.h != nullptr) sum *= layer.h[place * layer.width + n];
        double kept = base[row * width + offset + n];
        if (layer.c != nullptr) kept *= layer.c[place * layer.width + n];
        if (layer.r != nullptr) kept += layer.r[row * layer.width + n];
        wrong += std::pow(outputs[i][row * layer.width + n] - (kept + sum), 2);
        added += sum * sum;
        whole += (kept + sum) * (kept + sum);
      }
    }
    if (!(std::sqrt(wrong) <= kLimit * std::sqrt(added) + 2e-7 * std::sqrt(whole))) {
      std::printf("layer %zu is wrong by %.1e of what is added: rows %d in %d, features %d, rank %d, width %d%s\n", i,
                  std::sqrt(wrong / added), int(rows), int(places), int(features), int(layer.rank), int(layer.width),
                  half ? ", float16" : "");
      return false;
    }
    offset += layer.width;
  }
  return true;
}

bool CheckScatter(Random& random) {
  const int64_t weights = Pick(random, 0, 5);
  std::vector<std::vector<int64_t>> positions(weights);
  std::vector<std::vector<float>> memories(weights), values(weights), expected(weights);
  std::vector<void*> into;
  std::vector<const int64_t*> where;
  std::vector<const void*> from;
  std::vector<int64_t> counts, owner;
  for (int64_t w = 0; w < weights; ++w) {
    owner.push_back(w > 0 && Pick(random, 0, 1) ? owner[w - 1] : w);  // some go over the one before them
    std::vector<float>& memory = memories[owner[w]];
    if (owner[w] == w) {
      memory.resize(Pick(random, 1, 20000));
      expected[w] = memory;
    }
    const int64_t step = Pick(random, 1, 5);
    for (int64_t i = Pick(random, 0, 9); i < int64_t(memory.size()); i += Pick(random, 1, step)) {
      positions[w].push_back(i);
    }
    values[w] = Floats(random, positions[w].size(), 1);
    for (size_t i = 0; i < positions[w].size(); ++i) expected[owner[w]][positions[w][i]] = values[w][i];
    into.push_back(memory.data());
    where.push_back(positions[w].data());
    from.push_back(values[w].data());
    counts.push_back(positions[w].size());
  }
  LoracNativeWriteSparse(into.data(), where.data(), from.data(), counts.data(), weights, sizeof(float), 3);
  if (memories == expected) return true;
  std::printf("values of %d weights are not where they belong\n", int(weights));
  return false;
}

bool CheckAddProduct(Random& random) {
  const int64_t rows = Pick(random, 1, 300), rank = Pick(random, 0, 20), columns = Pick(random, 1, 150);
  const std::vector<float> weight(rows * columns, 0), left = Floats(random, rows * rank, 1),
                           right = Floats(random, rank * columns, 1);
  std::vector<float> out(weight), again(weight);
  std::vector<float> left_transposed(left), right_transposed(right);
  for (int64_t i = 0; i < rows * rank; ++i) left_transposed[i % rank * rows + i / rank] = left[i];
  for (int64_t i = 0; i < rank * columns; ++i) right_transposed[i % columns * rank + i / columns] = right[i];
  LoracNativeWriteProduct(weight.data(), left.data(), false, right.data(), false, out.data(), rows, rank, columns, 1);
  LoracNativeWriteProduct(weight.data(), left_transposed.data(), true, right_transposed.data(), true, again.data(), rows,
                          rank, columns, 3);
  double wrong = 0, added = 0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    double sum = 0;
    for (int64_t r = 0; r < rank; ++r) sum += double(left[i / columns * rank + r]) * right[r * columns + i % columns];
    wrong += std::pow(out[i] - sum, 2);
    added += sum * sum;
  }
  if (out == again && std::sqrt(wrong) <= kLimit * std::sqrt(added)) return true;
  std::printf("a weight of %d x %d at rank %d is wrong\n", int(rows), int(columns), int(rank));
  return false;
}

}  // namespace

int main(int count, char** arguments) {
  const long checks = count > 1 ? std::atol(arguments[1]) : 100;
  Random random(count > 2 ? std::atol(arguments[2]) : 0);
  for (long i = 0; i < checks; ++i) {
    if (!Check(random) || !CheckScatter(random) || !CheckAddProduct(random)) return 1;
  }
  std::printf("%ld updates by the %s kernels\n", checks, lorac::ChooseKernels().name);
  return 0;
}
