// The operators of the domain accel.cpu, as ONNX Runtime sees them.
#include <string.h>

#include "argmax.h"
#include "operator.h"

namespace accel_cpu {
namespace {

constexpr char kDomain[] = "accel.cpu";

// Inputs; from the bias on they are those of the product, and optional.
constexpr size_t kData = 0, kWeight = 1, kScales = 2, kBias = 3, kFixedScale = 4, kResidual = 5, kNormWeight = 6,
                 kNormBias = 7;

// Attributes of the operators with a weight: N, K, bits, block_size; those of the product: activation, gated.
struct Weighted {
  const OrtApi* api;
  const KernelTable* table;
  WeightShape shape;
  int64_t features;  // N
  Activation activation = Activation::kNone;
  bool gated = false;
  float epsilon = 0.0f;  // of the norm ahead of the product, if there is one
  // What is an initializer is checked once, when the kernel is made; nullptr: it comes with each run.
  const uint8_t* values = nullptr;
  const void* scales = nullptr;
  const float* bias = nullptr;

  int64_t biases() const { return gated ? shape.outputs : features; }
};

OrtStatus* read_shape(const OrtApi& api, const OrtKernelInfo* info, Weighted* kernel) {
  int64_t bits = 0;
  WeightShape& shape = kernel->shape;
  ACCEL_RETURN_IF_ERROR(read_integer(api, info, "N", &kernel->features));
  ACCEL_RETURN_IF_ERROR(read_integer(api, info, "K", &shape.inputs));
  ACCEL_RETURN_IF_ERROR(read_integer(api, info, "bits", &bits));
  ACCEL_RETURN_IF_ERROR(read_integer(api, info, "block_size", &shape.block));
  if (kernel->features < 1 || kernel->features > kMaxOutputs || shape.inputs < 1 || shape.inputs > kMaxInputs) {
    return invalid(api, "accel.cpu: N = %lld, K = %lld; N must be in 1..%lld and K in 1..%lld",
                   static_cast<long long>(kernel->features), static_cast<long long>(shape.inputs),
                   static_cast<long long>(kMaxOutputs), static_cast<long long>(kMaxInputs));
  }
  if (bits != 4 && bits != 8) {
    return invalid(api, "accel.cpu: bits = %lld; must be 4 or 8", static_cast<long long>(bits));
  }
  if (shape.block != 0 && shape.block != 32 && shape.block != 64 && shape.block != 128) {
    return invalid(api, "accel.cpu: block_size = %lld; must be 0, 32, 64 or 128", static_cast<long long>(shape.block));
  }
  shape.bits = static_cast<int>(bits);
  shape.outputs = round_up(kernel->features, kTile) * (kernel->gated ? 2 : 1);
  return nullptr;
}

OrtStatus* read_epilogue(const OrtApi& api, const OrtKernelInfo* info, Weighted* kernel) {
  char name[32];
  int64_t gated = 0;
  ACCEL_RETURN_IF_ERROR(read_text(api, info, "activation", name, sizeof name));
  ACCEL_RETURN_IF_ERROR(read_integer(api, info, "gated", &gated));
  kernel->gated = gated != 0;
  size_t inputs = 0;
  ACCEL_RETURN_IF_ERROR(api.KernelInfo_GetInputCount(info, &inputs));
  if (inputs > kNormWeight) {
    ACCEL_RETURN_IF_ERROR(api.KernelInfoGetAttribute_float(info, "epsilon", &kernel->epsilon));
  }
  const struct {
    const char* name;
    Activation activation;
  } known[] = {{"", Activation::kNone},
               {"gelu", Activation::kGelu},
               {"gelu_tanh", Activation::kGeluTanh},
               {"silu", Activation::kSilu}};
  for (const auto& one : known) {
    if (strcmp(name, one.name) == 0) {
      kernel->activation = one.activation;
      return nullptr;
    }
  }
  return invalid(api, "accel.cpu: activation '%s'; must be '', 'gelu', 'gelu_tanh' or 'silu'", name);
}

OrtStatus* check_values(const Weighted& kernel, const Tensor& values) {
  if (values.elements == kernel.shape.bytes()) return nullptr;
  return invalid(*kernel.api, "accel.cpu: the packed weight has %lld bytes, but N, K and bits take %lld",
                 static_cast<long long>(values.elements), static_cast<long long>(kernel.shape.bytes()));
}

OrtStatus* check_scales(const Weighted& kernel, const Tensor& scales) {
  const int64_t numbers = kernel.shape.outputs * kernel.shape.blocks();
  if (scales.elements != numbers) {
    return invalid(*kernel.api, "accel.cpu: there are %lld scales, but N, K and block_size take %lld",
                   static_cast<long long>(scales.elements), static_cast<long long>(numbers));
  }
  const bool is_float = scales.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  const bool is_half =
      scales.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 || scales.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16;
  if (kernel.shape.block == 0 ? is_float : is_half) return nullptr;
  return invalid(*kernel.api, "accel.cpu: scales must be %s",
                 kernel.shape.block == 0 ? "float32" : "float16 or uint16");
}

OrtStatus* check_floats(const OrtApi& api, const Tensor& tensor, const char* name, int64_t elements) {
  if (tensor.data == nullptr || tensor.elements == elements) return nullptr;
  return invalid(api, "accel.cpu: %s has %lld elements; must have %lld", name,
                 static_cast<long long>(tensor.elements), static_cast<long long>(elements));
}

OrtStatus* read_initializers(const OrtApi& api, const OrtKernelInfo* info, bool product, Weighted* kernel) {
  Tensor values, scales, bias;
  ACCEL_RETURN_IF_ERROR(read_constant(api, info, kWeight, &values));
  ACCEL_RETURN_IF_ERROR(read_constant(api, info, kScales, &scales));
  if (product) ACCEL_RETURN_IF_ERROR(read_constant(api, info, kBias, &bias));
  if (values.data != nullptr) ACCEL_RETURN_IF_ERROR(check_values(*kernel, values));
  if (scales.data != nullptr) ACCEL_RETURN_IF_ERROR(check_scales(*kernel, scales));
  ACCEL_RETURN_IF_ERROR(check_floats(api, bias, "bias", kernel->biases()));
  kernel->values = static_cast<const uint8_t*>(values.data);
  kernel->scales = scales.data;
  kernel->bias = static_cast<const float*>(bias.data);
  return nullptr;
}

// Of the operators with a weight.
OrtStatus* create_weighted(const OrtApi* api, const OrtKernelInfo* info, bool product, void** result) {
  Weighted kernel{};
  kernel.api = api;
  const char* error = nullptr;
  kernel.table = choose_kernels(&error);
  if (kernel.table == nullptr) return invalid(*api, "accel.cpu: %s", error);
  if (product) ACCEL_RETURN_IF_ERROR(read_epilogue(*api, info, &kernel));
  ACCEL_RETURN_IF_ERROR(read_shape(*api, info, &kernel));
  ACCEL_RETURN_IF_ERROR(read_initializers(*api, info, product, &kernel));
  return keep(kernel, result);
}

OrtStatus* read_weight(const Weighted& kernel, const OrtKernelContext* context, Weight* weight) {
  *weight = {kernel.shape, kernel.values, kernel.scales};
  Tensor tensor;
  if (weight->values == nullptr) {
    ACCEL_RETURN_IF_ERROR(read_input(*kernel.api, context, kWeight, &tensor, nullptr));
    ACCEL_RETURN_IF_ERROR(check_values(kernel, tensor));
    weight->values = static_cast<const uint8_t*>(tensor.data);
  }
  if (weight->scales == nullptr) {
    ACCEL_RETURN_IF_ERROR(read_input(*kernel.api, context, kScales, &tensor, nullptr));
    ACCEL_RETURN_IF_ERROR(check_scales(kernel, tensor));
    weight->scales = tensor.data;
  }
  return nullptr;
}

OrtStatus* read_floats(const OrtApi& api, const OrtKernelContext* context, size_t index, const char* name,
                       int64_t elements, const float** data) {
  Tensor tensor;
  ACCEL_RETURN_IF_ERROR(read_input(api, context, index, &tensor, nullptr));
  *data = static_cast<const float*>(tensor.data);
  return check_floats(api, tensor, name, elements);
}

// The rows of a product: what rounds them, and the norm ahead of it, whose result is an output of its own.
OrtStatus* read_source(const Weighted& kernel, OrtKernelContext* context, const Tensor& x, const Dimensions& dimensions,
                       Source* source) {
  const OrtApi& api = *kernel.api;
  const float* fixed_scale = nullptr;
  const int64_t inputs = kernel.shape.inputs;
  source->x = static_cast<const float*>(x.data);
  source->epsilon = kernel.epsilon;
  ACCEL_RETURN_IF_ERROR(read_floats(api, context, kFixedScale, "x_scale", 1, &fixed_scale));
  if (fixed_scale != nullptr) source->fixed_scale = *fixed_scale;
  if (fixed_scale != nullptr && !(*fixed_scale > 1e-30f && *fixed_scale < 1e30f)) {
    return invalid(api, "accel.cpu: x_scale = %g; must be a positive number", static_cast<double>(*fixed_scale));
  }
  ACCEL_RETURN_IF_ERROR(read_floats(api, context, kNormWeight, "norm_weight", inputs, &source->norm_weight));
  ACCEL_RETURN_IF_ERROR(read_floats(api, context, kNormBias, "norm_bias", inputs, &source->norm_bias));
  if (source->norm_weight == nullptr) return nullptr;
  size_t outputs = 0;
  ACCEL_RETURN_IF_ERROR(api.KernelContext_GetOutputCount(context, &outputs));
  if (outputs < 2) return invalid(api, "accel.cpu: a product with a norm must have two outputs");
  void* normalised = nullptr;
  ACCEL_RETURN_IF_ERROR(make_output(api, context, 1, dimensions, &normalised));
  source->normalised = static_cast<float*>(normalised);
  return nullptr;
}

struct QuantizedMatMul {
  using Kernel = Weighted;

