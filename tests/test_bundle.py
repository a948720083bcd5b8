from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel.bundle import Bundle, BundleWriter
from accel.errors import BundleError, StorageError
from accel.manifest import GraphEntry, Manifest, ParameterEntry, Variant
from accel.spec import ArchSpec, AttentionSpec, TensorSpec

ARCH = ArchSpec(
    family="bert",
    architecture="BertModel",
    kind="encoder",
    task="feature-extraction",
    hidden_size=8,
    vocab_size=16,
    max_positions=32,
    parameters=4,
    tied_embeddings=False,
    layers=(AttentionSpec(2, 2, 4, 0.5),),
)
GRAPH = GraphEntry("g.onnx", 20, (TensorSpec("input_ids", "int64", ("batch", "seq")),), (), ("attn.0",))


def manifest(source: str = "test") -> Manifest:
    return Manifest(
        schema_version=1,
        accel_version="0",
        source=source,
        arch=ARCH,
        variants={"fp32": Variant("float32", ("fp32.weights",), {"ort-cpu": GRAPH})},
        files={},
        versions={"torch": "2"},
        parameters={"w": ParameterEntry("fp32.weights", 0, (2, 2), "float32")},
    )


def write_files(folder: Path, weight: bytes = b"\1" * 16) -> None:
    (folder / "g.onnx").write_bytes(b"graph")
    (folder / "fp32.weights").write_bytes(weight)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


def write(out: Path, overwrite: bool = False, source: str = "test") -> Bundle:
    with BundleWriter(out, overwrite) as writer:
        write_files(writer.path)
        return writer.commit(manifest(source))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write(tmp_path / "out").path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))


def test_round_trip(tmp_path: Path) -> None:
    written = write(tmp_path / "a" / "out")
    opened = Bundle.open(str(tmp_path / "a" / "out"), verify=True)
    assert opened.manifest == written.manifest
    assert opened.manifest.files["fp32.weights"].size == 16
    assert set(opened.manifest.files) == {"g.onnx", "fp32.weights", "1_Pooling/config.json"}
    assert opened.file("g.onnx").read_bytes() == b"graph"
    assert opened.read_json("1_Pooling/config.json") == {"pooling_mode_mean_tokens": True}
    assert opened.graph("fp32", "ort-cpu") == GRAPH
    assert opened.has("g.onnx") and not opened.has("manifest.json") and not opened.has("nothing")
    assert os.listdir(tmp_path / "a") == ["out"]


def test_names_that_are_not_there(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"no file 'g\.onx'.*Did you mean 'g\.onnx'"):
        opened.file("g.onx")
    with pytest.raises(BundleError, match=r"no variant 'int8'.*It has: fp32"):
        opened.graph("int8", "ort-cpu")
    with pytest.raises(BundleError, match=r"target 'cuda'.*It has: ort-cpu"):
        opened.graph("fp32", "cuda")
    with pytest.raises(BundleError, match="not valid JSON"):
        opened.read_json("g.onnx")


# Reading: each corruption is one BundleError with a remedy


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle directory"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(BundleError, match="no manifest.json.*exported first"):
        Bundle.open(tmp_path)


def test_missing_truncated_and_overlong_file(bundle: Path) -> None:
    weights = bundle / "fp32.weights"
    weights.write_bytes(b"\1" * 15)
    with pytest.raises(BundleError, match="truncated: 15 bytes instead of 16.*Export the model again"):
        Bundle.open(bundle)
    weights.write_bytes(b"\1" * 17)
    with pytest.raises(BundleError, match="longer than it was: 17 bytes"):
        Bundle.open(bundle)
    weights.unlink()
    with pytest.raises(BundleError, match=r"missing \(at .*fp32\.weights"):
        Bundle.open(bundle)
    weights.mkdir()
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(bundle)


def test_flipped_bit_is_found_on_request(bundle: Path) -> None:
    (bundle / "fp32.weights").write_bytes(b"\1" * 15 + b"\2")
    Bundle.open(bundle)
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle, verify=True)


