#include "context.h"

#include <stdarg.h>
#include <stdio.h>

namespace accel_cpu {

OrtStatus* invalid(const OrtApi& api, const char* format, ...) {
  char message[320];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  return api.CreateStatus(ORT_INVALID_ARGUMENT, message);
}

OrtStatus* status_of(const OrtApi& api, Outcome outcome) {
  switch (outcome) {
    case Outcome::kDone:
      return nullptr;
    case Outcome::kOutOfMemory:
      return api.CreateStatus(ORT_FAIL, "accel.cpu: Failed to allocate memory for activations");
    case Outcome::kPoolFailed:
      break;
  }
  return api.CreateStatus(ORT_FAIL, "accel.cpu: ONNX Runtime's thread pool refused the work");
}

OrtStatus* read_tensor(const OrtApi& api, const OrtValue* value, Tensor* tensor, Dimensions* dimensions) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ACCEL_RETURN_IF_ERROR(api.GetTensorTypeAndShape(value, &info));
  size_t elements = 0;
  OrtStatus* status = api.GetTensorShapeElementCount(info, &elements);
  if (status == nullptr) status = api.GetTensorElementType(info, &tensor->type);
  if (status == nullptr && dimensions != nullptr) {
    status = api.GetDimensionsCount(info, &dimensions->rank);
    if (status == nullptr && dimensions->rank > kMaxRank) {
      status = invalid(api, "accel.cpu: an input has rank %zu; at most %zu is supported", dimensions->rank, kMaxRank);
    }
    if (status == nullptr) status = api.GetDimensions(info, dimensions->sizes, dimensions->rank);
  }
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (status != nullptr) return status;
  tensor->elements = static_cast<int64_t>(elements);
  void* data = nullptr;
  ACCEL_RETURN_IF_ERROR(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  static const char nothing = 0;
  tensor->data = data != nullptr ? data : &nothing;  // an empty tensor is there all the same
  return nullptr;
}

OrtStatus* read_input(const OrtApi& api, const OrtKernelContext* context, size_t index, Tensor* tensor,
                      Dimensions* dimensions) {
  size_t count = 0;
  *tensor = {};
  ACCEL_RETURN_IF_ERROR(api.KernelContext_GetInputCount(context, &count));
  if (index >= count) return nullptr;
  const OrtValue* value = nullptr;
  ACCEL_RETURN_IF_ERROR(api.KernelContext_GetInput(context, index, &value));
  return value == nullptr ? nullptr : read_tensor(api, value, tensor, dimensions);
}

OrtStatus* read_constant(const OrtApi& api, const OrtKernelInfo* info, size_t index, Tensor* tensor) {
  size_t count = 0;
  *tensor = {};
  ACCEL_RETURN_IF_ERROR(api.KernelInfo_GetInputCount(info, &count));
  if (index >= count) return nullptr;
  int constant = 0;
  const OrtValue* value = nullptr;
  ACCEL_RETURN_IF_ERROR(api.KernelInfoGetConstantInput_tensor(info, index, &constant, &value));
  return constant == 0 || value == nullptr ? nullptr : read_tensor(api, value, tensor, nullptr);
}

OrtStatus* make_output(const OrtApi& api, OrtKernelContext* context, size_t index, const Dimensions& dimensions,
                       void** data) {
  OrtValue* value = nullptr;
  ACCEL_RETURN_IF_ERROR(api.KernelContext_GetOutput(context, index, dimensions.sizes, dimensions.rank, &value));
  return api.GetTensorMutableData(value, data);
}

OrtStatus* read_integer(const OrtApi& api, const OrtKernelInfo* info, const char* name, int64_t* value) {
  return api.KernelInfoGetAttribute_int64(info, name, value);
}

OrtStatus* read_text(const OrtApi& api, const OrtKernelInfo* info, const char* name, char* text, size_t size) {
  text[0] = '\0';
  return api.KernelInfoGetAttribute_string(info, name, text, &size);
}

Pool session_threads(const OrtApi& api, const OrtKernelContext* context) {
  const auto run = [](const Pool& pool, Pool::Task task, size_t count, void* data) {
    if (count == 1) {
      task(data, 0);
      return true;
    }
    const OrtApi& api = *static_cast<const OrtApi*>(pool.api);
    const auto* context = static_cast<const OrtKernelContext*>(pool.context);
    OrtStatus* status = api.KernelContext_ParallelFor(context, task, count, 0, data);
    if (status == nullptr) return true;
    api.ReleaseStatus(status);
    return false;
  };
  return {run, &api, context};
}

}  // namespace accel_cpu
