"""Variants that are dropped: with the files that nothing else reads, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import BundleError, InputError, StorageError
from accel.quality import save_quality
from accel.variant_removal import drop_variant
from accel.variants import add_variant
from tests.test_bundle_extension import content
from tests.test_lost_files import QUALITY, add


@pytest.fixture
def decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder")).resolve()


def but_for_numbers(folder: Path) -> dict[str, bytes]:
    """All files; of the manifest what it was before names went."""
    found = content(folder)
    manifest = json.loads(found["manifest.json"])
    return found | {"manifest.json": json.dumps(manifest | {"freed": 0}).encode()}


def test_what_was_added_goes(decoder: Path) -> None:
    before = but_for_numbers(decoder)
    add_variant(decoder, "w8g32", algorithm="rtn", measure=False)
    assert "w8g32/ort-cpu" in Bundle.open(decoder).manifest.parity
    bundle = accel.drop_variant(decoder, "w8g32")
    assert but_for_numbers(decoder) == before, "to the byte, the manifest too"
    assert list(bundle.manifest.variants) == ["fp32"] and Bundle.open(decoder, verify=True).lost == {}
    with pytest.raises(InputError, match="no variant 'w8g32'.*fp32"):
        drop_variant(decoder, "w8g32")
    assert "w8g32" in add(decoder, ("w8g32", "ort-cpu")).manifest.variants


def test_a_reader_finds_no_other_integers_under_the_old_name(decoder: Path) -> None:
    """Whoever opened the bundle before goes on with the old file, or fails."""
    reader = add(decoder, ("w8g32", "ort-cpu"))
    own = {reader.graph("w8g32", "ort-cpu").file, *reader.weights("w8g32", "ort-cpu")} - {"fp32.weights"}
    seen = set(own)
    for _ in range(3):
        drop_variant(decoder, "w8g32")
        add_variant(decoder, "w8g32", keep={"*.o_proj.weight": 32}, algorithm="rtn", check=False, measure=False)
        now = Bundle.open(decoder)
        files = {now.graph("w8g32", "ort-cpu").file, *now.weights("w8g32", "ort-cpu")} - {"fp32.weights"}
        assert not files & seen
        seen |= files
    assert not any(reader.file(name).exists() for name in own)


def test_figures_of_another_are_not_kept(decoder: Path) -> None:
    reader = add(decoder, ("w8g32", "ort-cpu"), ("w8g32", "cuda"))
    drop_variant(decoder, "w8g32", target="cuda")
    measured = dataclasses.replace(QUALITY, engine="ort-cpu 1.31, cpu, 1 thread")
    save_quality(reader, {"w8g32": measured})  # that graph is the same
    drop_variant(decoder, "w8g32")
    add_variant(decoder, "w8g32", keep={"*.o_proj.weight": 32}, algorithm="rtn", check=False, measure=False)
    for quality in (measured, QUALITY):
        with pytest.raises(BundleError, match="made anew for ort-cpu while it was measured.*Measure it again"):
            save_quality(reader, {"w8g32": quality})
    assert Bundle.open(decoder).variant("w8g32").quality is None


def test_files_that_others_read_stay(decoder: Path) -> None:
    both = add(decoder, ("fp16", "cuda"), ("fp16+kv8", "cuda"), ("w4g32", "ort-cpu"))
    assert both.weights("fp16+kv8", "cuda") == both.weights("fp16", "cuda") == ("fp16.weights",)
    others = {name: data for name, data in content(decoder).items() if name != "manifest.json"}
    bundle = drop_variant(decoder, "fp16")
    after = {name: data for name, data in content(decoder).items() if name != "manifest.json"}
    assert after == {name: data for name, data in others.items() if name != "fp16.cuda.onnx"}
    assert bundle.weights("fp16+kv8", "cuda") == ("fp16.weights",) and list(bundle.manifest.variants)[1:] == [
        "fp16+kv8",
        "w4g32",
    ]
    drop_variant(decoder, "fp16+kv8")
    assert not Bundle.open(decoder, verify=True).has("fp16.weights")
    assert set(Bundle.open(decoder).manifest.files) | {"manifest.json"} == set(content(decoder))


def test_one_graph_of_several(decoder: Path) -> None:
    two = add(decoder, ("fp16", "tensorrt"), ("fp16", "cuda"))
    own = set(two.weights("fp16", "cuda")) - set(two.weights("fp16", "tensorrt"))
    assert own == {"fp16.cuda.weights"}
    bundle = drop_variant(two, "fp16", target="cuda")
    assert list(bundle.variant("fp16").graphs) == ["tensorrt"] and bundle.variant("fp16").weights == ("fp16.weights",)
    gone = {"fp16.cuda.weights", "fp16.cuda.onnx"}
    assert not gone & set(content(decoder)) and Bundle.open(decoder, verify=True).lost == {}
    with pytest.raises(InputError, match="no graph for target 'cuda'.*It has: tensorrt"):
        drop_variant(decoder, "fp16", target="cuda")
    assert list(drop_variant(decoder, "fp16", target="tensorrt").manifest.variants) == ["fp32"]


def test_what_the_export_wrote_stays(decoder: Path) -> None:
    add(decoder, ("fp32", "tensorrt"))
    before = content(decoder)
    for target in (None, "canonical", "ort-cpu"):
        with pytest.raises(InputError, match=r"fp32 is what the export wrote.*added to it: tensorrt"):
            drop_variant(decoder, "fp32", target=target)
    assert content(decoder) == before
    bundle = drop_variant(decoder, "fp32", target="tensorrt")
    assert list(bundle.variant("fp32").graphs) == ["canonical", "ort-cpu"] and bundle.variant("fp32").weights
    with accel.load(decoder, device="cpu") as model:
        assert model.generate("hello", max_new_tokens=2).ids


@pytest.mark.parametrize("lost", ["w8g32.weights", "w8g32.ort-cpu.onnx"])
def test_a_damaged_one(decoder: Path, lost: str) -> None:
    before = but_for_numbers(decoder)
    add(decoder, ("w8g32", "ort-cpu"))
    (decoder / lost).unlink()
    assert drop_variant(decoder, "w8g32").lost == {}
    assert but_for_numbers(decoder) == before and Bundle.open(decoder, verify=True)


def test_two_that_share_a_lost_file_go_one_by_one(decoder: Path) -> None:
    before = but_for_numbers(decoder)
    add(decoder, ("fp16", "cuda"), ("fp16+kv8", "cuda"))
    (decoder / "fp16.weights").unlink()
    assert list(drop_variant(decoder, "fp16").lost) == [("fp16+kv8", "cuda")]
    assert drop_variant(decoder, "fp16+kv8").lost == {} and but_for_numbers(decoder) == before


def test_the_manifest_goes_first(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(decoder, ("w8g32", "ort-cpu"))
    before = content(decoder)

    def broken(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(StorageError):
            drop_variant(decoder, "w8g32")
    assert content(decoder) == before
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", broken)
        bundle = drop_variant(decoder, "w8g32")
    assert list(bundle.manifest.variants) == ["fp32"] and "w8g32.weights" in content(decoder)
    assert list(Bundle.open(decoder, verify=True).manifest.files) == list(bundle.manifest.files)
    assert "w8g32.2.weights" in add(decoder, ("w8g32", "ort-cpu")).manifest.files, "what was left is not in the way"


def test_the_command(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = but_for_numbers(decoder)
    bundle = add(decoder, ("w8g32", "ort-cpu"), ("fp16", "tensorrt"), ("fp16", "cuda"), ("fp32+kv8", "ort-cpu"))
    before, command = content(decoder), ["quantize", str(decoder), "--drop"]
    for arguments, said in (
        (["w8g32", "--drop", "w4g32"], "no variant 'w4g32'"),
        (["fp16", "--target", "ort-cpu"], "no graph for target 'ort-cpu'"),
        (["w8g32", "--text", "x"], "--text is for variants that are added"),
        (["w8g32", "--no-parity"], "--no-parity is for variants that are added"),
        (["w8g32", "--min-cosine", "0"], "--min-cosine is for variants that are added"),
        (["w8g32", "--algorithm", "gptq"], "--algorithm is for variants that are added"),
    ):
        assert main([*command, *arguments]) == 1 and said in capsys.readouterr().err
        assert content(decoder) == before
    with pytest.raises(SystemExit):
        main([*command, "w8g32", "--variant", "w4g32"])
    with pytest.raises(SystemExit):
        main(["quantize", str(decoder)])
    size = bundle.manifest.files["w8g32.weights"].size
    capsys.readouterr()
    assert main([*command, "w8g32", "--drop", "w8g32", "--drop", "kv8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dropped"] == ["w8g32/ort-cpu", "fp32+kv8/ort-cpu"] and found["variants"] == ["fp32", "fp16"]
    assert found["removed"]["w8g32.weights"] == size and set(found["removed"]) == set(before) - set(content(decoder))
    assert main([*command, "fp16", "--target", "cuda", "--target", "tensorrt"]) == 0
    assert "dropped fp16/cuda, fp16/tensorrt" in capsys.readouterr().out
    assert but_for_numbers(decoder) == plain


def test_names_that_are_none(decoder: Path) -> None:
    for name in (None, 5, ["fp32"], "w8g33", "w8g32"):
        with pytest.raises(InputError, match=r"no variant .*It has: fp32$"):
            drop_variant(decoder, name)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"fp32 is what the export wrote.*No variant was added"):
        drop_variant(decoder, "fp32")
    add(decoder, ("w8g32", "ort-cpu"))
    with pytest.raises(InputError, match=r"fp32 is what the export wrote.*can be dropped: w8g32"):
        drop_variant(decoder, "fp32")
    for target in (5, ["ort-cpu"], "cuda"):
        with pytest.raises(InputError, match=r"no graph for target .*It has: ort-cpu"):
            drop_variant(decoder, "w8g32", target=target)  # type: ignore[arg-type]


def test_one_that_another_process_dropped_meanwhile(decoder: Path) -> None:
    first = add(decoder, ("w8g32", "ort-cpu"))
    drop_variant(decoder, "w8g32")
    before = content(decoder)
    with pytest.raises(InputError, match="no variant 'w8g32'"):
        drop_variant(first, "w8g32")
    assert content(decoder) == before


def test_the_manifest_is_on_disk_before_files_go(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash the directory may hold the old manifest, which lists them."""
    add(decoder, ("w8g32", "ort-cpu"))
    done, sync, unlink = [], os.fsync, Path.unlink

    def note_sync(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}") == str(decoder):
            done.append("w8g32" in (decoder / "manifest.json").read_text())
        sync(handle)

    def note_unlink(path: Path, missing_ok: bool = False) -> None:
        done.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "unlink", note_unlink)
    drop_variant(decoder, "w8g32")
    assert done.index(False) < done.index("w8g32.weights")


