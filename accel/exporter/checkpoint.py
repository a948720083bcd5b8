"""Checks a checkpoint's files before anything is built from them: present, whole, and what they claim to be."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from accel.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
GGUF_MAGIC = b"GGUF"
_MAX_HEADER = 256 << 20
_REPAIR = "Copy or download the file again"


def check_folder(folder: Path) -> None:
    """Checks a local model folder: config, weight files, every shard.

    Raises:
        CheckpointError: A file is missing, truncated, or no checkpoint at all.
    """
    if folder.is_file():
        what = "This is a file, neither a model folder nor a .gguf file"
        raise CheckpointError(what, where=str(folder), remedy="Give the folder that holds config.json")
    if not folder.is_dir():
        raise CheckpointError(
            "There is no model folder", where=str(folder), remedy="Check the path; a hub id has the form owner/name"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError("The model folder has no config.json", where=str(folder), remedy=_hint(folder))
    read_json(folder / "config.json")
    present = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        raise CheckpointError("The model folder has no weights", where=str(folder), remedy=_hint(folder))
    first = folder / present[0]
    for path in _shards(first) if first.suffix == ".json" else [first]:
        check_weight_file(path)


def check_weight_file(path: Path) -> None:
    """Checks that one weight file is as long as its own header says.

    Raises:
        CheckpointError: It is missing, truncated, or a Git LFS pointer.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
            size = path.stat().st_size
            if head.startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    "The weight file is a Git LFS pointer", where=str(path), remedy="Fetch it: git lfs pull"
                )
            if path.suffix == ".safetensors":
                stream.seek(0)
                _check_length(path, _safetensors_size(path, stream.read(8), stream.read), size)
            elif path.suffix == ".gguf" and not head.startswith(GGUF_MAGIC):
                raise CheckpointError("The file is no GGUF file", where=str(path), remedy=_REPAIR)
            elif size == 0:
                raise CheckpointError("The weight file is empty", where=str(path), remedy=_REPAIR)
    except FileNotFoundError as error:
        raise CheckpointError("A weight file is missing", where=str(path), remedy=_REPAIR) from error
    except OSError as error:
        what = f"The weight file cannot be read: {error.strerror}"
        raise CheckpointError(what, where=str(path), remedy="Check its permissions") from error


def read_json(path: Path) -> dict[str, object]:
    """Reads a JSON object of the checkpoint.

    Raises:
        CheckpointError: It cannot be read, or is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"The file cannot be read: {error.strerror}"
        raise CheckpointError(what, where=str(path), remedy="Check its permissions") from error
    except ValueError as error:
        raise CheckpointError(f"The file is not valid JSON: {error}", where=str(path), remedy=_REPAIR) from error
    if not isinstance(data, dict):
        raise CheckpointError("The file is not a JSON object", where=str(path), remedy=_REPAIR)
    return data


def _safetensors_size(path: Path, prefix: bytes, read: object) -> int:
    """Bytes that the header promises for the whole file."""
    assert callable(read)
    if len(prefix) < 8:
        raise CheckpointError("The weight file is truncated: it has no header", where=str(path), remedy=_REPAIR)
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER:
        raise CheckpointError("The file is no safetensors file", where=str(path), remedy=_REPAIR)
    text = read(length)
    if len(text) < length:
        raise CheckpointError("The weight file is truncated within its header", where=str(path), remedy=_REPAIR)
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError("The weight file's header is corrupt", where=str(path), remedy=_REPAIR) from error
    return int(8 + length + max(ends, default=0))


def _check_length(path: Path, expected: int, found: int) -> None:
    if found != expected:
        kind = "truncated" if found < expected else "longer than its header says"
        what = f"The weight file is {kind}: {found:,} bytes instead of {expected:,}"
        raise CheckpointError(what, where=str(path), remedy=_REPAIR)


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Refuses damaged weights: PyTorch would give NaN for them too, so that no comparison could find them.

    Args:
        model: Its parameters are summed up, which reads each once and copies none.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: A parameter holds NaN or infinity; names it and says how many.
    """
    import torch

    bad: dict[str, int] = {}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # The sum of finite numbers may overflow: then they are looked at one by one.
            if tensor.is_floating_point() and not torch.isfinite(tensor.sum()):
                bad[name] = int(tensor.numel() - torch.isfinite(tensor).sum())
    bad = {name: count for name, count in bad.items() if count}
    if not bad:
        return
    first, count = next(iter(bad.items()))
    values = f"{count:,} value{'s' if count > 1 else ''} that {'are' if count > 1 else 'is'} NaN or infinite"
    others = f", and so do {len(bad) - 1} more weights" if len(bad) > 2 else ", and so does another weight"
    what = f"The checkpoint's weight {first} holds {values}{others if len(bad) > 1 else ''}"
    raise CheckpointError(what, where=where, remedy="Copy or download it again, or take an earlier checkpoint")


def _shards(index: Path) -> list[Path]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError("The shard index has no weight_map", where=str(index), remedy=_REPAIR)
    names = sorted({str(name) for name in mapping.values()})
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        what = f"{len(absent)} of {len(names)} weight shards are missing, first {absent[0]}"
        raise CheckpointError(what, where=str(index), remedy="Copy or download the missing files")
    return [index.parent / name for name in names]


def _hint(folder: Path) -> str:
    if any(folder.glob("adapter_config.json")):
        return "It holds an adapter: merge it into its base model first (merge_and_unload)"
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"Give the GGUF file itself, e.g. {folder / ggufs[0]}"
    if any((folder / name).is_file() for name in ("tf_model.h5", "flax_model.msgpack")):
        return "It holds TensorFlow or Flax weights only: convert them to safetensors first"
    return "Give a folder with config.json and model.safetensors, as save_pretrained writes it"


__all__ = ["check_finite", "check_folder", "check_weight_file", "read_json"]
