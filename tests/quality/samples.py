"""Reports made by hand, for what shows them; their figures are made up."""

from __future__ import annotations

import dataclasses

from accel.manifest import (
    EncoderFidelity,
    GreedyAgreement,
    Likelihood,
    PhaseTimings,
    Quality,
    Quantization,
    QuantizedLayer,
    StoredSize,
)
from accel.quality import Report, VariantReport
from accel.spec import ArchSpec, AttentionSpec

DECODER = ArchSpec(
    "llama", "LlamaForCausalLM", "decoder", "text-generation", 576, 49152, 8192, 134_515_008, True,
    tuple(AttentionSpec(9, 3, 64, 0.125, causal=True) for _ in range(30)),
)  # fmt: skip
ENCODER = dataclasses.replace(
    DECODER, family="bert", architecture="BertModel", kind="encoder", task="feature-extraction", parameters=22_713_216
)
ENGINE = "ort-cpu 1.32.0, cpu, 2 threads"
FP32 = StoredSize(540_157_220, 134_515_008)
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


def phases(factor: float) -> tuple[PhaseTimings, ...]:
    return (
        PhaseTimings("prefill of 128 tokens", 0.182 * factor, 0.0005, 0.00006, 5),
        PhaseTimings("decode step", 0.0142 * factor**2, 0.0001, 0.00001, 5),
    )


def quality(size: int, numbers: int, factor: float, difference: float, top1: float, prefix: float) -> Quality:
    likelihood = Likelihood(
        -4.0853 + difference, -4.0853, difference, (difference * 1.2 - 0.0005, difference * 0.8 + 0.0005), 2822, 40
    )
    return Quality(
        ENGINE, ENGINE, "AMD EPYC", "built-in", "d3005fdf57cb" + "0" * 52, StoredSize(size, numbers), FP32, likelihood,
        GreedyAgreement(top1, prefix, 8, 32), None, phases(factor), phases(1),
    )  # fmt: skip


def reference() -> Quality:
    likelihood = Likelihood(-4.0853, -4.0853, 0.0, None, 2822, 40)
    return dataclasses.replace(quality(*dataclasses.astuple(FP32)[:2], 1, 0, 1, 1), likelihood=likelihood, greedy=None)


def record(bits: int, group: int, error: float, kept: tuple[int, ...] = ()) -> Quantization:
    """Errors that differ by layer and kind; the MLP's last product keeps 8 bits in the layers ``kept``."""
    layers = []
    for number in range(30):
        for index, kind in enumerate(KINDS):
            last = index == len(KINDS) - 1
            size = error * (1 + 0.6 * last + 0.03 * ((number * 7 + index * 3) % 10) + 0.5 * (number in (0, 29)))
            own = 8 if last and number in kept else bits
            layers.append(QuantizedLayer(f"model.layers.{number}.{kind}.weight", own, group, size))
    layers.append(QuantizedLayer("model.embed_tokens.weight", 8, group, error / 10))
    return Quantization("w", "gptq", "ab" * 32, 8192, tuple(layers), 538_000_000, 538_000_000 * bits // 32, 4_200_000)


def decoder_report() -> Report:
    int8, int4 = ("int8", ("ort-cpu",)), ("int4", ("ort-cpu",))
    fast = quality(137_000_000, 134_700_000, 0.42, -0.0043, 0.962, 0.81)
    fine = quality(139_000_000, 135_560_000, 0.61, -0.0009, 0.985, 0.93)
    small = quality(82_000_000, 138_700_000, 0.55, -0.0711, 0.893, 0.42)
    cached = quality(82_000_000, 138_700_000, 0.54, -0.0723, 0.891, 0.41)
    reason = "no engine can run this bundle here (ort-cpu: the bundle has no ort-cpu graph)"
    variants = (
        VariantReport("fp32", "float32", ("canonical", "ort-cpu"), reference(), None),
        VariantReport("w8a8-dyn", *int8, fast, None),
        VariantReport("w8g128", *int8, fine, record(8, 128, 0.006)),
        VariantReport("w4g32", *int4, small, record(4, 32, 0.08, kept=(0, 29))),
        VariantReport("w4g32+kv8", *int4, cached, None),
        VariantReport("fp16", "float16", ("cuda",), None, None, missing=reason),
    )
    return Report("/models/smollm2", "models/SmolLM2-135M", "0.1.0", DECODER, variants)


def fidelity(mean: float, least: float, rank: float | None) -> EncoderFidelity:
    return EncoderFidelity("embeddings", 120, 3720, mean, least, rank, 40)


def encoder_report() -> Report:
    calls = (("forward of 1x128", 0.016), ("embedding of 64 texts", 0.1))
    times = tuple(PhaseTimings(name, seconds, 0.0001, 0.00001, 5) for name, seconds in calls)
    size, sha256 = StoredSize(90_200_000, 22_713_216), "d" * 64
    plain = Quality(ENGINE, ENGINE, "AMD EPYC", "built-in", sha256, size, size, timings=times, reference_timings=times)
    sizes = (StoredSize(23_100_000, 22_800_000), StoredSize(14_100_000, 23_400_000))
    int8 = dataclasses.replace(plain, size=sizes[0], encoder=fidelity(0.99871, 0.9962, 0.9991))
    int4 = dataclasses.replace(plain, size=sizes[1], encoder=fidelity(0.98121, 0.9562, 0.9944))
    variants = (
        VariantReport("fp32", "float32", ("ort-cpu",), plain, None),
        VariantReport("w8a8-dyn", "int8", ("ort-cpu",), int8, None),
        VariantReport("w4g32", "int4", ("ort-cpu",), int4, None),
    )
    return Report("/models/minilm", "models/minilm", "0.1.0", ENCODER, variants)
