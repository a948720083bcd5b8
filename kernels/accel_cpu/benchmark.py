"""Measures the operators beside ONNX Runtime's own: time, Gop/s and GB/s of weights, by shape and number of rows.

    python kernels/accel_cpu/benchmark.py --rows 1 128 --shapes 896x1152 --schemes w8 w4g32 fp32
    python kernels/accel_cpu/benchmark.py --attention 8x128x12x32 1x512x12x32

A graph holds as many copies of a product as it takes to leave no weights in the caches between two uses, as in a
model. Times are the median and the best of rounds that run all schemes in turn; rates are those of the median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parents[1]))
import accel_cpu

QWEN = ("896x1152", "896x896", "896x9728", "4864x896", "896x151936")
MINILM = ("384x1152", "384x384", "384x1536", "1536x384")
ROWS = (1, 8, 32, 128, 512, 1024)
COLD_BYTES = 96 << 20  # more than the caches hold
MAX_OUTPUT_BYTES = 256 << 20
MAX_COPIES = 64


@dataclass(frozen=True)
class Scheme:
    """A product of rows with a weight [N, K]; ``build`` gives a node's op, domain, attributes and initializers."""

    name: str
    bits: int
    block: int
    build: Callable[[Scheme, int, int, np.random.Generator], tuple[str, str, dict, dict[str, np.ndarray]]]

    def weight_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of values and scales."""
        scales = 2 * outputs * -(-inputs // self.block) if self.block else 4 * outputs
        return outputs * inputs * self.bits // 8 + scales


def ours(scheme: Scheme, inputs: int, outputs: int, rng: np.random.Generator) -> tuple:
    """QuantizedMatMul of the domain accel.cpu."""
    padded = -(-outputs // 16) * 16
    groups = -(-inputs // scheme.block) if scheme.block else 1
    weight = rng.integers(0, 256, accel_cpu.packed_size(outputs, inputs, scheme.bits), dtype=np.uint8)
    scales = np.full(padded * groups, 0.01, np.float16 if scheme.block else np.float32)
    attributes: dict[str, int | str] = {"N": outputs, "K": inputs, "bits": scheme.bits, "block_size": scheme.block}
    attributes |= {"activation": "", "gated": 0}
    return accel_cpu.MATMUL, accel_cpu.DOMAIN, attributes, {"weight": weight, "scales": scales}


def float_matmul(scheme: Scheme, inputs: int, outputs: int, rng: np.random.Generator) -> tuple:
    """MatMul in float32."""
    return "MatMul", "", {}, {"weight": rng.standard_normal((inputs, outputs), np.float32)}


def dynamic_matmul(scheme: Scheme, inputs: int, outputs: int, rng: np.random.Generator) -> tuple:
    """DynamicQuantizeMatMul: unsigned activations with one scale, weights with one scale per output."""
    weight = rng.integers(-127, 128, (inputs, outputs), dtype=np.int8)
    scales = np.full(outputs, 0.01, np.float32)
    return "DynamicQuantizeMatMul", "com.microsoft", {}, {"weight": weight, "scales": scales}


def blocked_matmul(scheme: Scheme, inputs: int, outputs: int, rng: np.random.Generator) -> tuple:
    """MatMulNBits, activations in int8."""
    groups = -(-inputs // scheme.block)
    weight = rng.integers(0, 256, (outputs, groups, scheme.block * scheme.bits // 8), dtype=np.uint8)
    scales = np.full((outputs, groups), 0.01, np.float32)
    attributes = {"K": inputs, "N": outputs, "bits": scheme.bits, "block_size": scheme.block, "accuracy_level": 4}
    return "MatMulNBits", "com.microsoft", attributes, {"weight": weight, "scales": scales}


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8", 8, 0, ours),
        Scheme("w8g128", 8, 128, ours),
        Scheme("w8g32", 8, 32, ours),
        Scheme("w4g32", 4, 32, ours),
        Scheme("w4g128", 4, 128, ours),
        Scheme("fp32", 32, 0, float_matmul),
        Scheme("ort-w8", 8, 0, dynamic_matmul),
        Scheme("ort-w8g128", 8, 128, blocked_matmul),
        Scheme("ort-w4g32", 4, 32, blocked_matmul),
        Scheme("ort-w4g128", 4, 128, blocked_matmul),
    )
}


def copies(scheme: Scheme, rows: int, inputs: int, outputs: int) -> int:
    """How many copies of a product leave nothing in the caches, and stay within memory."""
    cold = -(-COLD_BYTES // scheme.weight_bytes(inputs, outputs))
    return max(1, min(cold, MAX_OUTPUT_BYTES // (4 * rows * outputs), MAX_COPIES))


def session_of(scheme: Scheme, inputs: int, outputs: int, count: int, threads: int) -> onnxruntime.InferenceSession:
    """A session of ``count`` products, one after another, of the same rows with weights of their own."""
    rng = np.random.default_rng(0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if scheme.build is ours:
        options.register_custom_ops_library(str(accel_cpu.library_path()))
    nodes, initializers, outputs_info = [], [], []
    for index in range(count):
        op, domain, attributes, weights = scheme.build(scheme, inputs, outputs, rng)
        names = [f"{name}_{index}" for name in weights]
        for name, value in zip(names, weights.values()):
            initializers.append(onnx.numpy_helper.from_array(value, name))
        nodes.append(helper.make_node(op, ["x", *names], [f"y_{index}"], domain=domain, **attributes))
        outputs_info.append(helper.make_tensor_value_info(f"y_{index}", TensorProto.FLOAT, ["rows", outputs]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])
    graph = helper.make_graph(nodes, "products", [x], outputs_info, initializers)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=[*opsets, helper.make_opsetid(accel_cpu.DOMAIN, 1)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def runner(scheme: Scheme, rows: int, inputs: int, outputs: int, threads: int) -> Callable[[], float]:
    """A function that runs the products once and returns the seconds of one."""
    count = copies(scheme, rows, inputs, outputs)
    session = session_of(scheme, inputs, outputs, count, threads)
    x = np.random.default_rng(1).standard_normal((rows, inputs), np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    results = [np.zeros((rows, outputs), np.float32) for _ in range(count)]
    for index, result in enumerate(results):
        binding.bind_ortvalue_output(f"y_{index}", onnxruntime.OrtValue.ortvalue_from_numpy(result))

    def run() -> float:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        return (time.perf_counter() - start) / count

    run()
    return run


def measure(
    names: list[str], rows: int, inputs: int, outputs: int, threads: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of one product in every round, by scheme."""
    runs = {name: runner(SCHEMES[name], rows, inputs, outputs, threads) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[names[0]]) < 3:
        for name, run in runs.items():
            times[name].append(run())
    return times


