"""``accel build``, ``accel cache`` and ``accel quantize``: output, JSON, exit codes, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from accel.bundle import Bundle
from accel.cli import main
from accel.store import EngineStore
from tests.store.samples import key

Output = pytest.CaptureFixture[str]
PLAN = b"p" * 100_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCEL_STORE", "ACCEL_STORE_KEY", "ACCEL_STORE_MAX_BYTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "bundle"))


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    """Three engines, the first the least recently used."""
    opened = EngineStore(tmp_path / "store")
    for capacity in (128, 256, 512):
        opened.put(key(capacity=capacity), PLAN, {})
    return opened


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def answer(capsys: Output, *arguments: object, code: int = 0) -> Any:
    """What a command prints with --json: one object, and nothing else."""
    capsys.readouterr()
    assert run(*arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


def test_quantize(bundle: Path, capsys: Output) -> None:
    assert run("quantize", bundle, "--variant", "fp16") == 0
    text = capsys.readouterr().out
    assert "fp32, fp16;" in text and "MB added" in text and "fp16/tensorrt: error" in text and "limit 2e-02" in text
    report = answer(capsys, "quantize", bundle, "--variant", "bf16", "--variant", "fp16", "--no-parity")
    assert report["variants"] == ["fp32", "fp16", "bf16"]
    assert set(report["added"]) == {
        *("bf16.weights", "bf16.cuda.weights"),
        *("bf16.tensorrt.onnx", "bf16.cuda.onnx", "bf16.ort-cuda.onnx"),
    }
    assert report["added"]["bf16.weights"] == (bundle / "bf16.weights").stat().st_size
    assert set(report["parity"]) == {"fp16/tensorrt", "fp16/cuda", "fp16/ort-cuda"}  # bf16 was not compared
    again = answer(capsys, "quantize", bundle, "--variant", "fp16")
    assert again["added"] == {} and again["parity"]["fp16/tensorrt"]["max_rel_error"] > 0


def test_quantize_says_what_is_wrong(bundle: Path, tmp_path: Path, capsys: Output) -> None:
    error = answer(capsys, "quantize", bundle, "--variant", "int3", code=1)["error"]
    assert error["type"] == "InputError" and "unknown variant 'int3'" in error["what"]
    assert run("quantize", tmp_path / "absent", "--variant", "fp16") == 1
    assert "no bundle directory" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("quantize", bundle)


def test_build_and_cache(bundle: Path, tmp_path: Path, capsys: Output) -> None:
    """The whole way: build, hit, list, verify, remove."""
    pytest.importorskip("tensorrt_rtx")
    place, source = ("--store", tmp_path / "store"), Bundle.open(bundle).manifest.source
    asked = ("build", bundle, "--target", "rtx", "--sm", "sm86", "--capacity", 64, "--max-batch", 2, *place)
    assert run(*asked, "--proof", "--workspace", "256MiB") == 0
    text = capsys.readouterr().out
    assert "sm86 fp16: " in text and "built in" in text and "2 fused attention layers, 4 cache updates" in text
    assert "2 rows of 64 positions" in text and "memory while building" in text and "checks of the network" in text
    assert "  layers: " in text and " matrix_multiply, " in text and ", 4 kv_cache_update" in text
    assert "latency: not measured (no GPU sm86 here)" in text or "latency: prefill " in text
    assert len(text.splitlines()) > 20  # the table
    assert run(*asked, "--workspace", 256 << 20) == 0
    text = capsys.readouterr().out
    assert "from the store" in text and "memory while building" not in text and len(text.splitlines()) < 7
    assert "latency: not measured (the store had it)" in text
    report = answer(capsys, *asked, "--sm", "sm86", "sm120")
    assert [engine["sm"] for engine in report["engines"]] == [["sm86"], ["sm120"]]
    assert all(engine["built"] for engine in report["engines"]) and report["seconds"] > 0
    listed = answer(capsys, "cache", "ls", *place)["engines"]
    assert len(listed) == 3 and {entry["problem"] for entry in listed} == {None}
    assert {(entry["model"], entry["max_batch"], entry["capacity"]) for entry in listed} == {(source, 2, 64)}
    assert listed[0]["profiles"]["decode"] == {"batch": [1, 2, 2], "sequence": [1, 1, 1]}
    assert run("cache", "ls", *place) == 0
    assert "  bundle rtx " in (text := capsys.readouterr().out) and ", 2 rows, capacity 64, decode 1-2 x 1" in text
    assert listed[0]["key"]["workspace_bytes"] == 256 << 20
    assert run("cache", "verify", *place) == 0
    digests = [entry["digest"] for entry in listed]
    assert answer(capsys, "cache", "rm", digests[0][:12], digests[1], *place) == {"removed": digests[:2]}
    assert answer(capsys, "cache", "prune", "--max-bytes", 0, *place)["removed"] == digests[2:]
    assert answer(capsys, "cache", "ls", *place) == {"store": str(tmp_path / "store"), "bytes": 0, "engines": []}


def test_build_from_a_file_of_profiles(bundle: Path, tmp_path: Path, capsys: Output) -> None:
    pytest.importorskip("tensorrt_rtx")
    file, rows = tmp_path / "profiles.yaml", "{min: 1, opt: 1, max: 1}"
    asked = ("build", bundle, "--target", "rtx", "--sm", "sm89", "--capacity", 64, "--profiles", file)
    file.write_text(f"both: {{batch: {rows}, sequence: {{min: 1, opt: 16, max: 32}}}}\n")
    (engine,) = answer(capsys, *asked)["engines"]
    assert engine["facts"]["profile_order"] == ["both"] and engine["max_batch"] == 1
    for content, what in (
        (b"- a list\n", "The profiles file is not a mapping"),
        (b"a: {b: [\n", "The profiles file is not YAML"),
        (b"caf\xe9: 1\n", "The profiles file is not YAML"),
        (b"both: 3\nboth: 4\n", "'both' stands twice"),
        (b"", "There is no profile"),
        (b"both: 3\n", "both"),
        (b"{}\n", "There is no profile"),
        (f"both: {{batch: {rows}, sequence: {{min: 9, opt: 5, max: 1}}}}\n".encode(), "9, 5, 1"),
        (f"both: {{batch: {rows}, width: {rows}}}\n".encode(), "width"),
    ):
        file.write_bytes(content)
        error = answer(capsys, *asked, code=1)["error"]
        assert what in error["what"] + str(error["where"]), error
        assert error["type"] in ("RecipeError", "InputError")
    file.unlink()
    assert "No such file" in answer(capsys, *asked, code=1)["error"]["what"]


def test_build_says_what_is_wrong(bundle: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("accel.engine_request.current_sm", lambda: None)
    for arguments, what in (
        (("--target", "rtx"), "There is no GPU here to build for"),
        (("--target", "rtx", "--sm", "sm86", "--workspace", "much"), "'much' is no size"),
        (("--target", "rtx", "--sm", "sm86", "--capacity", 0), "capacity"),
        (("--target", "rtx", "--sm", "sm86", "--optimization-level", 7), "no optimization level 7"),
        (("--target", "rtx", "--sm", "sm86", "--hardware-compatibility", "same"), "no hardware compatibility levels"),
        (("--target", "rtx", "--sm", "sm86,sm75", "--precision", "bf16"), "sm75 does not compute in bf16"),
        (("--target", "rtx", "--sm", "sm86", "--capacity", 1024), "1024 is more than the model's 512 positions"),
    ):
        error = answer(capsys, "build", bundle, *arguments, code=1)["error"]
        assert what in error["what"] and error["type"] == "InputError"
    assert list(Bundle.open(bundle).manifest.variants) == ["fp32"]  # nothing was added for requests that are wrong
    for arguments in (("--target", "trt"), ("--sm",), ("--capacity", "many"), ("--hardware-compatibility", "all")):
        with pytest.raises(SystemExit, match="2"):
            run("build", bundle, *arguments)


@pytest.mark.parametrize("target", ["cuda", "ort-cuda"])
def test_engines_that_need_no_build(bundle: Path, capsys: Output, target: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("build", bundle, "--target", target)
    printed = capsys.readouterr().err
    assert f"the engine {target} needs no build: accel quantize BUNDLE --variant fp16 --target {target} " in printed
    assert "accel warmup" in printed and "invalid choice" not in printed


def test_without_tensorrt_the_pip_command_is_printed(bundle: Path, capsys: Output) -> None:
    """The package is really absent where the tests run."""
    with pytest.raises(ImportError):
        __import__("tensorrt")
    assert run("build", bundle, "--sm", "sm86") == 1
    printed = capsys.readouterr()
    assert 'pip install "tensorrt>=10.15.1"' in printed.err and printed.out == "" and "Traceback" not in printed.err
    assert ("--target rtx" in printed.err) is (find_spec("tensorrt_rtx") is not None)
    assert answer(capsys, "build", bundle, "--sm", "sm86", code=1)["error"]["type"] == "DependencyError"


def test_cache_ls(store: EngineStore, capsys: Output) -> None:
    store.put(key(capacity=1024), PLAN, {"model": "smollm2", "max_batch": 8})
    assert run("cache", "ls", "--store", store.url) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1] == f"4 engines, 0.4 MB; store {store.url}"
    sizes = "decode, prefill 1-4 x 1-128"
    assert all(f"  rtx 1.7.1.116 sm86+sm89 fp16, capacity {n}, {sizes}" in s for n, s in zip((128, 256, 512), lines))
    assert lines[3].endswith(f"  smollm2 rtx 1.7.1.116 sm86+sm89 fp16, 8 rows, capacity 1024, {sizes}")
    report = answer(capsys, "cache", "ls", "--store", store.url)
    assert report["store"] == store.url and report["bytes"] == sum(entry.bytes for entry in store.entries())
    store.put(key(capacity=2048), PLAN, {"model": "model", "bundle": "qwen"})
    assert run("cache", "ls", "--store", store.url) == 0 and "  qwen rtx " in capsys.readouterr().out
    *listed, named = report["engines"]
    assert (named["model"], named["max_batch"], named["capacity"]) == ("smollm2", 8, 1024)
    assert named["profiles"] == {"prefill": {"batch": [1, 1, 4], "sequence": [1, 64, 128]}, "decode": {}}
    assert listed[0]["model"] is None
    assert [entry["key"]["capacity"] for entry in listed] == [128, 256, 512]
    assert [entry["digest"] for entry in listed] == [key(capacity=n).digest for n in (128, 256, 512)]


def test_cache_of_a_store_that_is_not_there(tmp_path: Path, capsys: Output) -> None:
    place = ("--store", tmp_path / "absent")
    assert run("cache", "ls", *place) == 0 and "0 engines" in capsys.readouterr().out
    assert run("cache", "verify", *place) == 0
    assert run("cache", "prune", "--max-bytes", "1G", *place) == 0
    assert answer(capsys, "cache", "rm", "ab", *place, code=1)["error"]["what"] == "The store has no engine 'ab'"
    assert not (tmp_path / "absent").exists()


def test_cache_takes_the_store_from_the_environment(
    store: EngineStore, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCEL_STORE", store.url)
    assert len(answer(capsys, "cache", "ls")["engines"]) == 3


def test_cache_verify_says_that_all_is_good(store: EngineStore, capsys: Output) -> None:
    assert run("cache", "verify", "--store", store.url) == 0
    assert capsys.readouterr().out == f"3 engines, 0.3 MB, all good; store {store.url}\n"
    report = answer(capsys, "cache", "verify", "--store", store.url)
    assert report["ok"] and len(report["engines"]) == 3 and report["store"] == store.url


def test_cache_verify_finds_a_damaged_engine(store: EngineStore, capsys: Output) -> None:
    (plan,) = Path(store.url).rglob(f"{key(capacity=256).digest}*.plan")
    plan.write_bytes(b"q" + PLAN[1:])
    assert run("cache", "verify", "--store", store.url) == 1
    bad, total = capsys.readouterr().out.splitlines()
    assert bad.startswith(key(capacity=256).digest[:16]) and "altered" in bad.lower()
    assert total == f"3 engines, 0.3 MB, 1 bad; store {store.url}"
    report = answer(capsys, "cache", "verify", "--store", store.url, code=1)
    entries = report["engines"]
    assert not report["ok"]
    assert [entry["key"]["capacity"] for entry in entries if entry["problem"]] == [256] and len(entries) == 3
    plan.with_name(f"{key(capacity=128).digest}.json").write_bytes(b"{")
    listed = answer(capsys, "cache", "ls", "--store", store.url)["engines"]
    assert sorted(entry["key"] is None for entry in listed) == [False, False, True]
    assert run("cache", "ls", "--store", store.url) == 0
    assert run("cache", "rm", key(capacity=128).digest, "--store", store.url) == 0  # damaged ones go too


def test_cache_prune_keeps_the_latest(store: EngineStore, capsys: Output) -> None:
    place = ("--store", store.url)
    assert run("cache", "prune", "--max-bytes", "1GB", *place) == 0
    assert "0 engines removed" in capsys.readouterr().out
    report = answer(capsys, "cache", "prune", "--max-bytes", "250k", *place)
    assert report["removed"] == [key(capacity=128).digest] and report["bytes"] >= len(PLAN)
    for size in ("-1", "much", "nan", "1e400", "", "G"):
        error = answer(capsys, "cache", "prune", f"--max-bytes={size}", *place, code=1)["error"]
        assert error["what"] == f"{size!r} is no size"
    assert len(store.entries()) == 2


def test_cache_rm_removes_all_or_none(store: EngineStore, capsys: Output) -> None:
    place, digests = ("--store", store.url), [key(capacity=n).digest for n in (128, 256, 512)]
    for asked, what in ((("zz",), "has no engine 'zz'"), (("",), "has no engine ''")):
        error = answer(capsys, "cache", "rm", digests[0], *asked, *place, code=1)["error"]
        assert what in error["what"] and "accel cache ls" in error["remedy"]
    assert len(store.entries()) == 3
    engine = store.get(key(capacity=128))
    assert engine is not None
    with engine:
        error = answer(capsys, "cache", "rm", digests[0], *place, code=1)["error"]
        assert error["what"] == "The engine is in use"
    assert run("cache", "rm", digests[0][:20], digests[0], *place) == 0
    assert capsys.readouterr().out == "1 engines removed\n"
    assert [entry.digest for entry in store.entries()] == digests[1:]


def test_several_engines_with_one_beginning(store: EngineStore, capsys: Output) -> None:
    for number in range(20):  # sixteen digits: two share one
        store.put(key(capacity=1000 + number), PLAN, {})
    first = [entry.digest[0] for entry in store.entries()]
    twice = next(digit for digit in first if first.count(digit) > 1)
    error = answer(capsys, "cache", "rm", twice, "--store", store.url, code=1)["error"]
    assert error["what"] == f"{first.count(twice)} engines begin with {twice!r}"


def test_as_a_module(store: EngineStore) -> None:
    command = [sys.executable, "-m", "accel", "cache", "verify", "--json", "--store", store.url]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert len(json.loads(done.stdout)["engines"]) == 3 and done.stderr == ""
