#include "matmul.h"

#include <unistd.h>

#include "scratch.h"

namespace accel_cpu {
namespace {

constexpr int64_t kRowsPerPass = 2048;       // quantised at once: bounds the memory that they take
constexpr int64_t kRowsPerTask = 192;        // their activations stay in a core's cache while panels pass by
constexpr int64_t kFewestRows = 32;          // below, a task would read its weights for too little work
constexpr int64_t kTasksPerProcessor = 8;    // so that all end at nearly the same time
constexpr int64_t kShortestTask = 3000;      // ns; handing out a task takes some 100 ns
constexpr int64_t kLongestTask = 40000;      // ns; the last one may run alone
constexpr int64_t kBytesPerNs = 14;          // of one core among two, streaming weights
constexpr int64_t kProductsPerNs = 200;      // multiply-adds of one core
constexpr int64_t kQuantizedPerTask = 16 << 10;
constexpr int64_t kGatheredPerTask = 16 << 10;
constexpr int64_t kSerialValues = 24 << 10;  // quantised by the caller itself: waking the others takes as long

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Distance of rows: whole cache lines, and never a power of two, which would put all rows into the same cache sets.
int64_t row_stride(int64_t inputs) {
  const int64_t stride = round_up(inputs, 64);
  return stride % 1024 == 0 ? stride + 64 : stride;
}

// What the quantised rows take, and where they lie in memory of that size.
struct RowsLayout {
  int64_t stride, values, numbers;

  RowsLayout(const WeightShape& shape, int64_t rows)
      : stride(row_stride(shape.padded_inputs())),
        values(rows * stride),
        numbers(round_up(rows * shape.blocks() * 4, 64)) {}

  size_t bytes() const { return static_cast<size_t>(values + 2 * numbers); }

  QuantizedRows in(char* memory) const {
    return {reinterpret_cast<int8_t*>(memory), stride, reinterpret_cast<float*>(memory + values),
            reinterpret_cast<int32_t*>(memory + values + numbers)};
  }
};

struct Product {
  const KernelTable* kernels;
  const Weight* weight;
  const Source* source;
  int64_t rows;
  const Epilogue* epilogue;
  QuantizedRows quantized;
  int64_t quantize_tasks;
  int64_t row_tasks;
  int64_t panel_tasks;
};

void quantize_task(void* data, size_t index) {
  const Product& p = *static_cast<const Product*>(data);
  const int64_t i = static_cast<int64_t>(index);
  p.kernels->quantize_rows(*p.source, p.rows * i / p.quantize_tasks, p.rows * (i + 1) / p.quantize_tasks,
                           p.weight->shape, p.quantized);
}

void multiply_task(void* data, size_t index) {
  const Product& p = *static_cast<const Product*>(data);
  const int64_t rows = static_cast<int64_t>(index) % p.row_tasks;  // neighbouring tasks share their panels
  const int64_t panels = static_cast<int64_t>(index) / p.row_tasks;
  const int64_t count = p.weight->shape.panels();
  p.kernels->multiply(*p.weight, p.quantized, p.rows * rows / p.row_tasks, p.rows * (rows + 1) / p.row_tasks,
                      count * panels / p.panel_tasks, count * (panels + 1) / p.panel_tasks, *p.epilogue);
}

// Tasks long enough to outweigh handing them out, and enough of them for every thread to end at the same time.
void plan(Product* p) {
  const WeightShape& shape = p->weight->shape;
  const int64_t panels = shape.panels();
  const int64_t wanted = kTasksPerProcessor * processors();
  p->row_tasks = (p->rows + kRowsPerTask - 1) / kRowsPerTask;
  while (p->row_tasks * panels < wanted / 2 && p->rows / p->row_tasks >= 2 * kFewestRows) p->row_tasks *= 2;
  const int64_t rows = (p->rows + p->row_tasks - 1) / p->row_tasks;
  const int64_t panel_ns = most(1, kPanel * shape.bytes_per_output() / kBytesPerNs +
                                       rows * kPanel * shape.padded_inputs() / kProductsPerNs);
  const int64_t fair_ns = panel_ns * panels * p->row_tasks / wanted;
  const int64_t panels_per_task = most(1, least(kLongestTask, most(kShortestTask, fair_ns)) / panel_ns);
  p->panel_tasks = (panels + panels_per_task - 1) / panels_per_task;
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

// Quantises all rows, then multiplies them.
Outcome run(Product* p, const Pool& pool) {
  const int64_t values = p->rows * p->weight->shape.inputs;
  if (values <= kSerialValues) {
    quantize_task(p, 0);
  } else {
    p->quantize_tasks = least(p->rows, (values + kQuantizedPerTask - 1) / kQuantizedPerTask);
    if (!pool.run(pool, quantize_task, static_cast<size_t>(p->quantize_tasks), p)) return Outcome::kPoolFailed;
  }
  plan(p);
  const size_t tasks = static_cast<size_t>(p->row_tasks * p->panel_tasks);
  return pool.run(pool, multiply_task, tasks, p) ? Outcome::kDone : Outcome::kPoolFailed;
}

}  // namespace

int64_t processors() {
  static int64_t known = 0;  // every thread that finds nothing finds the same
  int64_t count = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (count == 0) {
    count = most(1, sysconf(_SC_NPROCESSORS_ONLN));
    __atomic_store_n(&known, count, __ATOMIC_RELAXED);
  }
  return count;
}

Outcome quantized_matmul(const KernelTable& kernels, const Weight& weight, const Source& source, int64_t rows,
                         const Epilogue& epilogue, const Pool& pool) {
  if (rows == 0) return Outcome::kDone;
  const RowsLayout layout(weight.shape, least(rows, kRowsPerPass));
  const Scratch scratch(layout.bytes());
  if (scratch.data() == nullptr) return Outcome::kOutOfMemory;
  const QuantizedRows quantized = layout.in(scratch.data());
  Outcome outcome = Outcome::kDone;
  for (int64_t first = 0; first < rows && outcome == Outcome::kDone; first += kRowsPerPass) {
    Epilogue part = epilogue;
    part.result += first * part.features;
    if (part.residual != nullptr) part.residual += first * part.features;
    Source rest = source;
    rest.x += first * weight.shape.inputs;
    if (rest.normalised != nullptr) rest.normalised += first * weight.shape.inputs;
    const int64_t count = least(rows - first, kRowsPerPass);
    Product product{&kernels, &weight, &rest, count, &part, quantized, 1, 1, 1};
    outcome = run(&product, pool);
  }
  return outcome;
}

Outcome quantized_gather(const Weight& weight, const int64_t* ids, int64_t count, float* result, const Pool& pool) {
  if (count == 0) return Outcome::kDone;
  const int64_t values = count * weight.shape.inputs;
  Lookup lookup{&weight, ids, count, result, least(count, (values + kGatheredPerTask - 1) / kGatheredPerTask)};
  if (lookup.tasks <= 1) {
    gather_task(&lookup, 0);
    return Outcome::kDone;
  }
  return pool.run(pool, gather_task, static_cast<size_t>(lookup.tasks), &lookup) ? Outcome::kDone : Outcome::kPoolFailed;
}

}  // namespace accel_cpu
