// Attention of encoders, as ONNX Runtime sees it.
#include "attention.h"
#include "operator.h"

namespace accel_cpu {
namespace {

constexpr size_t kQuery = 0, kKey = 1, kValue = 2, kMask = 3;

struct Attention {
  struct Kernel {
    const OrtApi* api;
    const KernelTable* table;
    int64_t heads;
    float scale;
  };

  static constexpr const char* kName = "Attention";
  static constexpr size_t kInputs = 4, kRequired = 1, kOutputs = 1, kRequiredOutputs = 1;

  static ONNXTensorElementDataType input_type(size_t index) {
    return index == kMask ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  static ONNXTensorElementDataType output_type(size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }

  static OrtStatus* create(const OrtApi* api, const OrtKernelInfo* info, void** result) {
    Kernel kernel{api, nullptr, 0, 0.0f};
    const char* error = nullptr;
    kernel.table = choose_kernels(&error);
    if (kernel.table == nullptr) return invalid(*api, "accel.cpu: %s", error);
    ACCEL_RETURN_IF_ERROR(read_integer(*api, info, "num_heads", &kernel.heads));
    ACCEL_RETURN_IF_ERROR(api->KernelInfoGetAttribute_float(info, "scale", &kernel.scale));
    if (kernel.heads < 1 || kernel.heads > INT32_MAX) {
      return invalid(*api, "accel.cpu: num_heads = %lld; must be positive", static_cast<long long>(kernel.heads));
    }
    return keep(kernel, result);
  }

  // q, k and v: three tensors, or one that holds them side by side.
  static OrtStatus* read_rows(const OrtApi& api, const OrtKernelContext* context, AttentionInputs* inputs,
                              Dimensions* dimensions) {
    Tensor q, k, v;
    Dimensions of_k, of_v;
    ACCEL_RETURN_IF_ERROR(read_input(api, context, kQuery, &q, dimensions));
    ACCEL_RETURN_IF_ERROR(read_input(api, context, kKey, &k, &of_k));
    ACCEL_RETURN_IF_ERROR(read_input(api, context, kValue, &v, &of_v));
    const bool packed = k.data == nullptr && v.data == nullptr;
    int64_t* sizes = dimensions->sizes;
    const int64_t rows = packed ? 3 * inputs->heads : inputs->heads;
    if (dimensions->rank != 3 || sizes[2] < rows || sizes[2] % rows != 0 || sizes[2] / rows > kMaxHeadSize) {
      return invalid(api, "accel.cpu: q must be [batch, length, num_heads * size]%s, size at most %lld",
                     packed ? ", three times as wide where it holds k and v too" : "",
                     static_cast<long long>(kMaxHeadSize));
    }
    inputs->q_stride = inputs->kv_stride = sizes[2];
    inputs->batch = sizes[0];
    inputs->length = sizes[1];
    inputs->size = sizes[2] / rows;
    sizes[2] = inputs->heads * inputs->size;
    inputs->q = static_cast<const float*>(q.data);
    if (packed) {
      inputs->k = inputs->q + sizes[2];
      inputs->v = inputs->k + sizes[2];
      return nullptr;
    }
    inputs->k = static_cast<const float*>(k.data);
    inputs->v = static_cast<const float*>(v.data);
    const auto alike = [&](const Tensor& tensor, const Dimensions& of) {
      return tensor.data != nullptr && of.rank == 3 && of.sizes[0] == sizes[0] && of.sizes[1] == sizes[1] &&
             of.sizes[2] == sizes[2];
    };
    return alike(k, of_k) && alike(v, of_v) ? nullptr : invalid(api, "accel.cpu: k and v must have the shape of q");
  }

  static OrtStatus* read_mask(const OrtApi& api, const OrtKernelContext* context, AttentionInputs* inputs) {
    Tensor mask;
    Dimensions dimensions;
    ACCEL_RETURN_IF_ERROR(read_input(api, context, kMask, &mask, &dimensions));
    inputs->mask = static_cast<const int32_t*>(mask.data);
    if (mask.data == nullptr || (dimensions.rank == 2 && dimensions.sizes[0] == inputs->batch &&
                                 dimensions.sizes[1] == inputs->length)) {
      return nullptr;
    }
    return invalid(api, "accel.cpu: mask must be [batch, length] = [%lld, %lld]",
                   static_cast<long long>(inputs->batch), static_cast<long long>(inputs->length));
  }

  static OrtStatus* compute(const Kernel& kernel, OrtKernelContext* context) {
    const OrtApi& api = *kernel.api;
    AttentionInputs inputs{};
    inputs.heads = kernel.heads;
    inputs.scale = kernel.scale;
    Dimensions dimensions;
    ACCEL_RETURN_IF_ERROR(read_rows(api, context, &inputs, &dimensions));
    ACCEL_RETURN_IF_ERROR(read_mask(api, context, &inputs));
    void* result = nullptr;
    ACCEL_RETURN_IF_ERROR(make_output(api, context, 0, dimensions, &result));
    return status_of(api, attention(*kernel.table, inputs, static_cast<float*>(result), session_threads(api, context)));
  }
};

}  // namespace

const OrtCustomOp* attention_operator() {
  static constexpr OrtCustomOp op = describe<Attention>();
  return &op;
}

}  // namespace accel_cpu
