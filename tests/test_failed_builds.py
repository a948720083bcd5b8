"""Builds that fail or are stopped: a clear error, and a store that holds and serves what it held before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

import accel
from accel.bundle import Bundle, file_entry
from accel.engine_build import build
from accel.errors import AccelError
from accel.store import EngineStore
from accel.variants import add_variant
from tests.full_disk import file_size_limit

pytest.importorskip("tensorrt_rtx")
ROOT = Path(accel.__file__).parents[1]
GOOD: dict[str, Any] = {"sm": "sm86", "capacity": 64, "max_batch": 2}
ONE = {"min": 1, "opt": 1, "max": 1}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCEL_STORE", "ACCEL_STORE_KEY", "ACCEL_STORE_MAX_BYTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made(made_once: Callable[[str, Callable[[Path], Any]], Path], tiny_decoder_bundle: Path) -> Path:
    """``bundle``, the tiny llama with an fp16 variant, and ``store``, with one engine of it."""

    def make(out: Path) -> None:
        add_variant(shutil.copytree(tiny_decoder_bundle, out / "bundle"), "fp16", check=False)
        build(out / "bundle", "rtx", store=out / "store", **GOOD)

    return made_once("tiny_decoder_and_its_engine", make)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def listing(store: Path) -> dict[str, int]:
    """All files but the locks, which stay."""
    paths = (path for path in store.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(store)): path.stat().st_size for path in paths if path.suffix != ".used"}


def check_as_it_was(folder: Path, before: dict[str, int], bundle: Path) -> None:
    store = EngineStore(folder / "store")
    assert listing(folder / "store") == before
    assert [entry.problem for entry in store.verify()] == [None]
    (report,) = build(bundle, "rtx", store=store, **GOOD)
    assert not report.built  # the engine that was there is served


def asks(**changes: Any) -> Callable[[Path], Any]:
    def attempt(folder: Path) -> Any:
        asked: dict[str, Any] = {"target": "rtx", **GOOD, "sm": "sm89", **changes}
        return build(folder / "bundle", store=folder / "store", **asked)

    return attempt


def foreign(op: str, index: int) -> Callable[[Path], Any]:
    """A graph with an operator of ONNX Runtime's own in place of the ``index``-th Sigmoid."""

    def attempt(folder: Path) -> Any:
        path, manifest = folder / "bundle" / "fp16.tensorrt.onnx", folder / "bundle" / "manifest.json"
        proto = onnx.load(path, load_external_data=False)
        node = [node for node in proto.graph.node if node.op_type == "Sigmoid"][index]
        node.op_type, node.domain = op, "com.microsoft"
        proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        path.write_bytes(proto.SerializeToString())
        data, entry = json.loads(manifest.read_text()), file_entry(path)
        data["files"][path.name] = {"size": entry.size, "sha256": entry.sha256}
        manifest.write_text(json.dumps(data))
        return asks()(folder)

    return attempt


def truncated(name: str) -> Callable[[Path], Any]:
    def attempt(folder: Path) -> Any:
        path = folder / "bundle" / name
        path.write_bytes(path.read_bytes()[:-7])
        return asks()(folder)

    return attempt


def full_disk(folder: Path) -> Any:
    with file_size_limit(100_000):
        return asks()(folder)


def damaged_engine(folder: Path) -> Any:
    """Another engine of the store is cut, and cannot be built again: it is refused, the good one stays."""
    (report,) = asks()(folder)
    store = EngineStore(folder / "store")
    plan = next(path for path in (folder / "store").rglob("*.plan") if path.name.startswith(report.digest))
    plan.write_bytes(plan.read_bytes()[:-7])
    assert [entry.problem is None for entry in store.verify()].count(False) == 1
    try:
        return full_disk(folder)
    finally:
        assert store.remove(report.digest)


RANGES = {"batch": ONE, "sequence": {"min": 9, "opt": 5, "max": 1}}
FAILURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an SM that RTX lacks": (asks(sm="sm90"), "does not support sm90"),
    "min > opt > max": (asks(profiles={"all": RANGES}), "9, 5, 1.*profile all, input input_ids, dimension 1"),
    "beyond the capacity": (
        asks(profiles={"all": {"batch": ONE, "sequence": {"min": 1, "opt": 1, "max": 65}}}),
        "up to 65, the capacity to 64",
    ),
    "no single tokens": (
        asks(profiles={"all": {"batch": ONE, "sequence": {"min": 2, "opt": 2, "max": 2}}}),
        "No profile takes 1 rows of 1 tokens",
    ),
    "no TensorRT": (asks(target="tensorrt"), 'pip install "tensorrt>=10.15.1"'),
    "an operator that TensorRT lacks": (foreign("FastGelu", 1), r"operator FastGelu: .*node Sigmoid_\d+, layer 1"),
    "cut weights": (truncated("fp16.weights"), "fp16.weights"),
    "a cut graph": (truncated("fp16.tensorrt.onnx"), "fp16.tensorrt.onnx"),
    "a full disk": (full_disk, "larger than.*allows"),
    "a damaged engine and a full disk": (damaged_engine, "larger than.*allows"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_store_is_as_it_was(name: str, folder: Path, made: Path) -> None:
    attempt, message = FAILURES[name]
    before = listing(folder / "store")
    with pytest.raises(AccelError, match=message):
        attempt(folder)
    check_as_it_was(folder, before, made / "bundle")


# Stops in the midst of the library's work, whenever that is on this machine.
INTERRUPTED = """
import sys
from accel.builder.progress import BuildMonitor
step = BuildMonitor.step
def say(self, *arguments):
    print("building", flush=True)
    BuildMonitor.step = step
    return step(self, *arguments)
BuildMonitor.step = say
from accel.cli import main
raise SystemExit(main())
"""


@contextmanager
def building(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """``accel build`` for three more SMs, once the first one is being built."""
    arguments = ["build", folder / "bundle", "--target", "rtx", "--sm", "sm89,sm120,sm80", "--store", folder / "store"]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, arguments), "--capacity", "64"]
    (folder / "tmp").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a run in the background ignores it
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    yield process


def left(temporary: Path) -> list[str]:
    """Files in a folder, but the one that ONNX Runtime notes its session in."""
    return [name for name in os.listdir(temporary) if name != ".ses"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c(folder: Path, made: Path, number: int, code: int) -> None:
    before = listing(folder / "store")
    with building(folder) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Interrupted" in errors and "Traceback" not in errors
    assert left(folder / "tmp") == []
    check_as_it_was(folder, before, made / "bundle")


def test_a_killed_build(folder: Path, made: Path) -> None:
    """Its scratch file has no name: the kernel takes it back."""
    before = listing(folder / "store")
    with building(folder) as process:
        process.kill()
        process.communicate()
    assert left(folder / "tmp") == []
    check_as_it_was(folder, before, made / "bundle")
    (report,) = build(Bundle.open(folder / "bundle"), "rtx", store=folder / "store", **{**GOOD, "sm": "sm89"})
    assert report.built