  static constexpr const char* kName = "QuantizedMatMul";
  static constexpr size_t kInputs = 8, kRequired = 3, kOutputs = 2, kRequiredOutputs = 1;

  static ONNXTensorElementDataType output_type(size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }

  static OrtStatus* create(const OrtApi* api, const OrtKernelInfo* info, void** result) {
    return create_weighted(api, info, true, result);
  }

  static ONNXTensorElementDataType input_type(size_t index) {
    return index == kWeight   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
           : index == kScales ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED  // float32, float16 or uint16
                              : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  static OrtStatus* compute(const Weighted& kernel, OrtKernelContext* context) {
    const OrtApi& api = *kernel.api;
    Tensor x;
    Dimensions dimensions;
    Weight weight;
    ACCEL_RETURN_IF_ERROR(read_input(api, context, kData, &x, &dimensions));
    if (dimensions.rank == 0 || dimensions.sizes[dimensions.rank - 1] != kernel.shape.inputs) {
      return invalid(api, "accel.cpu: x must end in a dimension of K = %lld",
                     static_cast<long long>(kernel.shape.inputs));
    }
    ACCEL_RETURN_IF_ERROR(read_weight(kernel, context, &weight));
    const int64_t rows = x.elements / kernel.shape.inputs;
    Epilogue epilogue;
    epilogue.features = kernel.features;
    epilogue.activation = kernel.activation;
    epilogue.gated = kernel.gated;
    epilogue.bias = kernel.bias;
    if (kernel.bias == nullptr) {
      ACCEL_RETURN_IF_ERROR(read_floats(api, context, kBias, "bias", kernel.biases(), &epilogue.bias));
    }
    Source source;
    ACCEL_RETURN_IF_ERROR(read_source(kernel, context, x, dimensions, &source));
    const int64_t results = rows * kernel.features;
    ACCEL_RETURN_IF_ERROR(read_floats(api, context, kResidual, "residual", results, &epilogue.residual));
    dimensions.sizes[dimensions.rank - 1] = kernel.features;
    void* result = nullptr;
    ACCEL_RETURN_IF_ERROR(make_output(api, context, 0, dimensions, &result));
    epilogue.result = static_cast<float*>(result);
    return status_of(api, quantized_matmul(*kernel.table, weight, source, rows, epilogue, session_threads(api, context)));
  }
};

struct QuantizedGather {
  using Kernel = Weighted;

