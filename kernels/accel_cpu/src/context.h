// Thin readers over ONNX Runtime's C API: every failure becomes an OrtStatus.
#pragma once

#include <stdint.h>

#include "../third_party/onnxruntime_c_api.h"
#include "matmul.h"

namespace accel_cpu {

#define ACCEL_RETURN_IF_ERROR(expression)          \
  do {                                             \
    OrtStatus* status_of_call = (expression);      \
    if (status_of_call != nullptr) return status_of_call; \
  } while (false)

struct Tensor {
  const void* data = nullptr;  // nullptr: the optional input is absent
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  int64_t elements = 0;
};

constexpr size_t kMaxRank = 8;

struct Dimensions {
  size_t rank = 0;
  int64_t sizes[kMaxRank] = {};
};

// dimensions may be nullptr.
OrtStatus* read_tensor(const OrtApi& api, const OrtValue* value, Tensor* tensor, Dimensions* dimensions);
OrtStatus* read_input(const OrtApi& api, const OrtKernelContext* context, size_t index, Tensor* tensor,
                      Dimensions* dimensions);
// Of an initializer, whose memory stays where it is as long as the session lives; absent for what comes with each run.
OrtStatus* read_constant(const OrtApi& api, const OrtKernelInfo* info, size_t index, Tensor* tensor);
OrtStatus* make_output(const OrtApi& api, OrtKernelContext* context, size_t index, const Dimensions& dimensions,
                       void** data);
OrtStatus* read_integer(const OrtApi& api, const OrtKernelInfo* info, const char* name, int64_t* value);
OrtStatus* read_text(const OrtApi& api, const OrtKernelInfo* info, const char* name, char* text, size_t size);

OrtStatus* invalid(const OrtApi& api, const char* format, ...) __attribute__((format(printf, 2, 3)));
OrtStatus* status_of(const OrtApi& api, Outcome outcome);

// ONNX Runtime's own threads, those of the session that runs.
Pool session_threads(const OrtApi& api, const OrtKernelContext* context);

}  // namespace accel_cpu
