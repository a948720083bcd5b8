from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accel
from accel import api
from accel.bundle import Bundle
from accel.errors import InputError, ParityError, RecipeError, StorageError
from accel.recipe import Recipe
from accel.spec import EMBEDDING_INPUT


def test_decoder_bundle(tiny_decoder_bundle: Path, tiny_decoder_source: Path) -> None:
    bundle = Bundle.open(tiny_decoder_bundle, verify=True)
    manifest = bundle.manifest
    assert manifest.source == tiny_decoder_source.name
    assert set(manifest.variants["fp32"].graphs) == {"canonical", "ort-cpu"}
    for target in ("canonical", "ort-cpu"):
        entry = bundle.graph("fp32", target)
        assert entry.attention_nodes == ("layers.0.attention", "layers.1.attention")
        assert entry.opset <= 24
        assert entry.passes
    assert EMBEDDING_INPUT in {spec.name for spec in bundle.graph("fp32", "ort-cpu").inputs}
    result = manifest.parity["fp32/ort-cpu"]
    assert 0 < result.max_rel_error < 1e-5
    assert result.greedy_tokens_equal == result.greedy_tokens_total
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert bundle.file(name).read_bytes() == (tiny_decoder_source / name).read_bytes()
    assert bundle.read_json("config.json")["architectures"] == ["LlamaForCausalLM"]


def test_parameters_stand_in_the_weight_file(tiny_decoder_bundle: Path, tiny_decoder_source: Path) -> None:
    from safetensors.numpy import load_file

    bundle = Bundle.open(tiny_decoder_bundle)
    source = load_file(tiny_decoder_source / "model.safetensors")
    assert set(bundle.manifest.parameters) == set(source) - set(bundle.manifest.tied)
    for name, entry in bundle.manifest.parameters.items():
        count = int(np.prod(entry.shape))
        found = np.fromfile(bundle.file(entry.file), np.float32, count, offset=entry.offset).reshape(entry.shape)
        np.testing.assert_array_equal(found, source[name])


def test_no_path_of_this_machine_is_in_the_bundle(tiny_decoder_bundle: Path, tiny_decoder_source: Path) -> None:
    for path in tiny_decoder_bundle.iterdir():
        data = path.read_bytes()
        assert str(tiny_decoder_source).encode() not in data, path.name
        assert b"site-packages" not in data, path.name


@pytest.mark.slow
def test_exporting_twice_gives_the_same_bytes(
    tiny_decoder_source: Path, tiny_decoder_bundle: Path, tmp_path: Path
) -> None:
    """In another process, with another hash seed and another output path."""
    code = "import sys, accel; accel.export(sys.argv[1], sys.argv[2])"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(tiny_decoder_source), str(tmp_path / "again")]
    subprocess.run(command, check=True, env=environment, cwd=Path(accel.__file__).parents[1])
    for name in ("canonical.onnx", "ort-cpu.onnx", "fp32.weights", "config.json", "manifest.json"):
        pair = [
            hashlib.sha256((folder / name).read_bytes()).digest()
            for folder in (tiny_decoder_bundle, tmp_path / "again")
        ]
        assert pair[0] == pair[1], name


def test_sentence_files(minilm_bundle: Path, minilm_source: Path) -> None:
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ):
        assert (minilm_bundle / name).read_bytes() == (minilm_source / name).read_bytes()
    manifest = Bundle.open(minilm_bundle).manifest
    assert manifest.arch.task == "feature-extraction"
    assert len(manifest.arch.layers) == 6
    assert manifest.parity["fp32/ort-cpu"].max_rel_error < 1e-5


@pytest.fixture
def tiny_model() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=40, **sizes))


