"""Files that a bundle lost: those of one variant cost that variant alone, and commands mend it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import accel
from accel.bundle import Bundle
from accel.bundle_extension import BundleExtension
from accel.cli import main
from accel.engine_request import load_builder, settle
from accel.errors import BundleError, EngineUnavailableError
from accel.inspection import inspect, render_page, render_text
from accel.lost_files import dispensable, lost_graphs, weights_of, without_lost
from accel.manifest import Manifest, Quality, StoredSize
from accel.quality import render_text as render_report
from accel.quality import save_quality
from accel.variant_removal import drop_variant
from accel.variants import add_variant, is_current
from tests.test_bundle_extension import content
from tests.test_variants import locations

SIZE = StoredSize(1, 1)
QUALITY = Quality("here", "here", "this one", "built-in", "", SIZE, SIZE)


def add(folder: Path, *graphs: tuple[str, str]) -> Bundle:
    bundle = Bundle.open(folder)
    for variant, target in graphs:
        more = {"algorithm": "rtn", "measure": False} if variant.startswith("w") else {}
        bundle = add_variant(bundle, variant, target=target, check=False, **more)  # type: ignore[arg-type]
    return bundle


@pytest.fixture
def decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder")).resolve()


@pytest.fixture
def damaged(decoder: Path) -> Path:
    """``w8g32`` lost its weights; there are two more variants that did not."""
    add(decoder, ("w8g32", "ort-cpu"), ("w4g32", "ort-cpu"), ("fp16", "tensorrt"))
    (decoder / "w8g32.weights").unlink()
    return decoder


AGAIN = "accel quantize {} --variant w8g32 --target ort-cpu makes it again, accel quantize {} --drop w8g32 drops it"


def test_the_other_variants_run(damaged: Path) -> None:
    bundle = Bundle.open(damaged)
    assert bundle.lost == {("w8g32", "ort-cpu"): ("w8g32.weights",)} and bundle.missing == {"w8g32.weights"}
    assert list(bundle.manifest.variants) == ["fp32", "w4g32", "fp16"]
    assert "w8g32.weights" not in bundle.manifest.files and bundle.has("w8g32.weights")
    with accel.load(damaged, device="cpu", strict=True) as model:
        assert (model.engine.variant, model.fallbacks) == ("fp32", ())
        assert model.generate("hello", max_new_tokens=4).ids
    with accel.load(damaged, variant="w4g32") as model:
        assert model.engine.variant == "w4g32"


def test_by_name_it_is_refused_with_what_mends_it(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "The variant 'w8g32' cannot run for ort-cpu: its file w8g32.weights is missing"
    with pytest.raises(BundleError) as caught:
        accel.load(damaged, variant="w8g32")
    assert caught.value.what == told and caught.value.remedy == AGAIN.format(damaged, damaged)
    assert main(["run", str(damaged), "hello", "--variant", "w8g32"]) == 1
    assert told in capsys.readouterr().err
    with pytest.raises(BundleError, match="'w8g32' cannot run"):
        accel.report(damaged, "w8g32")
    bundle = Bundle.open(damaged)
    with pytest.raises(BundleError, match="cannot run for ort-cpu"):
        bundle.graph("w8g32", "ort-cpu")
    assert bundle.whole.graph("w8g32", "ort-cpu").file == "w8g32.ort-cpu.onnx"


def test_all_files_must_be_there_where_they_are_verified(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BundleError, match=r"missing \(at .*w8g32\.weights\).*--variant w8g32.*--drop w8g32"):
        Bundle.open(damaged, verify=True)
    assert main(["inspect", str(damaged), "--verify"]) == 1
    assert "w8g32.weights" in capsys.readouterr().err


def test_inspect_shows_it(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(Bundle.open(damaged))
    (lost,) = found.lost
    assert (lost.variant, lost.target, lost.files) == ("w8g32", "ort-cpu", ("w8g32.weights",))
    assert {graph.variant for graph in found.graphs} == {"fp32", "w4g32", "fp16"} and found.warnings == ()
    assert found.missing == {"w8g32.weights"} < {file.name for file in found.files}
    line = "w8g32/ort-cpu: its file w8g32.weights is missing: " + AGAIN.format(damaged, damaged)
    text, page = render_text(found), render_page(found)
    assert line in text and "w8g32 (int8) [damaged], w4g32" in text
    assert line in page and "w8g32: int8 [damaged]" in page
    assert main(["inspect", str(damaged), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["lost"][0]["files"] == ["w8g32.weights"] and "w8g32" in report["variants"]


def test_an_inspection_of_one_that_lost_a_graph_of_several(decoder: Path) -> None:
    add(decoder, ("fp16", "tensorrt"), ("fp16", "cuda"))
    (decoder / "fp16.cuda.onnx").unlink()
    text = render_text(inspect(Bundle.open(decoder)))
    assert "fp16 (float16) [damaged for cuda]" in text and "Graph fp16/tensorrt" in text
    assert f"accel quantize {decoder} --drop fp16 --target cuda drops it" in text
    with pytest.raises(EngineUnavailableError, match=r"\(cuda: .*fp16: its file fp16\.cuda\.onnx is missing"):
        accel.load(decoder, engine="cuda", variant="fp16")


def test_what_drops_a_lost_graph_drops_no_other(decoder: Path) -> None:
    """Each line is of one graph: the whole variant would take those with it that were made again meanwhile."""
    add(decoder, ("fp16", "tensorrt"), ("fp16", "cuda"))
    for target in ("tensorrt", "cuda"):
        (decoder / f"fp16.{target}.onnx").unlink()
    bundle = Bundle.open(decoder)
    for target in ("tensorrt", "cuda"):
        assert f"--drop fp16 --target {target} drops it" in str(bundle.lost_reason("fp16", target))
    with pytest.raises(BundleError, match=r"for tensorrt and cuda: .*--drop fp16 drops it"):
        bundle.variant("fp16")
    assert list(drop_variant(decoder, "fp16", target="cuda").lost) == [("fp16", "tensorrt")]


def test_a_report_says_which_variant_is_not_in_it(damaged: Path) -> None:
    for name in ("w4g32", "fp16"):
        save_quality(Bundle.open(damaged), {name: QUALITY})
    found = accel.report(damaged)
    assert found.variant("w8g32").quality is None and found.variant("w8g32").quantization is not None
    assert "w8g32 was not measured: ort-cpu: its file w8g32.weights is missing" in " ".join(
        render_report(found).split()
    )


@pytest.mark.parametrize("name", ["fp32.weights", "canonical.onnx", "ort-cpu.onnx", "tokenizer.json", "config.json"])
def test_what_all_need_is_an_error(decoder: Path, name: str) -> None:
    add(decoder, ("w8g32", "ort-cpu"), ("fp32", "tensorrt"))
    (decoder / name).unlink()
    with pytest.raises(BundleError, match=rf"missing \(at .*{name}\).*Export the model again"):
        Bundle.open(decoder)


def test_what_is_there_must_be_right(decoder: Path) -> None:
    """A damaged file is an error as ever; deleted it costs its variant alone."""
    add(decoder, ("w8g32", "ort-cpu"))
    path = decoder / "w8g32.weights"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"truncated.*or delete it \(rm {path}\): .*accel inspect {decoder} says"):
        Bundle.open(decoder)
    path.unlink()
    assert "fp32" in Bundle.open(decoder).manifest.variants
    with (decoder / "fp32.weights").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(BundleError, match=r"longer than it was") as caught:
        Bundle.open(decoder)
    assert "delete" not in str(caught.value)


def test_it_is_made_again(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = add(Path(shutil.copytree(damaged, tmp_path / "other")), ("w8g32", "ort-cpu"))
    assert whole.lost == {} and is_current(whole, "w8g32", "ort-cpu")
    before = content(damaged)
    assert not is_current(Bundle.open(damaged), "w8g32", "ort-cpu")
    arguments = ["quantize", str(damaged), "--variant", "w8g32", "--algorithm", "rtn", "--no-parity", "--no-quality"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["mended"], found["lost"], found["known"]) == (["w8g32/ort-cpu"], {}, [])
    after = content(damaged)
    assert set(before) - set(after) == {"w8g32.ort-cpu.onnx"}, "the graph of the lost weights goes"
    assert set(after) - set(before) == {"w8g32.ort-cpu.2.onnx", "w8g32.2.weights"}, "no name is used again"
    bundle = Bundle.open(damaged, verify=True)
    assert bundle.full_manifest is bundle.manifest and not bundle.has("w8g32.weights")
    assert set(bundle.manifest.files) | {"manifest.json"} == set(after)
    with accel.load(damaged, variant="w8g32") as model:
        assert model.generate("hello", max_new_tokens=4).ids
    assert main([*arguments]) == 0 and "was there already" in capsys.readouterr().out


def test_a_file_that_comes_back_mends_it(damaged: Path, tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    """The manifest keeps what it says of lost files, whatever is added meanwhile."""
    copy = add(Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "other")), ("w8g32", "ort-cpu"))
    add(damaged, ("bf16", "tensorrt"))
    save_quality(Bundle.open(damaged), {"fp16": QUALITY})
    assert list(Bundle.open(damaged).lost) == [("w8g32", "ort-cpu")]
    shutil.copy(copy.file("w8g32.weights"), damaged)
    bundle = Bundle.open(damaged, verify=True)
    assert bundle.lost == {} and list(bundle.manifest.variants) == ["fp32", "w8g32", "w4g32", "fp16", "bf16"]


def test_a_cache_is_called_by_its_short_name_too(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(decoder, ("fp32+kv8", "ort-cpu"))
    (decoder / "fp32+kv8.ort-cpu.onnx").unlink()
    assert main(["run", str(decoder), "hello", "--variant", "kv8"]) == 1
    assert "'fp32+kv8' cannot run for ort-cpu: its file" in capsys.readouterr().err
    with pytest.raises(BundleError, match=r"no variant \['kv8'\]"):
        Bundle.open(decoder).variant(["kv8"])  # type: ignore[arg-type]


def test_a_preview_lacks_what_the_bundle_lost(damaged: Path) -> None:
    bundle = Bundle.open(damaged)
    with BundleExtension(bundle) as extension, extension.preview(bundle.full_manifest) as preview:
        assert preview.lost == bundle.lost and "w8g32" not in preview.manifest.variants
        assert set(content(preview.path)) == bundle.manifest.files.keys()


def test_a_manifest_without_what_is_lost_is_no_end_of_the_bundle(damaged: Path) -> None:
    bundle = Bundle.open(damaged)
    with BundleExtension(bundle) as extension:
        extension.commit(bundle.manifest)
    left = Bundle.open(damaged, verify=True)
    assert list(left.manifest.variants) == ["fp32", "w4g32", "fp16"] and not left.has("w8g32.weights")


def test_graphs_that_shared_a_lost_file_are_made_again_one_by_one(decoder: Path) -> None:
    """Each reads new files alone: an old graph over new weights of another layout would compute nonsense."""
    graphs = [("fp16", "tensorrt"), ("fp16", "cuda"), ("fp16+kv8", "cuda")]
    first = add(decoder, *graphs)
    assert {"fp16.weights"} <= set(first.weights("fp16", "cuda")) & set(first.weights("fp16+kv8", "cuda"))
    (decoder / "fp16.weights").unlink()
    assert list(Bundle.open(decoder).lost) == graphs
    for number, graph in enumerate(graphs):
        bundle = add(decoder, graph)
        assert list(bundle.lost) == graphs[number + 1 :]
        assert "fp16.weights" not in bundle.weights(*graph)
        assert bundle.has("fp16.weights") == (number < 2), "it is listed as long as a lost graph reads it"
    bundle = Bundle.open(decoder, verify=True)
    assert set(bundle.manifest.files) | {"manifest.json"} == set(content(decoder))
    assert locations(bundle, "fp16") <= set(bundle.variant("fp16").weights)
    assert set(bundle.weights("fp16", "cuda")) == set(bundle.weights("fp16+kv8", "cuda")), "shared as before"
    total = sum(bundle.manifest.files[name].size for name in bundle.manifest.files)
    assert total < 1.01 * sum(entry.size for entry in first.manifest.files.values())


def test_what_was_not_recorded_goes_by_the_files_of_before(decoder: Path) -> None:
    """An older accel did not say which weights a graph reads; those of one that is made again are not the others'."""
    add(decoder, ("fp16", "tensorrt"), ("fp16", "cuda"))
    path = decoder / "manifest.json"
    data = json.loads(path.read_text())
    for graph in data["variants"]["fp16"]["graphs"].values():
        del graph["weights"]
    path.write_text(json.dumps(data))
    (decoder / "fp16.weights").rename(decoder.parent / "aside")
    before = weights_of(Bundle.open(decoder).full_manifest, "fp16", "cuda")
    assert before == ("fp16.weights", "fp16.cuda.weights")
    bundle = add(decoder, ("fp16", "tensorrt"))
    assert bundle.weights("fp16", "tensorrt") == ("fp16.2.weights",)
    assert weights_of(bundle.full_manifest, "fp16", "cuda") == before
    (decoder.parent / "aside").rename(decoder / "fp16.weights")
    assert Bundle.open(decoder, verify=True).weights("fp16", "cuda") == before
    drop_variant(decoder, "fp16", target="tensorrt")
    assert not (decoder / "fp16.2.weights").exists()