  static constexpr const char* kName = "QuantizedGather";
  static constexpr size_t kInputs = 3, kRequired = 3, kOutputs = 1, kRequiredOutputs = 1;

  static ONNXTensorElementDataType output_type(size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }

  static OrtStatus* create(const OrtApi* api, const OrtKernelInfo* info, void** result) {
    return create_weighted(api, info, false, result);
  }

  static ONNXTensorElementDataType input_type(size_t index) {
    return index == kData     ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
           : index == kWeight ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                              : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }

  static OrtStatus* compute(const Weighted& kernel, OrtKernelContext* context) {
    const OrtApi& api = *kernel.api;
    Tensor ids;
    Dimensions dimensions;
    Weight weight;
    ACCEL_RETURN_IF_ERROR(read_input(api, context, kData, &ids, &dimensions));
    ACCEL_RETURN_IF_ERROR(read_weight(kernel, context, &weight));
    const int64_t* values = static_cast<const int64_t*>(ids.data);
    for (int64_t i = 0; i < ids.elements; ++i) {
      if (values[i] < 0 || values[i] >= kernel.features) {
        return invalid(api, "accel.cpu: id %lld is outside the table of %lld rows", static_cast<long long>(values[i]),
                       static_cast<long long>(kernel.features));
      }
    }
    if (dimensions.rank == kMaxRank) return invalid(api, "accel.cpu: ids have rank %zu; too many", kMaxRank);
    dimensions.sizes[dimensions.rank++] = kernel.shape.inputs;
    void* result = nullptr;
    ACCEL_RETURN_IF_ERROR(make_output(api, context, 0, dimensions, &result));
    return status_of(api, quantized_gather(weight, values, ids.elements, static_cast<float*>(result),
                                           session_threads(api, context)));
  }
};

struct ArgMax {
  struct Kernel {
    const OrtApi* api;
  };

