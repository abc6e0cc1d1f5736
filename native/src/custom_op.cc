// The op lorac.native::AddLowRank of ONNX Runtime, and the function that registers it.
//
// Inputs: x (..., K), base (..., sum of N), then of each layer what its entry of `parts` names, in this order: A and B if
// the layer has an adapter, then g, h, c and r (..., N); and at last, if rows of a batch brought different numbers of
// tokens, these numbers (batch), int32. Outputs: y (..., N) of each layer, or one of all layers side by side. Attributes:
// `widths` and `parts`, with a number for each layer. Tensors of a slot have a first axis of places, or none; each place
// serves as many rows of the batch.
#include <algorithm>
#include <array>
#include <cstdio>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "kernels.h"
#include "low_rank.h"
#include "ort_abi.h"

namespace lorac {
namespace {

enum Part : int64_t { kPair = 1, kBetween = 2, kAfter = 4, kOnBase = 8, kResidual = 16, kAllParts = 31 };
constexpr int kVersion = 3;
constexpr int64_t kMaxWidth = int64_t{1} << 40;

// Multiplies sizes. One beyond int64 becomes the largest number, which no tensor has as its size: wrapped, it could be 0.
int64_t Multiply(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}

struct Tensor {
  const void* data = nullptr;
  const int64_t* shape = nullptr;
  size_t axes = 0;
  ort::ElementType type = ort::kUndefined;

  int64_t Last() const { return axes > 0 ? shape[axes - 1] : 1; }
  int64_t Count() const {
    int64_t count = 1;
    for (size_t i = 0; i < axes; ++i) count = shape[i] == 0 ? 0 : Multiply(count, shape[i]);
    return count;
  }
};

class ThreadPool final : public Parallel {
 public:
  ThreadPool(const ort::Api& api, const ort::KernelContext* context) : api_(api), context_(context) {}

  void For(size_t total, void (*function)(void*, size_t), void* data) const override {
    ort::Status* status = api_.KernelContext_ParallelFor(context_, function, total, 0, data);
    if (status == nullptr) return;
    api_.ReleaseStatus(status);  // nothing has run
    for (size_t i = 0; i < total; ++i) function(data, i);
  }

 private:
  const ort::Api& api_;
  const ort::KernelContext* context_;
};

ort::Status* Refuse(const ort::Api& api, const char* why) {
  std::array<char, 160> text;
  std::snprintf(text.data(), text.size(), "lorac.native::AddLowRank: %s", why);
  return api.CreateStatus(ort::kInvalidArgument, text.data());
}

// A node's layers, and what each call reads.
class AddLowRank {
 public:
  AddLowRank(const ort::Api& api, std::vector<int64_t> widths, std::vector<int64_t> parts, size_t outputs)
      : api_(api), widths_(std::move(widths)), parts_(std::move(parts)), outputs_(outputs) {}

  ort::Status* ComputeOrRefuse(ort::KernelContext* context) const {
    try {
      return Compute(context);
    } catch (const std::bad_alloc&) {
      return Refuse("there is no memory for x A");
    }
  }

 private:
  static constexpr size_t kMaxAxes = 8;

  ort::Status* Compute(ort::KernelContext* context) const {
    Reader reader{api_, context};
    Update update;
    const Tensor x = reader.Next(), base = reader.Next();
    if (reader.status != nullptr) return reader.status;
    if (x.axes < 1 || x.Last() < 1 || base.axes < 1 || base.axes > kMaxAxes) return Refuse("x or base has no features");
    update.x = static_cast<const float*>(x.data);
    update.base = static_cast<const float*>(base.data);
    update.features = x.Last();
    update.rows = 1;
    for (size_t i = 0; i + 1 < base.axes; ++i) update.rows = Multiply(update.rows, base.shape[i]);
    if (x.Count() != Multiply(update.rows, x.Last())) return Refuse("x and base have different rows");
    int64_t width = 0;
    for (size_t i = 0; i < widths_.size(); ++i) {
      if (ort::Status* status = ReadLayer(reader, i, update)) return status;
      width += widths_[i];
    }
    if (base.Last() != width) return Refuse("base is not as wide as the layers");
    if (ort::Status* status = ReadSegments(reader, update)) return status;
    if (ort::Status* status = ReserveOutputs(context, base, update)) return status;
    lorac::Compute(update, ThreadPool(api_, context));
    return nullptr;
  }

  struct Reader {
    const ort::Api& api;
    const ort::KernelContext* context;
    size_t index = 0;
    ort::Status* status = nullptr;

