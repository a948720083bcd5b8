"""Adding files to a bundle: what stands there is never touched, and nothing half made is seen."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path

import pytest

from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.errors import BundleError, StorageError
from accel.manifest import Manifest, Variant
from tests.bundle_samples import write
from tests.full_disk import file_size_limit


def with_variant(manifest: Manifest, name: str) -> Manifest:
    variant = Variant("float16", (f"{name}.weights",), {})
    return dataclasses.replace(manifest, variants={**manifest.variants, name: variant})


def extend(bundle: Bundle, name: str, data: bytes = b"\2" * 8) -> Bundle:
    with BundleExtension(bundle) as extension:
        (extension.path / f"{name}.weights").write_bytes(data)
        return extension.commit(with_variant(extension.bundle.manifest, name))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path / "bundle")


def test_adds_files_and_leaves_the_others(bundle: Bundle) -> None:
    before = content(bundle.path)
    extended = extend(bundle, "fp16")
    assert extended.file("fp16.weights").read_bytes() == b"\2" * 8
    assert list(extended.manifest.files) == sorted([*bundle.manifest.files, "fp16.weights"])
    after = content(bundle.path)
    assert set(after) - set(before) == {"fp16.weights"}
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    Bundle.open(bundle.path, verify=True)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_nothing(bundle: Bundle, error: BaseException) -> None:
    before = content(bundle.path)
    with pytest.raises(type(error)), BundleExtension(bundle) as extension:
        (extension.path / "fp16.weights").write_bytes(b"half")
        raise error
    assert content(bundle.path) == before and not list(bundle.path.glob(".*"))


def test_leaving_without_commit_adds_nothing(bundle: Bundle) -> None:
    before = content(bundle.path)
    with BundleExtension(bundle) as extension:
        (extension.path / "fp16.weights").write_bytes(b"half")
    assert content(bundle.path) == before and not list(bundle.path.glob(".*"))


def test_a_file_that_stands_there_is_not_replaced(bundle: Bundle) -> None:
    before = content(bundle.path)
    with pytest.raises(StorageError, match="has a file 'fp32.weights' already"):
        extend(bundle, "fp32")
    assert content(bundle.path) == before


def replace(bundle: Bundle, old: str, new: str) -> Bundle:
    """A variant takes the place of another, whose weights go."""
    with BundleExtension(bundle) as extension:
        (extension.path / f"{new}.weights").write_bytes(b"\3" * 8)
        manifest = extension.bundle.manifest
        left = {name: variant for name, variant in manifest.variants.items() if name != old}
        changed = with_variant(dataclasses.replace(manifest, variants=left), new)
        return extension.commit(changed, [f"{old}.weights"])


def test_outdated_files_go_once_the_manifest_stands(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    extended = extend(bundle, "fp16")
    before, real = content(bundle.path), os.replace

    def fail(source: Path, target: Path) -> None:
        if target.name == "manifest.json":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(StorageError, match="disk reported an error"):
            replace(extended, "fp16", "bf16")
    assert content(bundle.path) == before
    replaced = replace(extended, "fp16", "bf16")
    assert set(content(bundle.path)) == (set(before) - {"fp16.weights"}) | {"bf16.weights"}
    assert not replaced.has("fp16.weights") and Bundle.open(bundle.path, verify=True).has("bf16.weights")


def test_a_file_that_is_read_is_not_outdated(bundle: Bundle) -> None:
    extended = extend(bundle, "fp16")
    before = content(bundle.path)
    with (
        pytest.raises(BundleError, match="uses 'fp16.weights' but does not list it"),
        BundleExtension(extended) as made,
    ):
        made.commit(made.bundle.manifest, ["fp16.weights"])
    assert content(bundle.path) == before


def test_a_manifest_that_names_an_unwritten_file(bundle: Bundle) -> None:
    before = content(bundle.path)
    with pytest.raises(BundleError, match="uses 'fp16.weights' but does not list it"), BundleExtension(bundle) as made:
        made.commit(with_variant(made.bundle.manifest, "fp16"))
    assert content(bundle.path) == before


def test_what_another_process_added_stays(bundle: Bundle) -> None:
    """``bundle`` was opened before the first extension; the second builds on what stands now."""
    extend(bundle, "fp16")
    extended = extend(bundle, "bf16")
    assert list(extended.manifest.variants) == ["fp32", "fp16", "bf16"]
    Bundle.open(bundle.path, verify=True)


def test_many_at_once(bundle: Bundle) -> None:
    names = [f"v{index}" for index in range(12)]
    threads = [threading.Thread(target=extend, args=(bundle, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Bundle.open(bundle.path, verify=True).manifest.variants) == {"fp32", *names}
    assert not list(bundle.path.glob(".*"))


def test_leftovers_of_a_killed_run(bundle: Bundle) -> None:
    """A temporary directory whose writer is gone, and a file that moved in before the manifest did."""
    (bundle.path / ".extension.tmp-00000000").mkdir()
    (bundle.path / ".extension.tmp-00000000" / "fp16.weights").write_bytes(b"half")
    (bundle.path / "fp16.weights").write_bytes(b"of another run")
    Bundle.open(bundle.path, verify=True)
    assert extend(bundle, "fp16").file("fp16.weights").read_bytes() == b"\2" * 8
    assert not list(bundle.path.glob(".*"))


def test_a_full_disk(bundle: Bundle) -> None:
    before = content(bundle.path)
    with file_size_limit(1 << 20), pytest.raises(StorageError, match="larger than.*allows.*nothing was left"):
        extend(bundle, "fp16", b"\2" * (2 << 20))
    assert content(bundle.path) == before and not list(bundle.path.glob(".*"))
    extend(bundle, "fp16")


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_disk_that_breaks_while_files_move_in(bundle: Bundle, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, calls = content(bundle.path), os.replace, []

    def broken(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error", str(paths[1]))
        real(*paths)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(StorageError, match="disk reported an error"), BundleExtension(bundle) as extension:
        for name in ("a.weights", "fp16.weights"):
            (extension.path / name).write_bytes(b"\2")
        extension.commit(with_variant(extension.bundle.manifest, "fp16"))
    assert len(calls) == failing
    assert content(bundle.path) == before and not list(bundle.path.glob(".*"))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_bundle_that_cannot_be_written(bundle: Bundle, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(bundle.path)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError) as caught:
        extend(bundle, "fp16")
    assert caught.value.where == str(bundle.path) and caught.value.remedy
    monkeypatch.undo()
    assert content(bundle.path) == before
    extend(bundle, "fp16")  # the lock was let go


def test_a_bundle_that_went_away_or_broke(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "g.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="truncated"):
        extend(bundle, "fp16")
    os.rename(bundle.path, tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="cannot be opened: No such file"):
        extend(bundle, "fp16")


@pytest.mark.parametrize("links", [True, False])
def test_a_preview_shows_all_files_and_goes(bundle: Bundle, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    before = content(bundle.path)
    with BundleExtension(bundle) as extension:
        (extension.path / "fp16.weights").write_bytes(b"\2" * 8)
        manifest = with_variant(extension.bundle.manifest, "fp16")
        with extension.preview(manifest) as preview:
            assert content(preview.path) == {name: before[name] for name in bundle.manifest.files} | {
                "fp16.weights": b"\2" * 8
            }
            assert preview.file("fp16.weights").parent == preview.path and "fp16" in preview.manifest.variants
            assert preview.manifest.files["fp16.weights"].size == 8
        assert not preview.path.exists()
        with pytest.raises(ValueError), extension.preview(manifest) as preview:
            raise ValueError("x")
        assert not preview.path.exists()
        committed = extension.commit(manifest)
    assert set(content(committed.path)) - set(before) == {"fp16.weights"}
    assert all(path.stat().st_nlink == 1 for path in committed.path.rglob("*") if path.is_file())


def test_a_preview_of_files_that_are_not_there(bundle: Bundle) -> None:
    with BundleExtension(bundle) as extension:
        manifest = with_variant(extension.bundle.manifest, "fp16")
        with pytest.raises(BundleError, match=r"'fp16.weights' but does not list it"), extension.preview(manifest):
            pass
