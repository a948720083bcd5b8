"""``accel bench`` on a GPU: the roofline comes unasked, of a decoder for a batch too. No GPU is needed here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import accel
import accel.bench.contest as contest
from accel.bench import BATCH, bench
from accel.bench import bundle as bundle_bench
from accel.bench import roofline as measuring
from accel.bench.bundle import BenchReport, cases_of
from accel.bench.cases import Case
from accel.bench.limits import Limits
from accel.bench.roofline import GpuLimits, Roofline, Share, measure_roofline
from accel.bundle import Bundle
from accel.cli import build_parser, main
from accel.engines import Engine
from accel.errors import EngineError, InputError
from accel.measurements import recall
from tests.bench.test_contest import FakeWorker, like_ort
from tests.engines.tiny_llama import draw_weights, write_bundle

LIMITS = GpuLimits("Some GPU", "float16", copy_bytes_s=2e12, product_flops_s=500e12)
SIZES: dict[str, Any] = {"rounds": 3, "threads": 1, "prompt_tokens": 8, "new_tokens": 8, "compare": False}
Measure = Callable[..., BenchReport]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[Case], str | None]]:
    """Variant, cases and store of each roofline that is measured; each is one line."""
    calls: list[tuple[str, Sequence[Case], str | None]] = []

    def measure(_: Bundle, variant: str, cases: Sequence[Case], store: str | None = None) -> Roofline:
        calls.append((variant, cases, store))
        return Roofline(variant, LIMITS, (Share("token, batch 1", "", 3, 1.0, 0.5),))

    monkeypatch.setattr(bundle_bench, "measure_roofline", measure)
    return calls


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """``measured(engines, **options)``: what bench reports of engines whose workers answer at once."""
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    bundle = write_bundle(tmp_path / "bundle", draw_weights())

    def run(engines: Sequence[Engine], **options: Any) -> BenchReport:
        FakeWorker.speed = {f"{engine.name} fp32": 5.0 - number for number, engine in enumerate(engines)}
        FakeWorker.failing, FakeWorker.alive, FakeWorker.groups = {}, [], 0
        monkeypatch.setattr(contest, "WorkerProcess", FakeWorker)
        monkeypatch.setattr(contest, "ENGINES", tuple(engines))
        monkeypatch.setattr(contest, "has_nvidia_device", lambda: engines[0].device == "cuda")
        monkeypatch.setattr(bundle_bench, "measure_limits", lambda threads: Limits(28e9, 215e9))
        return bench(bundle.path, **{**SIZES, **options})

    return run


GPU = (like_ort("cuda", device="cuda"), like_ort("ort-cuda", device="cuda"))


def test_the_roofline_is_there_where_the_cuda_engine_ran(measured: Measure, asked: list[Any], tmp_path: Path) -> None:
    report = measured(GPU, store=tmp_path / "store")
    ((variant, (case,), store),) = asked
    assert (variant, case.batch, store) == ("fp32", BATCH, str(tmp_path / "store")), "of cuda, though ort-cuda won"
    assert report.chosen == "ort-cuda fp32" and "50%" in str(report) and "Some GPU" in str(report)
    assert report.limits is None and report.to_json()["roofline"]["shares"][0]["ms"] == 1.0
    measured(GPU, batch=1, limits=True)
    assert asked[-1][1][0].batch == 1


def test_it_can_be_left_out(measured: Measure, asked: list[Any]) -> None:
    report = measured(GPU, limits=False)
    assert asked == [] and report.roofline is None and "roofline" not in str(report)


def test_what_did_not_run_has_none(measured: Measure, asked: list[Any]) -> None:
    assert measured(GPU[1:]).roofline is None and asked == []
    report = measured([like_ort("ort-cpu")])
    assert asked == [] and report.limits is None, "on the CPU the limits are for those who ask"
    assert measured([like_ort("ort-cpu")], limits=True).limits is not None


@pytest.mark.parametrize("error", [EngineError("it broke", where="cuda"), RuntimeError("CUDA out of memory\nand more")])
def test_one_that_fails_costs_no_figures(
    measured: Measure, error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> Roofline:
        raise error

    monkeypatch.setattr(bundle_bench, "measure_roofline", fail)
    report = measured(GPU)
    assert report.remembered and recall(Bundle.open(tmp_path / "bundle"), "cuda", 1) is not None
    assert report.roofline is None and f"No roofline of cuda: {str(error).splitlines()[0]}\n" in str(report)
    assert report.to_json()["no_roofline"]


def test_the_command_has_both(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = build_parser().parse_args
    given = [parse(["bench", "b", *options]).limits for options in ([], ["--limits"], ["--no-limits"])]
    assert given == [None, True, False] and parse(["bench", "b"]).batch == BATCH
    passed: dict[str, Any] = {}
    monkeypatch.setattr("accel.bench.bench", lambda path, **options: passed.update(options) or "the report")
    assert main(["bench", "b", "--no-limits", "--batch", "32"]) == 0
    assert (passed["limits"], passed["batch"]) == (False, 32)


def test_a_batch_of_none_is_refused(tiny_decoder_bundle: Path) -> None:
    with pytest.raises(InputError, match="batch must be at least 1"):
        cases_of(Bundle.open(tiny_decoder_bundle).manifest.arch, (), 8, 8, 0)


@pytest.fixture(scope="module")
def with_graph(tiny_decoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With a graph of the cuda engine."""
    pytest.importorskip("triton", reason="Triton has no build for this system")
    folder = tmp_path_factory.mktemp("roofline") / "bundle"
    shutil.copytree(tiny_decoder_bundle, folder)
    return accel.add_variant(folder, "fp16", target="cuda", check=False, show_progress=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes on masked lanes
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_decoders_roofline_covers_its_batch(
    with_graph: Bundle, batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from accel.engines.cuda.device import INTERPRETED

    if not INTERPRETED:
        pytest.skip("there is a GPU: scripts/benchmark_cuda.py runs it")
    monkeypatch.setattr("accel.engines.cuda.registry.probe", lambda bundle, variant: None)
    monkeypatch.setattr(measuring, "measure_gpu_limits", lambda variant: LIMITS)
    case = Case("4+4 tokens", "decoder", batch=batch, prompt=4, new=4)
    found = measure_roofline(with_graph, "fp16", (case,), str(tmp_path))
    phases = {share.phase: share for share in found.shares if not share.operator}
    more = ["prompt 3x4", "token, batch 3"] if batch == 3 else []
    assert list(phases) == ["prompt 1x4", "token, batch 1", *more]
    if batch != 3:
        return
    size = {(share.phase, share.operator): share.limit_ms for share in found.shares}
    head = next(name for _, name in size if name.startswith("Linear") and name.endswith(f" {_vocabulary(with_graph)}"))
    one, three = size["token, batch 1", head], size["token, batch 3", head]
    assert one < three < 1.5 * one, "its weights are read once"
    attention = [size[f"token, batch {rows}", "CachedAttention"] for rows in (1, 3)]
    assert attention[1] == pytest.approx(3 * attention[0]), "each row reads its own cache"


def _vocabulary(bundle: Bundle) -> int:
    return bundle.manifest.arch.vocab_size