def test_loaded_model_with_tokenizer(tiny_model: Any, minilm_source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_model.train()
    before = tiny_model.config._attn_implementation
    tokenizer = AutoTokenizer.from_pretrained(minilm_source)
    bundle = accel.export(tiny_model, tmp_path / "out", tokenizer=tokenizer, max_positions=24)
    assert bundle.has("tokenizer.json")
    assert bundle.manifest.arch.max_positions == 24
    assert tiny_model.training
    assert tiny_model.config._attn_implementation == before
    assert bundle.manifest.source == "BertModel"


def test_no_tokenizer_is_said(tiny_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="accel"):
        bundle = accel.export(tiny_model, tmp_path / "out")
    assert "no tokenizer" in caplog.text
    assert any("no tokenizer" in note for note in bundle.manifest.notes)
    assert "Tracing" in caplog.text
    assert not bundle.has("tokenizer.json")


def test_overwrite(tiny_model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(StorageError, match="never deleted"):
        accel.export(tiny_model, out, overwrite=True)
    assert (out / "precious").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"task": "fillmask"}, InputError, "Did you mean 'fill-mask'"),
        ({"recipe": {"pariti": {}}}, RecipeError, "Did you mean 'parity'"),
        ({"recipe": "decodr"}, RecipeError, "Did you mean 'decoder'"),
        ({"max_positions": 41}, InputError, "more than the 40"),
        ({"max_positions": 0}, InputError, "at least 1, not 0"),
        ({"max_positions": True}, InputError, "at least 1, not True"),
        ({"tokenizer": 5}, InputError, "no tokenizer"),
        ({"tokenizer": "nowhere"}, InputError, "no tokenizer folder"),
    ],
)
def test_wrong_arguments_leave_nothing(
    tiny_model: Any, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        accel.export(tiny_model, tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_parity_failure_leaves_nothing(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"more than the limit 1\.0e-30"):
        accel.export(tiny_model, tmp_path / "out", {"parity": {"limit": 1e-30}})
    assert os.listdir(tmp_path) == []


def test_parity_notices_changed_weights(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate reads the graph that was written, not the model."""
    original = api.run_parity

    def spoil(folder: Path, manifest: Any, *rest: Any) -> Any:
        entry = manifest.parameters["encoder.layer.0.attention.self.value.weight"]
        weights = np.memmap(folder / entry.file, np.float32, "r+", entry.offset, (int(np.prod(entry.shape)),))
        weights[:] *= 1.5
        weights.flush()
        return original(folder, manifest, *rest)

    monkeypatch.setattr(api, "run_parity", spoil)
    with pytest.raises(ParityError, match="case 0"):
        accel.export(tiny_model, tmp_path / "out")


def test_parity_off_is_said(tiny_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from accel.recipe import ParityRecipe

    bundle = accel.export(tiny_model, tmp_path / "out", Recipe(parity=ParityRecipe(enabled=False)))
    assert bundle.manifest.parity == {}
    assert "switched off" in caplog.text


def test_interrupt_leaves_nothing(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run_parity", interrupt)
    tiny_model.train()
    with pytest.raises(KeyboardInterrupt):
        accel.export(tiny_model, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    assert tiny_model.training


def test_full_disk_leaves_nothing(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from accel.exporter import weights

    def fail(self: Any, array: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights._Writer, "write", fail)
    with pytest.raises(StorageError, match="disk is full"):
        accel.export(tiny_model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tiny_model: Any, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(StorageError, match="permission"):
        accel.export(tiny_model, locked / "out")


def test_no_permission_half_way(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from accel.exporter import files

    def fail(model: Any, out: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out / "config.json"))

    monkeypatch.setattr(files, "_write_config", fail)
    with pytest.raises(StorageError, match="no permission to write"):
        accel.export(tiny_model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_slow_tokenizer_is_converted(tiny_model: Any, minilm_source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    tiny_model.save_pretrained(folder)
    shutil.copy(minilm_source / "vocab.txt", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    bundle = accel.export(folder, tmp_path / "out")
    vocabulary = bundle.read_json("tokenizer.json")["model"]["vocab"]
    assert vocabulary["[CLS]"] == 101
    assert len(vocabulary) == 30522


def test_progress_only_when_asked(tiny_model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    accel.export(tiny_model, tmp_path / "quiet", show_progress=False)
    assert capfd.readouterr() == ("", "")
    accel.export(tiny_model, tmp_path / "shown", show_progress=True)
    assert "Tracing" in capfd.readouterr().err


def test_an_encoder_without_a_pooler_runs_on_every_engine(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, max_position_embeddings=40, **sizes)
    accel.export(BertModel(config, add_pooling_layer=False), tmp_path / "bundle")
    ids = np.array([[3, 4, 5, 6]])
    with accel.load(tmp_path / "bundle", engine="torch") as reference, accel.load(tmp_path / "bundle") as encoder:
        assert (reference.engine.name, encoder.engine.name) == ("torch", "ort-cpu")
        expected = reference(ids).last_hidden_state
        np.testing.assert_allclose(encoder(ids).last_hidden_state, expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["w4g32+kv8", "kv8"])
def test_variants_that_cannot_be_are_refused_before_the_export(tiny_model: Any, tmp_path: Path, variant: str) -> None:
    with pytest.raises(InputError, match=f"no target runs this encoder as {re.escape(variant)} "):
        accel.export(tiny_model, tmp_path / "out", variants=["w8g128", variant])
    assert os.listdir(tmp_path) == []


def test_a_variant_that_fails_leaves_the_bundle_and_says_so(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(bundle: Bundle, variant: str, **_: Any) -> Bundle:
        if variant == "w4g32":
            raise ParityError("The w4g32 graph differs", remedy="Please report it")
        variants = {**bundle.manifest.variants, variant: bundle.manifest.variants["fp32"]}
        return Bundle(bundle.path, dataclasses.replace(bundle.manifest, variants=variants))

    monkeypatch.setattr(api, "add_variant", add)
    with pytest.raises(ParityError, match="report it. The exported bundle .*out stands, with fp32, w8g128, but with"):
        accel.export(tiny_model, tmp_path / "out", variants=["w8g128", "w4g32"])
    assert Bundle.open(tmp_path / "out")