ATTENTIONS = {
    "attention": (accel_cpu.ATTENTION, accel_cpu.DOMAIN, ("num_heads",)),
    "ort": ("Attention", "", ("q_num_heads", "kv_num_heads")),
    "ort-mha": ("MultiHeadAttention", "com.microsoft", ("num_heads",)),
}


def attention_runner(name: str, shape: tuple[int, int, int, int], threads: int) -> Callable[[], float]:
    """A function that runs attention of [batch, length, heads, size] once and returns its seconds."""
    batch, length, heads, size = shape
    op, domain, counts = ATTENTIONS[name]
    attributes: dict[str, int | float] = {"scale": size**-0.5, **dict.fromkeys(counts, heads)}
    values = [helper.make_tensor_value_info(part, TensorProto.FLOAT, None) for part in "qkvy"]
    node = helper.make_node(op, list("qkv"), ["y"], domain=domain, **attributes)
    graph = helper.make_graph([node], "attention", values[:3], values[3:])
    versions = (("", 23), ("com.microsoft", 1), (accel_cpu.DOMAIN, 1))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*one) for one in versions], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(accel_cpu.library_path()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {part: rng.standard_normal((batch, length, heads * size), np.float32) for part in "qkv"}

    def run() -> float:
        start = time.perf_counter()
        session.run(None, feeds)
        return time.perf_counter() - start

    run()
    return run


def print_attention(shape: str, threads: int, seconds: float) -> None:
    """One line per kernel, in rounds that run all in turn."""
    batch, length, heads, size = map(int, shape.split("x"))
    runs = {name: attention_runner(name, (batch, length, heads, size), threads) for name in ATTENTIONS}
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            times[name].append(run())
    for name, rounds in times.items():
        taken = statistics.median(rounds)
        rate = 4 * batch * heads * length**2 * size / taken / 1e9
        print(f"{shape:>16} {name:>10} {taken * 1e3:9.3f} {min(rounds) * 1e3:9.3f} {rate:7.0f}", flush=True)


def main() -> None:
    """Reads the command line and prints one line per shape, rows and scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[*QWEN, *MINILM], help="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--attention", nargs="+", metavar="BxSxHxD", help="attention in place of products")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="per shape and number of rows")
    arguments = parser.parse_args()
    print(f"{accel_cpu.instruction_set()}, {arguments.threads} threads")
    if arguments.attention:
        print(f"{'B x S x H x D':>16} {'kernel':>10} {'ms':>9} {'best':>9} {'Gop/s':>7}")
        for shape in arguments.attention:
            print_attention(shape, arguments.threads, arguments.seconds)
        return
    print(f"{'K x N':>12} {'rows':>5} {'scheme':>11} {'ms':>9} {'best':>9} {'Gop/s':>7} {'GB/s':>6}")
    for shape in arguments.shapes:
        inputs, outputs = map(int, shape.split("x"))
        for rows in arguments.rows:
            if 4 * rows * outputs > MAX_OUTPUT_BYTES:
                continue
            times = measure(arguments.schemes, rows, inputs, outputs, arguments.threads, arguments.seconds)
            for name, rounds in times.items():
                taken = statistics.median(rounds)
                operations, size = 2 * rows * inputs * outputs, SCHEMES[name].weight_bytes(inputs, outputs)
                numbers = f"{taken * 1e3:9.3f} {min(rounds) * 1e3:9.3f} {operations / taken / 1e9:7.0f}"
                print(f"{shape:>12} {rows:5} {name:>11} {numbers} {size / taken / 1e9:6.1f}", flush=True)


if __name__ == "__main__":
    main()
