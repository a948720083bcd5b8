from __future__ import annotations

import pytest

from accel.bench.limits import Limits, Work, measure_limits, work_of
from accel.manifest import Manifest, ParameterEntry
from accel.spec import ArchSpec, AttentionSpec, Kind, Task

HIDDEN, VOCABULARY = 8, 100


def manifest_of(kind: Kind, task: Task, shapes: dict[str, tuple[int, ...]], tied: bool, window: int | None = None):  # type: ignore[no-untyped-def]
    layer = AttentionSpec(2, 1, 4, 0.5, window=window, causal=kind == "decoder")
    arch = ArchSpec("llama", "LlamaForCausalLM", kind, task, HIDDEN, VOCABULARY, 64, 0, tied, (layer,))
    parameters = {name: ParameterEntry("fp32.weights", 0, shape, "float32") for name, shape in shapes.items()}
    return Manifest(1, "0", "somewhere", arch, {}, {}, {}, parameters=parameters)


BODY = {"model.layers.0.mlp.weight": (8, 16), "model.norm.weight": (8,)}
TABLE = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}


def test_decoder_reads_its_tied_table_as_the_head_for_one_row() -> None:
    work = work_of(manifest_of("decoder", "text-generation", BODY | TABLE, tied=True), batch=1, tokens=10)
    attention = 4 * 10 * 5.5 * 8  # rows x mean keys x heads x head_dim
    assert work.flops == pytest.approx(2 * 10 * 128 + 2 * 800 + attention)
    assert work.weight_bytes == 4 * (128 + 800)


def test_untied_table_is_looked_up_and_the_head_multiplied() -> None:
    shapes = BODY | TABLE | {"lm_head.weight": (VOCABULARY, HIDDEN)}
    work = work_of(manifest_of("decoder", "text-generation", shapes, tied=False), batch=1, tokens=1)
    assert work.weight_bytes == 4 * (128 + 800)


def test_decoding_reads_the_cache_within_the_window() -> None:
    unlimited = work_of(manifest_of("decoder", "text-generation", BODY, True), 1, 1, past=20)
    windowed = work_of(manifest_of("decoder", "text-generation", BODY, True, window=5), 1, 1, past=20)
    assert unlimited.flops - windowed.flops == pytest.approx(4 * (21 - 5) * 8)
    assert unlimited.weight_bytes == 4 * (128 + 2 * 4 * 20)
    assert windowed.weight_bytes == 4 * (128 + 2 * 4 * 4), "and the token itself"


def test_a_batch_reads_weights_once_and_each_row_its_cache() -> None:
    manifest = manifest_of("decoder", "text-generation", BODY | TABLE, True)
    one, many = (work_of(manifest, rows, 1, past=20) for rows in (1, 8))
    cache = 4 * 2 * 4 * 20
    assert many.flops == 8 * one.flops
    assert one.weight_bytes == 4 * (128 + 800) + cache and many.weight_bytes == 4 * (128 + 800) + 8 * cache
    prompts = [work_of(manifest, rows, 10) for rows in (1, 8)]
    assert prompts[1].flops == 8 * prompts[0].flops and prompts[1].weight_bytes == prompts[0].weight_bytes


def test_encoder_multiplies_every_row_and_no_table() -> None:
    work = work_of(manifest_of("encoder", "feature-extraction", BODY | TABLE, tied=True), batch=3, tokens=5)
    assert work.flops == pytest.approx(2 * 15 * 128 + 4 * 15 * 5 * 8)
    assert work.weight_bytes == 4 * 128


def test_the_slower_of_reading_and_computing_limits() -> None:
    limits = Limits(read_bytes_s=10.0, gemm_flops_s=100.0)
    assert Work(flops=300.0, weight_bytes=10.0).seconds(limits) == 3.0
    assert Work(flops=300.0, weight_bytes=50.0).seconds(limits) == 5.0


def test_limits_of_this_machine_are_plausible() -> None:
    limits = measure_limits(1)
    assert 1e8 < limits.read_bytes_s < 1e12
    assert 1e8 < limits.gemm_flops_s < 1e14
