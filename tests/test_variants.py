"""Precisions added to a bundle: all of it or nothing, checked against fp32, the same bytes each time."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import accel
from accel import variants
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import AccelError, BundleError, ExportError, InputError, ParityError, StorageError
from accel.variants import LIMITS, add_variant
from tests.full_disk import file_size_limit
from tests.parity.families import build_model
from tests.test_bundle_extension import content

ROOT = Path(__file__).parents[1]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
KILLS, MOMENTS = 40, 12


@pytest.fixture
def decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder"))


@pytest.fixture
def windowed(made_once: Callable[[str, Callable[[Path], Any]], Path], tmp_path: Path) -> Path:
    """A bundle with a sliding window of 6 in every layer."""
    made = made_once("family_mistral", lambda out: accel.export(build_model("mistral"), out, show_progress=False))
    return Path(shutil.copytree(made, tmp_path / "windowed"))


def is_complete(folder: Path, variant: str) -> bool:
    bundle = Bundle.open(folder, verify=True)
    return variant in bundle.manifest.variants and "tensorrt" in bundle.manifest.variants[variant].graphs


def locations(bundle: Bundle, variant: str) -> set[str]:
    """The weight files that the variant's graph reads."""
    model = onnx.load(bundle.file(bundle.graph(variant, "tensorrt").file), load_external_data=False)
    stored = [tensor for tensor in model.graph.initializer if tensor.data_location == tensor.EXTERNAL]
    return {entry.value for tensor in stored for entry in tensor.external_data if entry.key == "location"}


@pytest.mark.parametrize("variant", LIMITS)
def test_a_precision_is_added(decoder: Path, variant: str) -> None:
    before = content(decoder)
    bundle = add_variant(decoder, variant)
    after = content(decoder)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"manifest.json"} and set(before) <= set(after)
    manifest = Bundle.open(decoder, verify=True).manifest
    assert manifest == bundle.manifest and set(manifest.files) == set(after) - {"manifest.json"}
    assert manifest.variants[variant].dtype == DTYPES[variant]
    entry, parity = bundle.graph(variant, "tensorrt"), manifest.parity[f"{variant}/tensorrt"]
    assert entry.file == f"{variant}.tensorrt.onnx" and entry.opset == 24
    assert entry.attention_nodes == ("layers.0.attention", "layers.1.attention")
    caches = {spec.dtype for spec in entry.inputs if spec.name.startswith("past.")}
    assert caches == {DTYPES[variant]} and "precision" in [item.name for item in entry.passes]
    assert parity.reference == "ort-cpu fp32" and 0 < parity.max_rel_error < parity.limit == LIMITS[variant]


@pytest.mark.parametrize("variant", LIMITS)
def test_a_variant_names_all_its_weight_files(decoder: Path, variant: str) -> None:
    """An engine's key covers the files that the variant names: a graph that read others would be served stale."""
    bundle = add_variant(decoder, variant, check=False)
    assert locations(bundle, variant) <= set(bundle.variant(variant).weights)
    if variant != "fp32":
        assert bundle.variant(variant).weights == (f"{variant}.weights",)
    assert bundle.graph("fp32", "ort-cpu")  # fp32 keeps its own


def test_an_encoder(minilm_bundle: Path, tmp_path: Path) -> None:
    bundle = add_variant(shutil.copytree(minilm_bundle, tmp_path / "minilm"), "fp16")
    assert bundle.manifest.parity["fp16/tensorrt"].max_rel_error < 5e-3
    assert {spec.dtype for spec in bundle.graph("fp16", "tensorrt").outputs} == {"float32"}
    assert locations(bundle, "fp16") == {"fp16.weights"}
    halved = bundle.file("fp16.weights").stat().st_size / bundle.file("fp32.weights").stat().st_size
    assert 0.49 < halved < 0.51


