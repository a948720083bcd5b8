"""The kernels' benchmark: a row for each kernel, what the rows compute, the command, and its numbers' arithmetic."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.kernels.comparing import Maker

torch = pytest.importorskip("torch")
import accel_kernels  # noqa: E402
from accel_kernels import launches  # noqa: E402
from accel_kernels.benchmark import commands, measure, report, timing  # noqa: E402
from accel_kernels.benchmark.__main__ import main  # noqa: E402
from accel_kernels.benchmark.agreement import PEER, agreements, error_of  # noqa: E402
from accel_kernels.benchmark.measure import Measured  # noqa: E402
from accel_kernels.benchmark.problem import Operands, Problem, Row, names_of  # noqa: E402
from accel_kernels.benchmark.rows import rows_of  # noqa: E402
from accel_kernels.benchmark.shapes import FULL, TINY  # noqa: E402
from accel_kernels.benchmark.timing import MOST_RUNS, Limits, Times  # noqa: E402
from accel_kernels.device import INTERPRETED  # noqa: E402
from accel_kernels.narrow_cache import FLOAT8_SM  # noqa: E402
from accel_kernels.ops import OPS  # noqa: E402

FOLDER = Path(accel_kernels.__file__).parent
ROWS = rows_of(TINY)
LIMITS = Limits(copy_bytes_s=1e12, product_flops_s=1e14, l2_bytes=50)


def launchers() -> set[str]:
    """Files that hold a function of their name: one per kernel."""
    found = set()
    for path in FOLDER.glob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found |= {path.stem} & {node.name for node in body if isinstance(node, ast.FunctionDef)}
    return found


def test_every_kernel_has_a_row() -> None:
    wanted = {op.name for op in OPS} | launchers()
    assert {"norm", "advance"} <= wanted
    assert wanted == set(names_of(rows_of(FULL))) == set(names_of(ROWS))


def test_rows_are_told_apart() -> None:
    for rows in (rows_of(FULL), ROWS):
        assert len({(row.kernel, row.shape, row.dtype) for row in rows}) == len(rows)
        assert all(row.peer for row in rows)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kernel} {row.shape} {row.dtype}")
def test_a_row_and_its_peer_compute_what_the_reference_does(row: Row, device: Any) -> None:
    why = commands.why_not(row, device)
    if why is not None:
        pytest.skip(why)
    found = list(agreements(row, device))
    assert len(found) >= 2 and found[-1].way == PEER
    assert [one for one in found if not one.holds] == []


NARROW = [
    (kernel, dtype) for kernel in ("rotary_append", "decode_attention", "varlen_attention") for dtype in ("int8", "fp8")
]


def test_caches_in_8_bits_have_rows() -> None:
    """8-bit floats where a GPU converts them; int8 everywhere."""
    for rows in (rows_of(FULL), ROWS):
        assert sorted({(row.kernel, row.dtype) for row in rows if row.dtype in ("int8", "fp8")}) == sorted(NARROW)
        assert {row.dtype for row in rows if row.needs == FLOAT8_SM} == {"fp8"}
        needs = {"fp8": FLOAT8_SM, "wide_gemm": (9, 0)}
        assert all(row.needs == needs.get(row.dtype, needs.get(row.kernel, (0, 0))) for row in rows)


@pytest.mark.parametrize(("kernel", "dtype"), NARROW)
def test_the_bytes_of_caches_in_8_bits(kernel: str, dtype: str) -> None:
    """By hand: queries and results in fp16, keys and values in a byte each, scales in four."""
    row = next(row for row in ROWS if (row.kernel, row.dtype) == (kernel, dtype))
    heads, kv_heads, dim, scales = 4, 2, 32, 2 * 2 * 32 * 4
    expected = {
        "rotary_append": 36 * dim * (2 * heads * 2 + 2 * kv_heads * (2 + 1)) + 2 * 4 * 36 + 2 * 4 * 18 * 16 + scales,
        "decode_attention": 3 * dim * (2 * (heads + 2 * kv_heads) + 2 * heads + 21 * 2 * kv_heads) + 4 * 3,
        "varlen_attention": 70 * dim * (2 * heads + 2 * heads + 2 * kv_heads) + scales,
    }
    assert row.prepare(Operands(torch.device("cpu"))).bytes == expected[kernel]


def test_rows_that_the_gpu_has_no_instructions_for_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [row for row in ROWS if (row.kernel, row.dtype) in (("rotary_append", "int8"), ("rotary_append", "fp8"))]
    ran: list[Row] = []
    monkeypatch.setattr(commands, "capability", lambda _: (8, 6))
    monkeypatch.setattr(commands, "agreements", lambda row, _: ran.append(row) or [])
    assert commands.compare_rows(both) == 0 and [row.dtype for row in ran] == ["int8"]
    told = f"rotary_append {both[1].shape} fp8 left out: it needs sm89, this is sm86"
    assert capsys.readouterr().out.split() == told.split()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(commands, "measure_limits", lambda _: LIMITS)
    monkeypatch.setattr(report, "environment", lambda *_: {"gpu": "A GPU"})
    monkeypatch.setattr(report, "head", lambda _: "")
    monkeypatch.setattr(commands, "measure", lambda rows, *_: ran.extend(rows) or [])
    assert commands.measure_rows(both, tmp_path / "kernels.json") == 0 and [row.dtype for row in ran] == ["int8"] * 2
    (left_out,) = json.loads((tmp_path / "kernels.json").read_text())["left_out"]
    assert left_out["dtype"] == "fp8" and left_out["why"] == "it needs sm89, this is sm86"


def test_work_is_that_of_the_shapes() -> None:
    """By hand: of fp16 weights [256, 128] a float32 row, its norm and fp16 outputs; of causal attention half."""
    problems = {(row.kernel, row.shape): row.prepare(Operands(torch.device("cpu"))) for row in ROWS}
    gemv = problems["gemv", "1 row, qkv 128 to 256, norm"]
    assert gemv.bytes == 2 * 256 * 128 + 4 * 128 + 4 * 128 + 2 * 256
    assert gemv.flops == 2 * 256 * 128
    attention = problems["varlen_attention", "2 x 18 tokens, causal, 4 heads on 2 of 32"]
    assert attention.flops == 4 * 2 * (18 * 19 // 2) * 4 * 32
    assert attention.bytes == 2 * 2 * 18 * 32 * (4 + 4 + 2 + 2)
    decode = problems["decode_attention", "1 x 1 token, 600 in the cache, 4 heads on 2 of 32"]
    assert decode.flops == 4 * 601 * 4 * 32
    assert decode.bytes == 2 * 601 * 2 * 32 * 2 + 2 * 8 * 32 + 2 * 4 * 32 + 4


def test_cold_operands_have_copies_that_overflow_the_l2() -> None:
    device = torch.device("cpu")
    made = Operands(device, spread=1000, most=4)
    assert len(made.copies(lambda _: 0, 600)) == 2
    assert len(made.copies(lambda _: 0, 10)) == 4
    several = made.copies(lambda index: index, 300)
    assert [several(index) for index in range(6)] == [0, 1, 2, 3, 0, 1]
    assert len(Operands(device).copies(lambda _: 0, 600)) == 1
    assert LIMITS.spread > LIMITS.l2_bytes


def test_parts_of_a_few_rows_are_cut_as_the_engine_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx_ir")
    from accel.engines.cuda import products
    from accel.engines.cuda.program import Matrix

    taken = []
    monkeypatch.setattr(products, "narrow_gemm", lambda *_, tile, **__: taken.append(tile))
    for layer in (FULL.decoder.qkv, FULL.decoder.attention_output, FULL.decoder.down):
        matrix = Matrix(torch.empty(layer.outputs, layer.inputs, dtype=torch.float16, device="meta"))
        x = torch.empty(8, layer.inputs, dtype=torch.float16, device="meta")
        products.Products(torch.float16, True).parts(x, matrix)
        assert taken.pop() == launches.narrow_split_tile(layer, 8)


def problem(size: int = 0, flops: int = 0) -> Problem:
    return Problem({}, lambda _: torch.zeros(1), lambda: torch.zeros(1), size, flops)


def test_the_roofline_is_the_slower_of_both() -> None:
    assert LIMITS.seconds(problem(10**9, 10**11)) == pytest.approx(1e-3) == LIMITS.seconds(problem(0, 10**11))
    assert LIMITS.seconds(problem(2 * 10**9, 10**11)) == pytest.approx(2e-3)
    assert LIMITS.is_memory_bound(problem(2 * 10**9, 10**11)) and not LIMITS.is_memory_bound(problem(1, 10**11))
    assert LIMITS.runs(problem(1)) == MOST_RUNS
    assert LIMITS.runs(problem(10**8)) == 10
    assert LIMITS.runs(problem(10**12)) == 4


def test_what_stands_before_the_runs_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    replays = iter([[9e-6, 10e-6, 12e-6], [310e-6, 110e-6, 210e-6]])
    monkeypatch.setattr(timing, "_event_seconds", lambda *_: next(replays))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    seen: list[int] = []
    found = timing.Timer(torch.device("cpu"), 64).time(seen.append, 10)  # type: ignore[arg-type]
    assert seen == [0, *range(10)]
    assert found.microseconds == {"median": 20.0, "least": 10.0, "most": 30.0}


def measured(launch_times: dict[str, Times], peer: Times | None, failed: dict[str, str]) -> Measured:
    return Measured(ROWS[0], 100, 200, 1e-6, True, launch_times, peer, failed)


def test_the_fastest_launch_counts_and_the_others_are_told() -> None:
    found = measured(
        {"slow": Times(4e-6, 3e-6, 5e-6), "fast": Times(2e-6, 1e-6, 6e-6)}, Times(3e-6, 3e-6, 3e-6), {"wide": "no room"}
    )
    told = found.as_json()
    assert told["microseconds"] == {"median": 2.0, "least": 1.0, "most": 6.0} and told["launch"] == "fast"
    assert told["launches"] == {"slow": 4.0, "fast": 2.0} and told["failed"] == {"wide": "no room"}
    assert told["roofline_percent"] == 50.0 and told["pytorch_ratio"] == 1.5
    line = report.line(found)
    assert "2.00" in line and "50 %" in line and "1.50" in line and "failed: wide: no room" in line
    nothing = measured({}, None, {"fast": "no room"})
    assert nothing.as_json()["microseconds"] is None and "none" in report.line(nothing)


def test_a_missing_or_wrong_result_is_an_error() -> None:
    right = Maker(torch.device("cpu")).normal(3, 4)
    assert error_of((right, right), (right, right)) == 0.0
    assert error_of(torch.stack([right / 2, right / 2]), right) == 0.0
    assert error_of(torch.full_like(right, float("nan")), right) == float("inf")
    assert error_of(right[:2], right) == float("inf")
    assert error_of((right, right + 1), (right, right)) > 0.1


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_a_tie_in_8_bits_is_no_error_but_many_are(kind: Any) -> None:
    """One that became the next number counts as one of many; more than a step as what it is."""
    right = torch.full((10, 10), 96.0, dtype=torch.float64)
    right[0, 0] = 104.0 if kind == torch.float8_e4m3fn else 97.0
    whole, tied, moved, wrong = (right.to(kind) for _ in range(4))
    tied[5, 5] = right[0, 0]
    moved[:] = tied[5, 5]
    wrong[5, 5] = 13.0
    assert [error_of(one, right) for one in (whole, tied)] == [0.0, 0.01]
    assert error_of(moved, right) > 0.9 and error_of(wrong, right) > 0.6


def test_wrong_rows_fail_the_comparison(device: Any, capsys: pytest.CaptureFixture[str]) -> None:
    good = next(row for row in ROWS if row.kernel == "activation")

    def wrong(operands: Operands) -> Problem:
        made = good.prepare(operands)
        return Problem({"half": lambda i: next(iter(made.ways.values()))(i) / 2}, made.peer, made.reference, made.bytes)

    row = Row("activation", good.shape, "fp16", "", "gelu", wrong)
    assert commands.compare_rows([good]) == 0
    assert commands.compare_rows([row]) == 1
    assert "WRONG" in capsys.readouterr().out


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accel_kernels.benchmark", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "norm", "gemv"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed} == {"norm", "gemv"}
    for wrong, why in (
        (["--only", "nonsense"], "no kernel nonsense"),
        (["--json", str(tmp_path / "missing" / "x.json")], "no folder"),
        (["--tiny", "--json", str(tmp_path / "x.json")], "takes"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert why in capsys.readouterr().err


def test_a_reader_of_the_list_may_go_away() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "accel_kernels.benchmark", "--list"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_command_needs_a_gpu() -> None:
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "there is no GPU" in done.stderr and "Traceback" not in done.stderr
    tiny = run("--tiny", "--only", "norm", CUDA_VISIBLE_DEVICES="")
    assert tiny.returncode == 0 and "WRONG" not in tiny.stdout and "RMS" in tiny.stdout


def test_nothing_of_it_is_imported_with_the_kernels() -> None:
    code = "import sys; from accel_kernels.ops import OPS; [op.module for op in OPS]; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    modules = done.stdout.split()
    assert "accel_kernels.norm" in modules and not [name for name in modules if "accel_kernels.benchmark" in name]


@pytest.mark.gpu
def test_rows_are_measured_and_written(tmp_path: Path) -> None:
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    path = tmp_path / "kernels.json"
    assert main(["--only", "norm", "argmax", "advance", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["gpu"] and found["driver"] and found["limits"]["copy_bytes_s"] > 1e9
    assert {row["kernel"] for row in found["rows"]} == {"norm", "argmax", "advance"}
    for row in found["rows"]:
        assert 0 < row["microseconds"]["least"] <= row["microseconds"]["median"] <= row["microseconds"]["most"]
        assert row["pytorch"]["microseconds"]["median"] > 0 and not row["failed"]


def test_what_fails_is_told_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that cannot run, one that is wrong, and a PyTorch that cannot run; the others are timed.

    So is what failed once, beside others.
    """
    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    class Fake:
        def __init__(self, *_: Any) -> None: ...

        def time(self, run: Any, runs: int) -> Times:
            run(runs - 1)
            return Times(1e-6, 1e-6, 1e-6)

    def broken(_: int) -> Any:
        raise RuntimeError("out of shared memory\nand more")

    def row(peer: Any, **ways: Any) -> Row:
        return Row("norm", "x", "fp16", "", "ops", lambda _: Problem(ways, peer, lambda: torch.ones(2), 8))

    monkeypatch.setattr(measure, "Timer", Fake)
    right, wrong = (lambda _: torch.ones(2)), (lambda _: torch.zeros(2))
    tries = []

    def late(index: int) -> Any:
        tries.append(index)
        return broken(index) if len(tries) == 1 else right(index)

    told: list[Measured] = []
    rows = [row(right, good=right, broken=broken, wrong=wrong, late=late), row(broken, good=right)]
    found = measure.measure(rows, device, LIMITS, told.append)
    assert found == told and [list(one.launches) for one in found] == [["good", "late"], ["good"]]
    assert found[0].failed["broken"] == "RuntimeError: out of shared memory" and "wrong" in found[0].failed
    assert found[0].peer is not None
    assert found[1].peer is None and PEER in found[1].failed