@pytest.mark.parametrize(
    "junk",
    [b"", b"\x80\x04junk", b"{", b"[]", b"null", b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"schema_version": NaN}'],
)
def test_junk_manifest(bundle: Path, junk: bytes) -> None:
    (bundle / "manifest.json").write_bytes(junk)
    with pytest.raises(BundleError) as info:
        Bundle.open(bundle)
    assert info.value.remedy and "manifest.json" in str(info.value.where)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_unknown_schema_version(bundle: Path, version: object) -> None:
    def change(data: dict[str, Any]) -> None:
        data["schema_version"] = version
        data["a_key_of_that_schema"] = 1

    edit(bundle, change)
    with pytest.raises(BundleError, match="schema version") as info:
        Bundle.open(bundle)
    assert ("pip install -U accelrt" in str(info.value)) == (version == 2)


def test_unknown_manifest_key(bundle: Path) -> None:
    edit(bundle, lambda data: data.update(sourec="x"))
    with pytest.raises(BundleError, match="Did you mean 'source'"):
        Bundle.open(bundle)


UNSAFE = ["/etc/hostname", "../secret", "a/../../secret", "..", "", ".", "a\\b", "C:/x", "./g.onnx", "a//b", "a\0b"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_path(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_bytes(b"s")
    edit(bundle, lambda data: data["files"].update({name: {"size": 1, "sha256": ""}}))
    with pytest.raises(BundleError, match="unsafe path"):
        Bundle.open(bundle)


def test_links(bundle: Path, tmp_path: Path) -> None:
    graph = bundle / "g.onnx"
    graph.rename(bundle / "inner")
    graph.symlink_to("inner")
    assert Bundle.open(bundle, verify=True).file("g.onnx").read_bytes() == b"graph"  # a link that stays inside
    outside = tmp_path / "outside"
    outside.write_bytes(b"graph")
    graph.unlink()
    graph.symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(bundle)
    graph.unlink()
    graph.symlink_to("g.onnx")
    with pytest.raises(BundleError):
        Bundle.open(bundle)


def test_linked_directory_and_manifest(bundle: Path, tmp_path: Path) -> None:
    (bundle / "1_Pooling").rename(tmp_path / "pool")
    (bundle / "1_Pooling").symlink_to(tmp_path / "pool")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(bundle)
    (bundle / "manifest.json").rename(tmp_path / "m.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "m.json")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(bundle)


def test_link_swapped_in_after_opening(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    (tmp_path / "outside").write_bytes(b"graph")
    (bundle / "g.onnx").unlink()
    (bundle / "g.onnx").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="leads out"):
        opened.file("g.onnx")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["variants"]["fp32"].update(weights=["other"]),
        lambda d: d["variants"]["fp32"]["graphs"]["ort-cpu"].update(file="../g.onnx"),
        lambda d: d["parameters"]["w"].update(file="other"),
        lambda d: d["parameters"]["w"].update(offset=1),
        lambda d: d["parameters"]["w"].update(offset=-4),
        lambda d: d["parameters"]["w"].update(shape=[-2, -2]),
        lambda d: d["parameters"]["w"].update(shape=[2, 3]),
        lambda d: d["parameters"]["w"].update(dtype="object"),
        lambda d: d["tied"].update(v="other"),
        lambda d: d["files"]["g.onnx"].update(size="5"),
        lambda d: d["arch"].update(kind="diffusion"),
        lambda d: d.pop("arch"),
    ],
)
def test_inconsistent_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError) as info:
        Bundle.open(bundle)
    assert info.value.remedy


# Writing: nothing half made is left, and nothing that was there is lost


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_exception_removes_the_sibling(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), BundleWriter(tmp_path / "out") as writer:
        write_files(writer.path)
        raise error
    assert os.listdir(tmp_path) == []


def test_leaving_without_commit_writes_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        write_files(writer.path)
    assert os.listdir(tmp_path) == []


def test_manifest_that_names_an_unwritten_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="uses 'fp32.weights'"), BundleWriter(tmp_path / "out") as writer:
        (writer.path / "g.onnx").write_bytes(b"")
        writer.commit(manifest())
    assert os.listdir(tmp_path) == []


