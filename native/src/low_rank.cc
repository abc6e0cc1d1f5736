#include "low_rank.h"

#include <algorithm>
#include <memory>

#include "kernels.h"

namespace lorac {
namespace {

constexpr int64_t kDepth = 512;    // about as many rows of A are summed at a time
constexpr int64_t kColumns = 256;  // columns of B that a task computes
constexpr int64_t kBlocks = 4;     // blocks of rows that a task computes, if there are enough
constexpr int64_t kSmall = 1 << 14;  // multiplications that take no longer than to wake a thread

int64_t Divide(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A block of at most kRows rows of one segment.
struct RowBlock {
  int64_t first;
  int64_t rows;
  int64_t place;
};

// One call: u = (x A) * g of all rows is computed first, then y. Each number is summed in an order that depends on shapes
// alone, whoever computes it.
class Call {
 public:
  Call(const Update& update, const Parallel& parallel) : update_(update), parallel_(parallel) {
    for (const Layer& layer : update.layers) {
      u_offsets_.push_back(u_width_);
      y_offsets_.push_back(y_width_);
      u_width_ += layer.rank;
      y_width_ += layer.width;
    }
    int64_t first = 0;
    for (int64_t place = 0; place < update.places; ++place) {
      const int64_t end = first + (update.segments.empty() ? update.rows / update.places : update.segments[place]);
      for (; first < end; first += std::min<int64_t>(kRows, end - first)) {
        row_blocks_.push_back({first, std::min<int64_t>(kRows, end - first), place});
      }
    }
    blocks_ = row_blocks_.size();
    chunks_ = std::max<int64_t>(1, Divide(update.features, kDepth));
    depth_ = Divide(update.features, chunks_);
    for (size_t i = 0; i < update.layers.size(); ++i) {
      for (int64_t begin = 0; begin < update.layers[i].width; begin += kColumns) slices_.push_back({i, begin});
    }
  }

  void Run() {
    if (blocks_ >= 2 * kBlocks) {
      u_.reset(new float[update_.rows * u_width_]);
      group_ = std::min(kBlocks, Divide(blocks_, 2 * kBlocks));
      parallel_.For(Divide(blocks_, group_), [](void* call, size_t i) { static_cast<Call*>(call)->RunBlocks(i); }, this);
      return;
    }
    // With few rows, the layers, parts of K and columns are tasks too.
    u_.reset(new float[chunks_ * update_.rows * u_width_]);
    For(blocks_ * chunks_ * update_.layers.size(), update_.features * u_width_,
        [](void* call, size_t i) { static_cast<Call*>(call)->RunDown(i); });
    AddChunks();
    For(blocks_ * slices_.size(), CountUp(), [](void* call, size_t i) { static_cast<Call*>(call)->RunUp(i); });
  }

 private:
  struct Slice {
    size_t layer;
    int64_t begin;
  };

  int64_t CountUp() const {
    int64_t count = 0;
    for (const Layer& layer : update_.layers) count += layer.rank * layer.width;
    return count;
  }

  // Runs tasks on several threads, if the multiplications of a row are worth it.
  void For(size_t total, int64_t per_row, void (*function)(void*, size_t)) {
    if (per_row * update_.rows < kSmall) {
      for (size_t i = 0; i < total; ++i) function(this, i);
      return;
    }
    parallel_.For(total, function, this);
  }

  const RowBlock& At(int64_t index) const { return row_blocks_[index]; }

  const void* Place(const void* matrices, int64_t place, int64_t size) const {
    return static_cast<const char*>(matrices) + place * size * (update_.half ? 2 : 4);
  }

  // u of a block of rows and a layer, over one part of K.
  void Down(const RowBlock& block, size_t index, int64_t chunk, float* u, bool add) const {
    const Layer& layer = update_.layers[index];
    const int64_t begin = chunk * depth_, end = std::min(update_.features, begin + depth_);
    const void* a = Place(layer.a, block.place, update_.features * layer.rank);
    const Block product = {update_.x + block.first * update_.features + begin,
                           update_.features,
                           Place(a, begin, layer.rank),
                           end - begin,
                           layer.rank,
                           block.rows,
                           0,
                           layer.rank,
                           u + block.first * u_width_ + u_offsets_[index],
                           u_width_};
    kernels_.down(product, update_.half, add);
  }

  void Scale(const RowBlock& block, size_t index) const {
    const Layer& layer = update_.layers[index];
    if (layer.g == nullptr) return;
    const float* g = layer.g + block.place * layer.rank;
    for (int64_t row = block.first; row < block.first + block.rows; ++row) {
      float* u = u_.get() + row * u_width_ + u_offsets_[index];
      for (int64_t r = 0; r < layer.rank; ++r) u[r] *= g[r];
    }
  }

  // y of a block of rows, for the columns of a slice.
  void Up(const RowBlock& block, const Slice& slice) const {
    const Layer& layer = update_.layers[slice.layer];
    const int64_t stride = layer.stride != 0 ? layer.stride : layer.width;
    const Block product = {u_.get() + block.first * u_width_ + u_offsets_[slice.layer],
                           u_width_,
                           Place(layer.b, block.place, layer.rank * layer.width),
                           layer.rank,
                           layer.width,
                           block.rows,
                           slice.begin,
                           std::min(layer.width, slice.begin + kColumns),
                           layer.y + block.first * stride,
                           stride};
    const Finish finish = {update_.base + block.first * y_width_ + y_offsets_[slice.layer], y_width_,
                           layer.h == nullptr ? nullptr : layer.h + block.place * layer.width,
                           layer.c == nullptr ? nullptr : layer.c + block.place * layer.width,
                           layer.r == nullptr ? nullptr : layer.r + block.first * layer.width, false};
    kernels_.up(product, update_.half, finish);
  }

  // All of some blocks of rows.
  void RunBlocks(int64_t group) const {
    const int64_t first = group * group_, last = std::min(blocks_, first + group_);
    for (int64_t i = first; i < last; ++i) {
      const RowBlock& block = At(i);
      for (size_t layer = 0; layer < update_.layers.size(); ++layer) {
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) Down(block, layer, chunk, u_.get(), chunk > 0);
        Scale(block, layer);
      }
    }
    for (const Slice& slice : slices_) {
      for (int64_t i = first; i < last; ++i) Up(At(i), slice);
    }
  }

  // One layer's u of one block of rows, over one part of K.
  void RunDown(int64_t task) const {
    const int64_t layers = update_.layers.size(), chunk = task % chunks_, layer = task / chunks_ % layers;
    Down(At(task / chunks_ / layers), layer, chunk, u_.get() + chunk * update_.rows * u_width_, false);
  }

  // Adds up what RunDown computed of each part of K.
  void AddChunks() const {
    const int64_t count = update_.rows * u_width_;
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      for (int64_t i = 0; i < count; ++i) u_[i] += u_[chunk * count + i];
    }
    for (int64_t i = 0; i < blocks_; ++i) {
      for (size_t layer = 0; layer < update_.layers.size(); ++layer) Scale(At(i), layer);
    }
  }

  // One slice of columns of one block of rows.
  void RunUp(int64_t task) const {
    const int64_t slices = slices_.size();
    Up(At(task / slices), slices_[task % slices]);
  }

  const Update& update_;
  const Parallel& parallel_;
  const Kernels& kernels_ = ChooseKernels();
  std::vector<int64_t> u_offsets_, y_offsets_;
  std::vector<RowBlock> row_blocks_;
  std::vector<Slice> slices_;
  std::unique_ptr<float[]> u_;
  int64_t u_width_ = 0, y_width_ = 0;
  int64_t blocks_, chunks_, depth_;
  int64_t group_ = 1;
};

}  // namespace

void Compute(const Update& update, const Parallel& parallel) {
  if (update.rows == 0) return;
  Call(update, parallel).Run();
}

}  // namespace lorac