  static constexpr const char* kName = "ArgMax";
  static constexpr size_t kInputs = 1, kRequired = 1, kOutputs = 2, kRequiredOutputs = 2;

  static ONNXTensorElementDataType input_type(size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }

  static ONNXTensorElementDataType output_type(size_t index) {
    return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  static OrtStatus* create(const OrtApi* api, const OrtKernelInfo*, void** result) {
    return keep(Kernel{api}, result);
  }

  static OrtStatus* compute(const Kernel& kernel, OrtKernelContext* context) {
    const OrtApi& api = *kernel.api;
    Tensor x;
    Dimensions dimensions;
    ACCEL_RETURN_IF_ERROR(read_input(api, context, kData, &x, &dimensions));
    if (dimensions.rank == 0 || dimensions.sizes[dimensions.rank - 1] < 1) {
      return invalid(api, "accel.cpu: x must have a last dimension of one value at least");
    }
    const int64_t width = dimensions.sizes[--dimensions.rank];
    void *indices = nullptr, *values = nullptr;
    ACCEL_RETURN_IF_ERROR(make_output(api, context, 0, dimensions, &indices));
    ACCEL_RETURN_IF_ERROR(make_output(api, context, 1, dimensions, &values));
    return status_of(api, argmax(static_cast<const float*>(x.data), x.elements / width, width,
                                 static_cast<int64_t*>(indices), static_cast<float*>(values),
                                 session_threads(api, context)));
  }
};

OrtStatus* register_operators(OrtSessionOptions* options, const OrtApi& api) {
  static constexpr OrtCustomOp matmul = describe<QuantizedMatMul>();
  static constexpr OrtCustomOp gather = describe<QuantizedGather>();
  static constexpr OrtCustomOp best = describe<ArgMax>();
  OrtCustomOpDomain* domain = nullptr;
  ACCEL_RETURN_IF_ERROR(api.CreateCustomOpDomain(kDomain, &domain));
  OrtStatus* status = api.CustomOpDomain_Add(domain, &matmul);
  if (status == nullptr) status = api.CustomOpDomain_Add(domain, &gather);
  if (status == nullptr) status = api.CustomOpDomain_Add(domain, &best);
  if (status == nullptr) status = api.CustomOpDomain_Add(domain, attention_operator());
  if (status == nullptr) status = api.AddCustomOpDomain(options, domain);
  if (status != nullptr) api.ReleaseCustomOpDomain(domain);
  return status;  // the domain lives as long as the library: sessions refer to it
}

}  // namespace
}  // namespace accel_cpu

#define ACCEL_EXPORT extern "C" __attribute__((visibility("default")))

ACCEL_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {  // an older ONNX Runtime: version 1 is enough to say so
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "accel.cpu needs a newer ONNX Runtime");
  }
  return accel_cpu::register_operators(options, *api);
}

// Name of the instruction set that kernels made now would use, or why there is none.
ACCEL_EXPORT const char* accel_cpu_instruction_set() {
  const char* error = nullptr;
  const accel_cpu::KernelTable* table = accel_cpu::choose_kernels(&error);
  return table != nullptr ? table->name : error;
}
