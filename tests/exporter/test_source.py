from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from accel.errors import CheckpointError, DependencyError, InputError, UnsupportedArchitectureError
from accel.exporter import source as module
from accel.exporter.source import load_model, resolve_source
from tests.exporter.models import make_decoder, make_encoder


@pytest.fixture
def decoder_folder(tmp_path: Path) -> Path:
    make_decoder().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_folder(decoder_folder: Path) -> None:
    source = resolve_source(str(decoder_folder))
    assert (source.label, source.task) == ("model", "text-generation")
    loaded = load_model(source, source.task)
    expected = make_decoder().state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert loaded.notes == ()


def test_half_precision_is_widened(decoder_folder: Path) -> None:
    make_decoder().to(torch.bfloat16).save_pretrained(decoder_folder)
    source = resolve_source(decoder_folder)
    parameter = next(load_model(source, source.task).model.parameters())
    assert parameter.dtype == torch.float32
    assert torch.equal(parameter, next(make_decoder().to(torch.bfloat16).float().parameters()))


def test_missing_weights_are_never_made_up(decoder_folder: Path) -> None:
    edit_weights(decoder_folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj\.weight"):
        load_model(resolve_source(decoder_folder), "text-generation")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(decoder_folder: Path, value: float) -> None:
    def damage(tensors: Any) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = value
        tensors["model.norm.weight"][0] = value

    edit_weights(decoder_folder, damage)
    what = r"weight model\.layers\.1\.mlp\.up_proj\.weight holds 3 values that are NaN or infinite, and so does another"
    with pytest.raises(CheckpointError, match=what) as caught:
        load_model(resolve_source(decoder_folder), "text-generation")
    assert "parity" not in str(caught.value)


def test_large_weights_whose_sum_overflows_are_no_damage() -> None:
    model = make_decoder()
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    assert load_model(resolve_source(model), "text-generation").model is model


def test_config_that_disagrees_with_the_weights(decoder_folder: Path) -> None:
    edit_config(decoder_folder, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"disagree with config\.json.*\[\d+, \d+\].*\[\d+, \d+\]"):
        load_model(resolve_source(decoder_folder), "text-generation")


def test_config_with_more_layers_than_the_weights(decoder_folder: Path) -> None:
    edit_config(decoder_folder, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"weights are missing.*layers\.2"):
        load_model(resolve_source(decoder_folder), "text-generation")


def test_superfluous_weights_are_noted(decoder_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(decoder_folder, lambda tensors: tensors.update(extra=torch.ones(3)))
    loaded = load_model(resolve_source(decoder_folder), "text-generation")
    assert loaded.notes == ("1 checkpoint tensors are not part of the model: extra",)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == list(loaded.notes)


def test_task_without_trained_head(tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier.*task text-classification"):
        load_model(resolve_source(tmp_path), "text-classification")


def test_missing_pooler_is_left_out(tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "pooler" in name])
    loaded = load_model(resolve_source(tmp_path), "feature-extraction")
    assert loaded.model.pooler is None


def test_unknown_architecture_names_the_nearest(decoder_folder: Path) -> None:
    edit_config(decoder_folder, model_type="qwen2_7")
    with pytest.raises(UnsupportedArchitectureError, match="nearest supported family is qwen2"):
        resolve_source(decoder_folder)


def test_remote_code_is_not_run_unasked(decoder_folder: Path) -> None:
    edit_config(decoder_folder, model_type="own", auto_map={"AutoConfig": "evil.Config"})
    (decoder_folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedArchitectureError, match="trust_remote_code=True"):
        resolve_source(decoder_folder)


def test_pickled_weights_that_are_broken(decoder_folder: Path) -> None:
    (decoder_folder / "model.safetensors").unlink()
    (decoder_folder / "pytorch_model.bin").write_bytes(b"junk" * 20)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(resolve_source(decoder_folder), "text-generation")


def test_loaded_model_is_left_as_it_was() -> None:
    model = make_decoder().train()
    model.model.layers[0].eval()
    before = {name: part.training for name, part in model.named_modules()}
    source = resolve_source(model)
    loaded = load_model(source, source.task)
    assert loaded.model is model
    assert not any(part.training for part in model.modules())
    loaded.release()
    assert {name: part.training for name, part in model.named_modules()} == before


def test_loaded_half_precision_model_is_copied() -> None:
    model = make_decoder().to(torch.float16)
    loaded = load_model(resolve_source(model), "text-generation")
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float16


def test_wrong_objects() -> None:
    with pytest.raises(InputError, match="A Linear cannot be exported"):
        resolve_source(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with torch.device("meta"):
        meta = make_decoder()
    with pytest.raises(CheckpointError, match="meta device"):
        resolve_source(meta)


def test_sentence_transformers_folder_with_its_transformer_in_a_subfolder(tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path / "0_Transformer")
    modules = [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    source = resolve_source(tmp_path)
    assert source.task == "feature-extraction"
    assert source.folder == tmp_path / "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.CLIPModel", "path": ""}]))
    with pytest.raises(UnsupportedArchitectureError, match="CLIPModel"):
        resolve_source(tmp_path)


def test_transformers_settings_are_restored(decoder_folder: Path) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    resolve_source(decoder_folder)
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_hub_id_fetches_one_weight_format(decoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    files = [
        "config.json", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx",
        "modeling.py", "tokenizer.json", "modules.json", "1_Pooling/config.json",
    ]  # fmt: skip
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(decoder_folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source("owner/name").label == "owner/name"
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling/config.json"}
    assert set(asked["allow_patterns"]) == wanted
    assert "pytorch_model.bin" in module._wanted(["config.json", "pytorch_model.bin"], False)


def test_gguf_needs_two_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="pip install gguf accelerate"):
        resolve_source(tmp_path / "m.gguf")


def test_gguf_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises((CheckpointError, UnsupportedArchitectureError)):
        resolve_source(tmp_path / "m.gguf")


def test_hub_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(CheckpointError, match=r"cannot be fetched.*no such host.*local folder, check its path"):
        resolve_source("owner/name")
