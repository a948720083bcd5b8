from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from accel.bench.peers import PEERS
from accel.bench.peers.torch_eager import TorchEager


def peer(name: str, folder: Path, model: str = "minilm") -> Any:
    return PEERS[name](model, folder, folder / "artifact", 2)


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].export_of])
def test_peers_that_share_an_export_ask_for_the_same_one(name: str, tmp_path: Path) -> None:
    sharing, owner = PEERS[name], PEERS[PEERS[name].export_of]
    assert not owner.export_of and sharing.export is owner.export and sharing.environment == owner.environment
    assert getattr(sharing, "weights", None) == getattr(owner, "weights", None)


@pytest.mark.parametrize("name", [name for name in PEERS if name.startswith("openvino")])
def test_openvino_is_told_what_to_compute_in(name: str, tmp_path: Path) -> None:
    assert peer(name, tmp_path)._settings()["INFERENCE_PRECISION_HINT"] == ("bf16" if name.endswith("bf16") else "f32")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("genai-int8", ("-p", "int8", "-e", "cpu")),
        ("genai-int4", ("-p", "int4", "-e", "cpu")),
        ("openvino-int8", ("--weight-format", "int8")),
        ("openvino-int4-bf16", ("--weight-format", "int4")),
    ],
)
def test_exporters_are_asked_for_the_precision(
    name: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        sys.modules[PEERS[name].export.__module__], "run_tool", lambda *command: commands.append(command)
    )
    peer(name, tmp_path, "qwen05").export()
    assert len(commands) == 1
    assert any(commands[0][start : start + len(words)] == words for start in range(len(commands[0])))


def test_ctranslate2_gets_rows_without_padding_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, Any] = {}
    rows: list[list[list[int]]] = []

    class Encoder:
        def __init__(self, path: str, **options: Any) -> None:
            opened.update(options)

        def forward_batch(self, batch: list[list[int]]) -> SimpleNamespace:
            rows.append(batch)
            return SimpleNamespace(last_hidden_state=[[[1.0]]])

    monkeypatch.setitem(sys.modules, "ctranslate2", SimpleNamespace(Encoder=Encoder))
    forward = peer("ctranslate2-int8", tmp_path).open_encoder()(
        {"input_ids": np.array([[5, 6, 7], [8, 0, 0]]), "attention_mask": np.array([[1, 1, 1], [1, 0, 0]])}
    )
    assert forward().shape == (1, 1, 1)
    assert rows == [[[5, 6, 7], [8]]]
    assert opened == {"device": "cpu", "intra_threads": 2, "compute_type": "int8"}


@pytest.mark.parametrize(
    ("name", "variant", "target", "engine"),
    [
        ("accel", None, "ort-cpu", "auto"),
        ("accel-w8a8-dyn", "w8a8-dyn", "ort-cpu", "auto"),
        ("accel-w4g32", "w4g32", "ort-cpu", "auto"),
        ("accel-openvino-bf16", "bf16", "openvino", "openvino"),
    ],
)
def test_accels_variants_are_added_for_their_engine(
    name: str, variant: str | None, target: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("accel.export", lambda source, out: calls.append(("export", out)), raising=False)

    def add_variant(bundle: Path, name: str, *, target: str, check: bool, measure: bool, **choices: Any) -> None:
        calls.append((str(bundle), name, target, check, measure))

    monkeypatch.setattr("accel.add_variant", add_variant, raising=False)
    monkeypatch.setattr("accel.variant_targets.find_target", lambda name: calls.append(("target", name)))
    monkeypatch.setattr("accel.load", lambda path, **options: calls.append(options), raising=False)
    ours = peer(name, tmp_path)
    ours.export()
    ours.open_embedder()
    path = str(tmp_path / "artifact")
    added = [(path, variant, target, False, False)] if variant else []
    loaded = {"engine": engine, "variant": variant or "auto", "threads": 2}
    assert calls == [("target", target), ("export", path), *added, loaded]


def test_token_gaps_are_what_a_choice_lost_at_each_position(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    judge = TorchEager("gpt2", tmp_path, tmp_path, 1)
    prompt = np.array([[3, 4, 5]])
    chosen = judge.open_decoder()(prompt, 4)
    assert judge.token_gaps(prompt, chosen) == pytest.approx(np.zeros(4), abs=1e-5)
    other = [(token + 7) % 50 for token in chosen]
    gaps = judge.token_gaps(prompt, other)
    with torch.inference_mode():
        logits = model(torch.tensor([[3, 4, 5, other[0]]])).logits[0, 2:].numpy()
    expected = logits.max(axis=1) - logits[[0, 1], other[:2]]
    assert gaps.shape == (4,) and gaps[:2] == pytest.approx(expected, abs=1e-5) and gaps.min() > 0