def test_one_that_is_made_otherwise_says_so(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    save = dataclasses.replace(QUALITY, text="of the lost integers")
    manifest = Bundle.open(damaged).full_manifest
    known = dataclasses.replace(manifest.variants["w8g32"], quality=save)
    with BundleExtension(Bundle.open(damaged)) as extension:
        extension.commit(dataclasses.replace(manifest, variants={**manifest.variants, "w8g32": known}))
    bundle = add_variant(
        damaged, "w8g32", algorithm="rtn", keep={"*.o_proj.weight": 32}, check=False, measure=False
    )
    assert "w8g32 is made otherwise than what was lost: " in caplog.text
    assert bundle.variant("w8g32").quality is None, "what was measured was another one"


def test_an_interrupted_mending_leaves_it_as_it_was(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(damaged)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("accel.bundle_extension.fsync_tree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        add(damaged, ("w8g32", "ort-cpu"))
    assert content(damaged) == before


def test_files_that_are_replaced_meanwhile_are_not_lost(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader has the old manifest in hand when a writer has removed what only that one lists."""
    old = add(decoder, ("w8g32", "ort-cpu")).full_manifest
    drop_variant(decoder, "w8g32")
    now, reads = Bundle.open(decoder).full_manifest, [old]
    monkeypatch.setattr("accel.bundle.read_manifest", lambda root: reads.pop() if reads else now)
    assert Bundle.open(decoder).lost == {} and not reads


def test_engines_are_not_built_of_it(damaged: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    add(damaged, ("bf16", "tensorrt"))
    flavour = load_builder("rtx")
    (damaged / "fp16.weights").unlink()
    bundle = Bundle.open(damaged)
    with pytest.raises(BundleError, match=r"'fp16' cannot run for tensorrt: its file fp16\.weights is missing"):
        settle(bundle, flavour, "sm86", precision="fp16")
    told = r"'fp16' cannot run.*--variant fp16.*--drop fp16 drops it, or name the precision.*: --precision bf16"
    with pytest.raises(BundleError, match=told):
        settle(bundle, flavour, "sm86")
    assert settle(bundle, flavour, "sm86", precision="bf16").variant == "bf16"
    (damaged / "bf16.weights").unlink()
    with pytest.raises(BundleError, match=r"fp16\.weights is missing"):
        settle(Bundle.open(damaged), flavour, "sm86")


def test_a_warmup_does_not_make_it_again(damaged: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    add(damaged, ("w8g32", "tensorrt"))
    for name in Bundle.open(damaged).weights("w8g32", "tensorrt"):
        (damaged / name).unlink()
    jobs = tmp_path / "jobs.yaml"
    text = f"jobs: [{{bundle: {damaged}, target: rtx, sm: [sm86], precision: w8g32}}]\n"
    jobs.write_text(f"store: {tmp_path / 'store'}\n{text}")
    before = content(damaged)
    (engine,) = accel.warmup(jobs, dry_run=True).engines
    assert engine.status == "failed" and "'w8g32' cannot run for tensorrt" in str(engine.reason)
    assert content(damaged) == before


def test_a_warmup_builds_no_other_precision_in_its_place(damaged: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    add(damaged, ("bf16", "tensorrt"))
    (damaged / "fp16.weights").unlink()
    jobs = tmp_path / "jobs.yaml"
    text = f"jobs: [{{bundle: {damaged}, target: rtx, sm: [sm86], precision: [auto, bf16]}}]\n"
    jobs.write_text(f"store: {tmp_path / 'store'}\n{text}")
    lost, named = accel.warmup(jobs, dry_run=True).engines
    assert lost.status == "failed" and "'fp16' cannot run for tensorrt" in str(lost.reason)
    assert named.status != "failed"


def test_which_files_are_needed() -> None:
    """Of graphs whose weights were not recorded, the names tell."""
    from tests.bundle_samples import GRAPH, manifest

    plain = manifest()
    fp32 = dataclasses.replace(
        plain.variants["fp32"], graphs={"ort-cpu": GRAPH, "openvino": dataclasses.replace(GRAPH, file="openvino.onnx")}
    )
    graphs = {name: dataclasses.replace(GRAPH, file=f"fp16.{name}.onnx") for name in ("cuda", "tensorrt")}
    fp16 = dataclasses.replace(fp32, weights=("fp16.weights", "fp16.cuda.weights"), graphs=graphs)
    made: Manifest = dataclasses.replace(plain, variants={"fp32": fp32, "fp16": fp16})
    own = {"fp16.weights", "fp16.cuda.weights", "fp16.cuda.onnx", "fp16.tensorrt.onnx"}
    assert dispensable(made) == own | {"openvino.onnx"}
    assert weights_of(made, "fp16", "tensorrt") == ("fp16.weights",)
    assert lost_graphs(made, {"fp16.cuda.weights"}) == {("fp16", "cuda"): ("fp16.cuda.weights",)}
    left = without_lost(made, {"fp16.cuda.weights"}).variants["fp16"]
    assert (list(left.graphs), left.weights) == (["tensorrt"], ("fp16.weights",))
    assert list(without_lost(made, {"fp16.weights"}).variants) == ["fp32"]
    assert list(without_lost(made, {"openvino.onnx"}).variants["fp32"].graphs) == ["ort-cpu"]
    assert without_lost(made, ()) is made
    assert set(lost_graphs(made, own)) == {("fp16", "cuda"), ("fp16", "tensorrt")}
