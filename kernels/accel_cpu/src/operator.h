// What ONNX Runtime wants to know of an operator, from a class that says it shortly.
#pragma once

#include <stdlib.h>

#include "context.h"

namespace accel_cpu {

// A copy of the kernel, of plain data, for ONNX Runtime to keep.
template <class Kernel>
OrtStatus* keep(const Kernel& kernel, void** result) {
  Kernel* kept = static_cast<Kernel*>(malloc(sizeof kernel));
  if (kept == nullptr) return kernel.api->CreateStatus(ORT_FAIL, "accel.cpu: Failed to allocate a kernel");
  *kept = kernel;
  *result = kept;
  return nullptr;
}

// Operator offers: Kernel, kName, kInputs, kRequired (of them), kOutputs, kRequiredOutputs, input_type, output_type,
// create, compute.
template <class Operator>
constexpr OrtCustomOp describe() {
  OrtCustomOp op{};
  op.version = ORT_API_VERSION;
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    *kernel = nullptr;
    return Operator::create(api, info, kernel);
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return Operator::compute(*static_cast<const typename Operator::Kernel*>(kernel), context);
  };
  op.KernelDestroy = [](void* kernel) { free(kernel); };
  op.GetName = [](const OrtCustomOp*) { return Operator::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return Operator::kInputs; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) { return Operator::input_type(index); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index < Operator::kRequired ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return Operator::kOutputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t index) { return Operator::output_type(index); };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index < Operator::kRequiredOutputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  return op;
}

const OrtCustomOp* attention_operator();

}  // namespace accel_cpu
