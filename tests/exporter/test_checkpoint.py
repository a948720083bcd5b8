from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from accel.errors import CheckpointError
from accel.exporter.checkpoint import check_folder, check_weight_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.ones((8, 4), np.float32), "b": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_whole_folder_passes(folder: Path) -> None:
    check_folder(folder)


def test_missing_folder() -> None:
    with pytest.raises(CheckpointError, match=r"no model folder.*nowhere.*owner/name"):
        check_folder(Path("nowhere"))


def test_missing_config_and_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        check_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "x.gguf", "tf_model.h5"])
def test_the_remedy_knows_what_lies_there(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("{}")
    says = {"adapter_config.json": "merge_and_unload", "x.gguf": r"x\.gguf", "tf_model.h5": "TensorFlow"}[name]
    with pytest.raises(CheckpointError, match=says):
        check_folder(folder)


@pytest.mark.parametrize("kept", [0, 5, 20, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"truncated.*model\.safetensors"):
        check_folder(folder)


def test_overlong_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        check_folder(folder)


def test_junk_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="header is corrupt"):
        check_folder(folder)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        check_folder(folder)


def test_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        check_folder(folder)


def test_shard_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"1 of 2 weight shards are missing, first model-2\.safetensors"):
        check_folder(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    check_folder(folder)
    data = (folder / "model-1.safetensors").read_bytes()
    (folder / "model-1.safetensors").write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match=r"truncated.*model-1"):
        check_folder(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        check_folder(folder)


def test_config_must_be_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"not valid JSON.*config\.json"):
        check_folder(folder)


def test_gguf_magic(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        check_weight_file(path)
    with pytest.raises(CheckpointError, match="missing"):
        check_weight_file(tmp_path / "absent.gguf")