def test_the_command_says_what_is_gone(
    decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what was lost before nor what cannot be removed."""
    add(decoder, ("w8g32", "ort-cpu"), ("w4g32", "ort-cpu"))
    (decoder / "w8g32.weights").unlink()
    unlink = Path.unlink

    def immutable(path: Path, missing_ok: bool = False) -> None:
        if path.name == "w4g32.weights":
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", immutable)
    command = ["quantize", str(decoder), "--drop"]
    assert main([*command, "w8g32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (list(found["removed"]), found["not_removed"]) == (["w8g32.ort-cpu.onnx"], [])
    assert main([*command, "w4g32"]) == 0
    assert "not removed, though nothing lists them any more: w4g32.weights" in capsys.readouterr().out


def test_what_went_before_a_failure_is_said(
    decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(decoder, ("w8g32", "ort-cpu"), ("w4g32", "ort-cpu"))
    drop = drop_variant

    def once(bundle: Bundle, name: str, target: str | None = None) -> Bundle:
        if name == "w4g32":
            raise StorageError("the disk is gone", where="here", remedy="find it")
        return drop(bundle, name, target=target)

    monkeypatch.setattr(accel, "drop_variant", once)
    assert main(["quantize", str(decoder), "--drop", "w8g32", "--drop", "w4g32"]) == 1
    assert "dropped before this failed: w8g32/ort-cpu" in capsys.readouterr().err


def test_a_bundle_that_is_broken(decoder: Path) -> None:
    add(decoder, ("w8g32", "ort-cpu"))
    (decoder / "fp32.weights").unlink()
    with pytest.raises(BundleError, match=r"missing \(at .*fp32\.weights"):
        drop_variant(decoder, "w8g32")
