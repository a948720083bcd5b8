#include "matmul.h"

#include <cstdlib>
#include <thread>

namespace accel_cpu {
namespace {

constexpr int64_t kRowsPerTask = 192;        // their activations stay in a core's cache while panels pass by
constexpr int64_t kTaskOperations = 8 << 20; // multiply-adds; some 20 us of one core
constexpr int64_t kTaskBytes = 128 << 10;    // of weights that one task streams; some 10 us of one core
constexpr int64_t kQuantizedPerTask = 32 << 10;
constexpr int64_t kGatheredPerTask = 32 << 10;
constexpr int64_t kSerialValues = 16 << 10;  // quantised by the caller itself: waking the pool takes as long

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory that a thread keeps between calls; grows to the largest product it ran.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 4096));
      memory_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (memory_ == nullptr) size_ = 0;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

// Distance of rows: whole cache lines, and never a power of two, which would put all rows into the same cache sets.
int64_t row_stride(int64_t inputs) {
  const int64_t stride = round_up(inputs, 64);
  return stride % 1024 == 0 ? stride + 64 : stride;
}

bool reserve_rows(const WeightShape& shape, int64_t rows, QuantizedRows* result) {
  thread_local Scratch scratch;
  result->stride = row_stride(shape.padded_inputs());
  const int64_t values = rows * result->stride;
  const int64_t numbers = round_up(rows * shape.blocks() * 4, 64);
  char* memory = scratch.reserve(static_cast<size_t>(values + 2 * numbers));
  if (memory == nullptr) return false;
  result->values = reinterpret_cast<int8_t*>(memory);
  result->scales = reinterpret_cast<float*>(memory + values);
  result->starts = reinterpret_cast<int32_t*>(memory + values + numbers);
  return true;
}

struct Product {
  const KernelTable* kernels;
  const Weight* weight;
  const float* x;
  int64_t rows;
  float fixed_scale;
  const Epilogue* epilogue;
  QuantizedRows quantized;
  int64_t quantize_tasks;
  int64_t row_tasks;
  int64_t panel_tasks;
};

void quantize_task(void* data, size_t index) {
  const Product& p = *static_cast<const Product*>(data);
  const int64_t i = static_cast<int64_t>(index);
  p.kernels->quantize_rows(p.x, p.rows * i / p.quantize_tasks, p.rows * (i + 1) / p.quantize_tasks, p.weight->shape,
                           p.fixed_scale, p.quantized);
}

void multiply_task(void* data, size_t index) {
  const Product& p = *static_cast<const Product*>(data);
  const int64_t rows = static_cast<int64_t>(index) % p.row_tasks;  // neighbouring tasks share their panels
  const int64_t panels = static_cast<int64_t>(index) / p.row_tasks;
  const int64_t count = p.weight->shape.panels();
  p.kernels->multiply(*p.weight, p.quantized, p.rows * rows / p.row_tasks, p.rows * (rows + 1) / p.row_tasks,
                      count * panels / p.panel_tasks, count * (panels + 1) / p.panel_tasks, *p.epilogue);
}

// Tasks large enough to outweigh handing them out, and enough of them for every thread to end at the same time.
void plan(Product* p) {
  static const int64_t threads = most(1, static_cast<int64_t>(std::thread::hardware_concurrency()));
  const WeightShape& shape = p->weight->shape;
  const int64_t panels = shape.panels();
  p->row_tasks = (p->rows + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t rows = (p->rows + p->row_tasks - 1) / p->row_tasks;
  const int64_t operations = rows * kPanel * shape.padded_inputs();
  const int64_t by_operations = most(1, kTaskOperations / most(1, operations));
  const int64_t by_bytes = most(1, kTaskBytes / (kPanel * shape.bytes_per_output()));
  const int64_t panels_per_task = least(by_operations, by_bytes);
  p->panel_tasks = (panels + panels_per_task - 1) / panels_per_task;
  while (p->row_tasks * p->panel_tasks < 4 * threads && p->rows / p->row_tasks > 32) p->row_tasks *= 2;
}

struct Lookup {
  const Weight* weight;
  const int64_t* ids;
  int64_t count;
  float* result;
  int64_t tasks;
};

void gather_task(void* data, size_t index) {
  const Lookup& l = *static_cast<const Lookup*>(data);
  const int64_t i = static_cast<int64_t>(index);
  gather_rows(*l.weight, l.ids, l.count * i / l.tasks, l.count * (i + 1) / l.tasks, l.result);
}

}  // namespace

Outcome quantized_matmul(const KernelTable& kernels, const Weight& weight, const float* x, int64_t rows,
                         float fixed_scale, const Epilogue& epilogue, Pool& pool) {
  if (rows == 0) return Outcome::kDone;
  Product product{&kernels, &weight, x, rows, fixed_scale, &epilogue, {}, 1, 1, 1};
  if (!reserve_rows(weight.shape, rows, &product.quantized)) return Outcome::kOutOfMemory;
  const int64_t values = rows * weight.shape.inputs;
  if (values <= kSerialValues) {
    quantize_task(&product, 0);
  } else {
    product.quantize_tasks = least(rows, (values + kQuantizedPerTask - 1) / kQuantizedPerTask);
    const size_t tasks = static_cast<size_t>(product.quantize_tasks);
    if (!pool.run(quantize_task, tasks, &product)) return Outcome::kPoolFailed;
  }
  plan(&product);
  const size_t tasks = static_cast<size_t>(product.row_tasks * product.panel_tasks);
  return pool.run(multiply_task, tasks, &product) ? Outcome::kDone : Outcome::kPoolFailed;
}

Outcome quantized_gather(const Weight& weight, const int64_t* ids, int64_t count, float* result, Pool& pool) {
  if (count == 0) return Outcome::kDone;
  const int64_t values = count * weight.shape.inputs;
  Lookup lookup{&weight, ids, count, result, least(count, (values + kGatheredPerTask - 1) / kGatheredPerTask)};
  if (lookup.tasks <= 1) {
    gather_task(&lookup, 0);
    return Outcome::kDone;
  }
  return pool.run(gather_task, static_cast<size_t>(lookup.tasks), &lookup) ? Outcome::kDone : Outcome::kPoolFailed;
}

}  // namespace accel_cpu