    Tensor Next() {
      Tensor tensor;
      const ort::Value* value = nullptr;
      if (status == nullptr) status = api.KernelContext_GetInput(context, index++, &value);
      if (status == nullptr && value == nullptr) status = lorac::Refuse(api, "an input has no value");
      if (status == nullptr) {
        status = api.GetTensorElementTypeAndShapeDataReference(value, &tensor.type, &tensor.shape, &tensor.axes);
      }
      void* data = nullptr;
      if (status == nullptr) status = api.GetTensorMutableData(value, &data);
      tensor.data = data;
      return tensor;
    }
  };

  ort::Status* Refuse(const char* why) const { return lorac::Refuse(api_, why); }

  // Notes how many places a tensor of a slot has; every tensor of a call has as many.
  bool TakePlaces(const Tensor& tensor, size_t axes_of_one, bool first, Update& update) const {
    const int64_t places = tensor.axes > axes_of_one ? tensor.shape[0] : 1;
    if (first) update.places = places;
    return places == update.places && places > 0 && tensor.axes <= 3;
  }

  ort::Status* ReadLayer(Reader& reader, size_t index, Update& update) const {
    Layer layer;
    layer.width = widths_[index];
    bool first = index == 0 || !HasSlotsBefore(index), fits = true;
    if (parts_[index] & kPair) {
      const Tensor a = reader.Next(), b = reader.Next();
      if (reader.status != nullptr) return reader.status;
      layer.rank = a.Last();
      const bool half = a.type == ort::kFloat16;
      if (!first && half != update.half) return Refuse("factors have different types");
      update.half = half;
      fits = a.axes >= 2 && b.axes >= 2 && b.type == a.type && (half || a.type == ort::kFloat);
      fits = fits && TakePlaces(a, 2, first, update) && TakePlaces(b, 2, false, update);
      fits = fits && a.shape[a.axes - 2] == update.features && b.shape[b.axes - 2] == layer.rank;
      fits = fits && b.Last() == layer.width;
      if (!fits) return Refuse("a factor has another shape or type");
      layer.a = a.data;
      layer.b = b.data;
      first = false;
    }
    const struct {
      Part part;
      const float** where;
      int64_t size;
    } vectors[] = {{kBetween, &layer.g, layer.rank}, {kAfter, &layer.h, layer.width}, {kOnBase, &layer.c, layer.width}};
    for (const auto& vector : vectors) {
      if (!(parts_[index] & vector.part)) continue;
      const Tensor scale = reader.Next();
      if (reader.status != nullptr) return reader.status;
      fits = scale.axes >= 1 && scale.type == ort::kFloat && TakePlaces(scale, 1, first, update);
      if (!fits || scale.Count() != Multiply(update.places, vector.size)) return Refuse("a scale has another shape or type");
      *vector.where = static_cast<const float*>(scale.data);
      first = false;
    }
    if (parts_[index] & kResidual) {
      const Tensor residual = reader.Next();
      if (reader.status != nullptr) return reader.status;
      fits = residual.type == ort::kFloat && residual.Count() == Multiply(update.rows, layer.width);
      if (!fits) return Refuse("a residual has another shape or type");
      layer.r = static_cast<const float*>(residual.data);
    }
    update.layers.push_back(layer);
    return nullptr;
  }

  // Reads how many rows each place has, if they may differ.
  ort::Status* ReadSegments(Reader& reader, Update& update) const {
    size_t inputs = 0;
    if (ort::Status* status = api_.KernelContext_GetInputCount(reader.context, &inputs)) return status;
    const char* uneven = "the number of places does not divide that of the rows";
    if (reader.index == inputs) return update.rows % update.places == 0 ? nullptr : Refuse(uneven);
    const Tensor counts = reader.Next();
    if (reader.status != nullptr) return reader.status;
    if (counts.type != ort::kInt32) return Refuse("numbers of tokens are not int32");
    const int64_t batch = counts.Count();
    if (batch % update.places != 0 || (batch == 0 && update.rows > 0)) return Refuse(uneven);
    if (batch == 0) return nullptr;
    update.segments.assign(update.places, 0);
    int64_t rows = 0;
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t count = static_cast<const int32_t*>(counts.data)[row];
      if (count < 0) return Refuse("a number of tokens is negative");
      update.segments[row / (batch / update.places)] += count;
      rows += count;
    }
    return rows == update.rows ? nullptr : Refuse("the numbers of tokens do not add up to the rows");
  }

  // Whether a layer before this one has tensors of slots.
  bool HasSlotsBefore(size_t index) const {
    for (size_t i = 0; i < index; ++i) {
      if ((parts_[i] & ~kResidual) != 0) return true;
    }
    return false;
  }

