// The part of ONNX Runtime's C interface that a custom op needs.
//
// ONNX Runtime only ever appends to OrtApi, so the places of its functions hold for every later release; they are those
// of its own header onnxruntime_c_api.h. Declared here, the library builds without that header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lorac::ort {

struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct CustomOpDomain;
struct CustomOp;
struct ShapeInferContext;

constexpr uint32_t kApiVersion = 24;  // the first with GetTensorElementTypeAndShapeDataReference: ONNX Runtime 1.24
constexpr int kInvalidArgument = 2;
enum ElementType : int { kUndefined = 0, kFloat = 1, kInt32 = 6, kFloat16 = 10 };
enum Arity : int { kRequired = 0, kOptional = 1, kVariadic = 2 };

struct Api {
  void (*functions[415])();

  template <typename Function>
  Function At(size_t place) const {
    return reinterpret_cast<Function>(functions[place]);
  }
  Status* CreateStatus(int code, const char* text) const {
    return At<Status* (*)(int, const char*)>(0)(code, text);
  }
  Status* CreateCustomOpDomain(const char* name, CustomOpDomain** domain) const {
    return At<Status* (*)(const char*, CustomOpDomain**)>(26)(name, domain);
  }
  Status* CustomOpDomain_Add(CustomOpDomain* domain, const CustomOp* op) const {
    return At<Status* (*)(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
  }
  Status* AddCustomOpDomain(SessionOptions* options, CustomOpDomain* domain) const {
    return At<Status* (*)(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }
  Status* GetTensorMutableData(const Value* value, void** data) const {
    return At<Status* (*)(const Value*, void**)>(51)(value, data);
  }
  Status* KernelContext_GetInputCount(const KernelContext* context, size_t* count) const {
    return At<Status* (*)(const KernelContext*, size_t*)>(88)(context, count);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index, const Value** value) const {
    return At<Status* (*)(const KernelContext*, size_t, const Value**)>(90)(context, index, value);
  }
  Status* KernelContext_GetOutput(
      KernelContext* context, size_t index, const int64_t* shape, size_t axes, Value** value) const {
    return At<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(
        context, index, shape, axes, value);
  }
  void ReleaseStatus(Status* status) const { At<void (*)(Status*)>(93)(status); }
  Status* KernelInfoGetAttributeArray_int64(
      const KernelInfo* info, const char* name, int64_t* values, size_t* size) const {
    return At<Status* (*)(const KernelInfo*, const char*, int64_t*, size_t*)>(163)(info, name, values, size);
  }
  Status* KernelInfo_GetInputCount(const KernelInfo* info, size_t* count) const {
    return At<Status* (*)(const KernelInfo*, size_t*)>(230)(info, count);
  }
  Status* KernelInfo_GetOutputCount(const KernelInfo* info, size_t* count) const {
    return At<Status* (*)(const KernelInfo*, size_t*)>(231)(info, count);
  }
  Status* KernelContext_ParallelFor(
      const KernelContext* context, void (*function)(void*, size_t), size_t total, size_t batches, void* data) const {
    return At<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, function, total, batches, data);
  }
  Status* GetTensorElementTypeAndShapeDataReference(
      const Value* value, ElementType* type, const int64_t** shape, size_t* axes) const {
    return At<Status* (*)(const Value*, ElementType*, const int64_t**, size_t*)>(414)(value, type, shape, axes);
  }
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  Arity (*GetInputCharacteristic)(const CustomOp*, size_t index);
  Arity (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  int (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShape)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // namespace lorac::ort