def test_twice_changes_nothing(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_variant(decoder, "fp16", check=False)
    stamps = {path: path.stat().st_mtime_ns for path in decoder.iterdir()}
    monkeypatch.setattr(variants, "BundleExtension", None)  # it is not even locked
    assert "fp16" in add_variant(Bundle.open(decoder), "fp16").manifest.variants
    assert {path: path.stat().st_mtime_ns for path in decoder.iterdir()} == stamps


def test_two_copies_get_the_same_bytes(decoder: Path, tmp_path: Path) -> None:
    shutil.copytree(decoder, tmp_path / "deeper" / "copy")
    copies = [add_variant(path, "bf16") for path in (decoder, tmp_path / "deeper" / "copy")]
    first, second = (content(bundle.path) for bundle in copies)
    assert first == second


def test_ort_runs_fp32_and_inspect_shows_all(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with accel.load(decoder, engine="ort-cpu") as model:
        expected = model.generate("hello", max_new_tokens=8, do_sample=False).ids
    for variant in LIMITS:
        add_variant(decoder, variant, check=False)
    with accel.load(decoder, engine="ort-cpu") as model:
        assert model.engine.variant == "fp32"
        assert model.generate("hello", max_new_tokens=8, do_sample=False).ids == expected
    with pytest.raises(accel.errors.EngineUnavailableError, match="no ort-cpu graph for variant 'fp16'"):
        accel.load(decoder, engine="ort-cpu", variant="fp16")
    assert main(["inspect", str(decoder), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "fp16 (float16)" in text and "bf16 (bfloat16)" in text
    assert main(["inspect", str(decoder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["warnings"] == []
    assert main(["inspect", str(decoder), "--html", str(decoder.parent / "page.html")]) == 0
    assert "fp16" in (decoder.parent / "page.html").read_text()


def drop_the_window(bundle: Path) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    assert {layer["window"] for layer in data["arch"]["layers"]} == {6}
    for layer in data["arch"]["layers"]:
        layer["window"] = None
    path.write_text(json.dumps(data))


def drop_rotations(bundle: Path) -> None:
    path = bundle / "canonical.onnx"
    model = onnx.load(path, load_external_data=False)
    rotations = [node for node in model.graph.node if node.op_type == "RotaryEmbedding"]
    for node in rotations:
        for reader in model.graph.node:
            reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
    assert rotations
    path.write_bytes(model.SerializeToString())
    describe_again(bundle, "canonical.onnx")


def describe_again(bundle: Path, name: str) -> None:
    """The manifest takes a changed file for the right one."""
    from accel.bundle import file_entry

    data = json.loads((bundle / "manifest.json").read_text())
    entry = file_entry(bundle / name)
    data["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    (bundle / "manifest.json").write_text(json.dumps(data))


def enlarge_a_weight(bundle: Path) -> None:
    entry = json.loads((bundle / "manifest.json").read_text())["parameters"]["model.layers.1.mlp.up_proj.weight"]
    with (bundle / "fp32.weights").open("r+b") as stream:
        stream.seek(entry["offset"])
        stream.write(np.float32(7e4).tobytes())
    describe_again(bundle, "fp32.weights")


@pytest.mark.parametrize("variant", ["fp16", "fp32"])
@pytest.mark.parametrize("spoil", [drop_the_window, drop_rotations])
def test_a_wrong_graph_is_not_added(windowed: Path, variant: str, spoil: Callable[[Path], None]) -> None:
    spoil(windowed)
    before = content(windowed)
    with pytest.raises(ParityError, match=f"The {variant} graph differs from the fp32 engine by .*the graph is wrong"):
        add_variant(windowed, variant)
    assert content(windowed) == before and not list(windowed.glob(".*"))


def test_the_model_unspoiled_is_added(windowed: Path) -> None:
    assert is_complete(add_variant(windowed, "fp16").path, "fp16")


def test_a_weight_beyond_fp16(windowed: Path) -> None:
    enlarge_a_weight(windowed)
    before = content(windowed)
    with pytest.raises(ExportError, match=r"largest value 70000 is beyond float16 .*up_proj.*Use bf16"):
        add_variant(windowed, "fp16")
    assert content(windowed) == before and not list(windowed.glob(".*"))
    assert is_complete(add_variant(windowed, "bf16", check=False).path, "bf16")


def test_unknown_variants_and_bundles(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown variant 'fp61'.*fp16"):
        add_variant(decoder, "fp61")
    with pytest.raises(BundleError, match="no bundle directory"):
        add_variant(tmp_path / "absent", "fp16")


def test_weights_with_hard_links(decoder: Path) -> None:
    os.link(decoder / "fp32.weights", decoder.parent / "elsewhere")
    before = content(decoder)
    with pytest.raises(BundleError, match="weights cannot be read: .*hard links.*cp -r"):
        add_variant(decoder, "fp16", check=False)
    assert content(decoder) == before and not list(decoder.glob(".*"))
    (decoder.parent / "elsewhere").unlink()
    assert is_complete(add_variant(decoder, "fp16", check=False).path, "fp16")


def test_a_full_disk(decoder: Path) -> None:
    before = content(decoder)
    with file_size_limit(1 << 16), pytest.raises(StorageError, match="larger than.*allows"):
        add_variant(decoder, "fp16", check=False)
    assert content(decoder) == before and not list(decoder.glob(".*"))
    assert is_complete(add_variant(decoder, "fp16").path, "fp16")


def test_a_read_only_bundle(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(decoder)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    if os.geteuid() == 0:  # root ignores modes
        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        decoder.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="(read-only|no permission).*Copy the bundle to a path (on|that)"):
            add_variant(decoder, "fp16")
    finally:
        decoder.chmod(0o700)
    assert content(decoder) == before


ADD = """
import sys
from accel import variant_addition, variants
made, real = [], variant_addition.Addition.make
def make(self, check):
    made.append(1)
    return real(self, check)
variant_addition.Addition.make = make
print("ready", flush=True)
sys.stdin.readline()
bundle = variants.add_variant(sys.argv[1], sys.argv[2])
assert sys.argv[2] in bundle.manifest.variants
print("added" if made else "found", flush=True)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("asked", [("fp16", "fp16"), ("fp16", "bf16")], ids=["the same", "two"])
def test_two_processes_at_once(decoder: Path, asked: tuple[str, str]) -> None:
    processes = [start(ADD, decoder, variant) for variant in asked]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    said = sorted(process.communicate("\n")[0].strip() for process in processes)
    assert said == (["added", "found"] if len(set(asked)) == 1 else ["added", "added"])
    assert all(is_complete(decoder, variant) for variant in asked) and not list(decoder.glob(".*"))


# Forked children, so that the imports are paid once: each dies at the n-th of the calls that change the disk.
DIE = """
import os, shutil, signal, sys
from pathlib import Path
from accel.graph import external, save
from accel.graph.lowering import tensorrt
from accel.exporter import progress
from accel.variants import add_variant
def deadly(name, left):
    real = getattr(os, name)
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, call)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
for number in range(1, kills + 1):
    copy = shutil.copytree(folder, folder.parent / f"kill{number}")
    child = os.fork()
    if child == 0:
        left = [number]
        for name in ("fsync", "replace", "open", "mkdir", "unlink"):
            deadly(name, left)
        add_variant(copy, "fp16", check=False)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("killed" if code == -signal.SIGKILL else "done" if code == 0 else "failed", flush=True)
    if code != -signal.SIGKILL:
        break
"""


def check_after_kill(folder: Path, before: dict[str, bytes]) -> bool:
    """Whether the variant is there. Either way the bundle is whole, and the next run succeeds and clears away."""
    added = is_complete(folder, "fp16")
    old = content(folder)
    assert all(old[name] == data for name, data in before.items() if name != "manifest.json")
    assert is_complete(add_variant(folder, "fp16", check=False).path, "fp16")
    with accel.load(folder, engine="ort-cpu") as model:
        assert model.engine.variant == "fp32"
    return added


def test_killed_at_every_change_of_the_disk(decoder: Path) -> None:
    before = content(decoder)
    process = start(DIE, decoder, KILLS)
    said = process.communicate()[0].split()
    assert set(said[:-1]) == {"killed"} and said[-1] == "done" and len(said) > 8
    folders = [decoder.parent / f"kill{number}" for number in range(1, len(said) + 1)]
    added = [check_after_kill(folder, before) for folder in folders]
    assert added == sorted(added) and not added[0] and added[-1]
    leftovers = [path for folder in folders for path in folder.glob(".*")]
    # A run that died after the manifest was replaced leaves its empty directory: nothing is left to be done for it.
    assert all(not any(path.iterdir()) for path in leftovers)


ADD_AT_ONCE = ADD.replace("variants.add_variant(sys.argv[1], sys.argv[2])",
                          "variants.add_variant(sys.argv[1], sys.argv[2], check=False)")  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_moments(decoder: Path) -> None:
    before, rng = content(decoder), random.Random(0)
    seconds, killed = 0.5, 0
    for number in range(MOMENTS + 1):
        copy = Path(shutil.copytree(decoder, decoder.parent / f"copy{number}"))
        process = start(ADD_AT_ONCE, copy, "fp16")
        assert process.stdout is not None and process.stdin is not None and process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.stdin.write("\n")
        process.stdin.flush()
        if number == 0:  # how long it takes when nobody kills it
            assert process.communicate()[0] == "added\n"
            seconds = time.monotonic() - began
            continue
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        check_after_kill(copy, before)
    assert killed >= MOMENTS // 2


def test_rounding_that_costs_too_much(windowed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that is told is that of the case, and a limit below the rounding's own refuses it."""
    monkeypatch.setitem(LIMITS, "fp16", 1e-6)
    with pytest.raises(ParityError, match=r"differs from the fp32 engine by \d.\d\de-0\d .*limit 1.0e-06") as caught:
        add_variant(windowed, "fp16")
    assert isinstance(caught.value.__cause__, AccelError)
    assert str(caught.value.where).startswith(f"{windowed}: ") and "step 0" in str(caught.value.where)
    remedy, _, command = str(caught.value.remedy).partition(": accel ")
    assert remedy.startswith("Take fp32, or bf16 (rounds more, limit 0.1); or")
    assert main(command.split()) == 0 and is_complete(windowed, "fp16")
    monkeypatch.setitem(LIMITS, "bf16", 1e-6)
    with pytest.raises(ParityError, match="Take fp32; or.*--variant bf16 --no-parity"):
        add_variant(windowed, "bf16")


def test_values_that_overflow(windowed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel.graph.evaluation.torch_graph import TorchGraph

    run = TorchGraph.run

    def overflow(self: Any, feeds: Any) -> Any:
        outputs = run(self, feeds)
        return {name: value * np.inf if name == "logits" else value for name, value in outputs.items()}

    monkeypatch.setattr(TorchGraph, "run", overflow)
    with pytest.raises(ParityError, match="fp16 graph gives NaN or infinity where the fp32 .*: take bf16"):
        add_variant(windowed, "fp16")
    assert "fp16" not in Bundle.open(windowed).manifest.variants


def test_the_added_graph_computes_what_fp32_does(decoder: Path) -> None:
    """The file that was written, read again: not what the check had in memory."""
    from accel.engines.session import StepInputs
    from accel.graph.evaluation.sessions import PaddedDecoder, onnxruntime_run

    bundle = add_variant(decoder, "fp32", check=False)
    arch = bundle.manifest.arch
    run = onnxruntime_run(bundle.file(bundle.graph("fp32", "tensorrt").file), threads=1)
    session = PaddedDecoder(run, arch, 1, 32, ir.DataType.FLOAT)
    ids = np.arange(12)
    step = StepInputs(ids, ids, np.array([12], np.int32), np.array([0], np.int32), ids)
    with accel.load(decoder, engine="ort-cpu", capacity=32, max_batch=1) as model:
        expected = model._session.step(step).copy()
    np.testing.assert_allclose(session.step(step), expected, rtol=1e-4, atol=1e-4)