  ort::Status* ReserveOutputs(ort::KernelContext* context, const Tensor& base, Update& update) const {
    std::array<int64_t, kMaxAxes> shape;
    std::copy(base.shape, base.shape + base.axes, shape.begin());
    float* y = nullptr;
    for (size_t i = 0; i < update.layers.size(); ++i) {
      lorac::Layer& layer = update.layers[i];
      if (i < outputs_) {
        if (outputs_ > 1) shape[base.axes - 1] = layer.width;
        ort::Value* value = nullptr;
        void* data = nullptr;
        ort::Status* status = api_.KernelContext_GetOutput(context, i, shape.data(), base.axes, &value);
        if (status == nullptr && value == nullptr) status = Refuse("an output has no name");
        if (status == nullptr) status = api_.GetTensorMutableData(value, &data);
        if (status != nullptr) return status;
        y = static_cast<float*>(data);
      }
      layer.y = y;
      layer.stride = outputs_ > 1 ? layer.width : base.Last();
      y += layer.width;
    }
    return nullptr;
  }

  const ort::Api& api_;
  const std::vector<int64_t> widths_, parts_;
  const size_t outputs_;
};

ort::Status* ReadNumbers(
    const ort::Api& api, const ort::KernelInfo* info, const char* name, std::vector<int64_t>& numbers) {
  size_t count = 0;
  if (ort::Status* status = api.KernelInfoGetAttributeArray_int64(info, name, nullptr, &count)) return status;
  numbers.resize(count);
  return api.KernelInfoGetAttributeArray_int64(info, name, numbers.data(), &count);
}

ort::Status* CreateKernel(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
  std::vector<int64_t> widths, parts;
  if (ort::Status* status = ReadNumbers(*api, info, "widths", widths)) return status;
  if (ort::Status* status = ReadNumbers(*api, info, "parts", parts)) return status;
  size_t inputs = 0, outputs = 0, expected = 2;
  if (ort::Status* status = api->KernelInfo_GetInputCount(info, &inputs)) return status;
  if (ort::Status* status = api->KernelInfo_GetOutputCount(info, &outputs)) return status;
  bool fits = !widths.empty() && widths.size() == parts.size() && (outputs == 1 || outputs == widths.size());
  for (size_t i = 0; fits && i < widths.size(); ++i) {
    fits = widths[i] >= 0 && widths[i] <= kMaxWidth && parts[i] >= 0 && parts[i] <= kAllParts;
    for (const Part part : {kPair, kPair, kBetween, kAfter, kOnBase, kResidual}) expected += (parts[i] & part) != 0;
  }
  if (!fits) return Refuse(*api, "`parts`, `widths` and outputs do not agree");
  if (inputs != expected && inputs != expected + 1) return Refuse(*api, "inputs are not those that `parts` names");
  *kernel = new AddLowRank(*api, std::move(widths), std::move(parts), outputs);
  return nullptr;
}

ort::CustomOp Describe() {
  ort::CustomOp op = {};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp*) { return "AddLowRank"; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return 3; };
  op.GetInputType = [](const ort::CustomOp*, size_t index) { return index < 2 ? ort::kFloat : ort::kUndefined; };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t index) {
    return index < 2 ? ort::kRequired : ort::kVariadic;
  };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };  // factors may be float16, scales are float
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kVariadic; };
  op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 1; };
  op.GetStartVersion = [](const ort::CustomOp*) { return kVersion; };
  op.GetEndVersion = [](const ort::CustomOp*) { return kVersion; };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    return static_cast<AddLowRank*>(kernel)->ComputeOrRefuse(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<AddLowRank*>(kernel); };
  // One y of all layers may lie where base does.
  op.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
    *inputs = new int[1]{1};
    *outputs = new int[1]{0};
    return 1;
  };
  op.ReleaseMayInplace = [](int* inputs, int* outputs) {
    delete[] inputs;
    delete[] outputs;
  };
  op.GetAliasMap = [](int**, int**) -> size_t { return 0; };
  op.ReleaseAliasMap = [](int*, int*) {};
  return op;
}

}  // namespace
}  // namespace lorac

#define LORAC_EXPORT extern "C" __attribute__((visibility("default")))

LORAC_EXPORT lorac::ort::Status* RegisterCustomOps(
    lorac::ort::SessionOptions* options, const lorac::ort::ApiBase* base) {
  static const lorac::ort::CustomOp op = lorac::Describe();
  const lorac::ort::Api* api = base->GetApi(lorac::ort::kApiVersion);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(lorac::ort::kInvalidArgument, "ONNX Runtime 1.24 is needed");
  lorac::ort::CustomOpDomain* domain = nullptr;
  if (lorac::ort::Status* status = api->CreateCustomOpDomain("lorac.native", &domain)) return status;
  if (lorac::ort::Status* status = api->CustomOpDomain_Add(domain, &op)) return status;
  return api->AddCustomOpDomain(options, domain);
}

LORAC_EXPORT int LoracNativeOpVersion() { return lorac::kVersion; }

LORAC_EXPORT const char* LoracNativeKernels() { return lorac::ChooseKernels().name; }