def test_disk_full(tmp_path: Path) -> None:
    """A file-size limit fails a write half way, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        allowed = pytest.raises(StorageError, match="larger than.*allows.*nothing was left")
        with allowed, BundleWriter(tmp_path / "out") as writer:
            write_files(writer.path, b"\1" * (2 << 20))
            writer.commit(manifest())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(28, "No space left on device"), "The disk is full"),
        (OSError("4096 requested and 1024 written"), "The disk is full"),
        (OSError(122, "Quota exceeded"), "quota"),
        (OSError(30, "Read-only file system"), "read-only"),
    ],
)
def test_write_errors_are_said_in_words(tmp_path: Path, error: OSError, what: str) -> None:
    with pytest.raises(StorageError, match=what) as info, BundleWriter(tmp_path / "out"):
        raise error
    assert info.value.__cause__ is error and info.value.remedy
    assert os.listdir(tmp_path) == []


def test_errors_about_other_files_pass_through(tmp_path: Path) -> None:
    error = PermissionError(13, "Permission denied", "/elsewhere/model.safetensors")
    with pytest.raises(PermissionError) as info, BundleWriter(tmp_path / "out"):
        raise error
    assert info.value is error


def test_disk_full_in_commit_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", source="old")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accel.storage._fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        write(tmp_path / "out", overwrite=True, source="new")
    assert Bundle.open(tmp_path / "out", verify=True).manifest.source == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:  # root ignores modes; /proc refuses everyone
        parent = Path("/proc/self")
    else:
        parent = tmp_path / "locked"
        parent.mkdir(mode=0o500)
    with pytest.raises(StorageError) as info, BundleWriter(parent / "out"):
        pass
    assert info.value.remedy
    with pytest.raises(StorageError), BundleWriter("/dev/null/out"):
        pass


def test_overwrite_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "out", source="old")
    with pytest.raises(StorageError, match="overwrite=True"):
        write(tmp_path / "out", source="new")
    assert Bundle.open(tmp_path / "out").manifest.source == "old"
    write(tmp_path / "out", overwrite=True, source="new")
    assert Bundle.open(tmp_path / "out", verify=True).manifest.source == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_never_replaces_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")  # an empty directory may be filled
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(StorageError, match="never deleted"):
        write(other, overwrite=True)
    with pytest.raises(StorageError, match="is a file"):
        write(other / "thesis.txt", overwrite=True)
    assert (other / "thesis.txt").read_text() == "precious"


def test_target_that_appears_while_writing(tmp_path: Path) -> None:
    with pytest.raises(StorageError), BundleWriter(tmp_path / "out") as writer:
        write_files(writer.path)
        write(tmp_path / "out", source="other")
        writer.commit(manifest())
    assert Bundle.open(tmp_path / "out").manifest.source == "other"
    assert os.listdir(tmp_path) == ["out"]


def test_overwriting_leaves_no_moment_without_a_bundle(tmp_path: Path) -> None:
    write(tmp_path / "out")
    stop, misses = threading.Event(), list[int]()

    def read() -> None:
        while not stop.is_set():
            if not (tmp_path / "out" / "manifest.json").is_file():
                misses.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(30):
        write(tmp_path / "out", overwrite=True, source=str(i))
    stop.set()
    reader.join()
    assert not misses
    assert Bundle.open(tmp_path / "out", verify=True).manifest.source == "29"


def test_link_as_output_replaces_its_target(tmp_path: Path) -> None:
    write(tmp_path / "real", source="old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", overwrite=True, source="new")
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(tmp_path / "real").manifest.source == "new"


KILLED = """
import os, signal, sys
from accel.bundle import BundleWriter
with BundleWriter(sys.argv[1]) as writer:
    (writer.path / "fp32.weights").write_bytes(b"half")
    print(writer.path, flush=True)
    {end}
"""


def start(out: Path, end: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED.format(end=end), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_killed_writer_leaves_a_sibling_that_the_next_removes(tmp_path: Path) -> None:
    process = start(tmp_path / "o[u]t", "os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (stale,) = os.listdir(tmp_path)
    assert stale.startswith(".o[u]t.tmp-")
    write(tmp_path / "o[u]t")
    assert os.listdir(tmp_path) == ["o[u]t"]


def test_ctrl_c_in_another_process_and_live_siblings(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "signal.pause()")
    assert process.stdout is not None
    sibling = Path(process.stdout.readline().strip())
    with BundleWriter(tmp_path / "out") as writer:  # a second writer leaves the living one's sibling alone
        assert writer.path != sibling and sibling.is_dir()
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert os.listdir(tmp_path) == []
