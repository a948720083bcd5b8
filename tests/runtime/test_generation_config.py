"""What a model's generation_config.json changes for the decoder, and what of it is refused or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accel
from accel.errors import BundleError
from accel.runtime.decoder import Decoder
from accel.runtime.results import GenerateResult
from tests.engines.tiny_llama import EOS, VOCAB, draw_weights, greedy, write_bundle

WEIGHTS = draw_weights()
PROMPT = np.random.default_rng(5).integers(0, EOS, 9).tolist()
EXPECTED = greedy(WEIGHTS, PROMPT, 12, EOS)


def single(result: Any) -> GenerateResult:
    assert isinstance(result, GenerateResult)
    return result


def test_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    eos = EXPECTED[3]
    stop_at = EXPECTED.index(eos) + 1
    generation = {"eos_token_id": [eos, EOS], "max_new_tokens": 7, "do_sample": True, "temperature": 3.0, "top_k": 1}
    path = write_bundle(tmp_path / "bundle", WEIGHTS, generation).path
    with accel.load(path, capacity=64, max_batch=1) as lm:
        assert isinstance(lm, Decoder)
        result = single(lm.generate(PROMPT))  # top_k 1 makes sampling greedy
        assert result.ids == EXPECTED[: min(7, stop_at)] and result.text is None
        assert single(lm.generate(PROMPT, eos_token_id=[])).ids == EXPECTED[:7]
        assert single(lm.generate(PROMPT, eos_token_id=[], max_new_tokens=9)).ids == EXPECTED[:9]
        hot = [single(lm.generate(PROMPT, top_k=0, eos_token_id=[], seed=s)).ids for s in range(4)]
        assert any(ids != EXPECTED[:7] for ids in hot)


def test_an_end_of_sequence_id_that_the_model_lacks_is_left_out(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", WEIGHTS, {"eos_token_id": [VOCAB, -1]}).path
    with accel.load(path, capacity=64, max_batch=1) as lm:
        assert isinstance(lm, Decoder)
        expected = greedy(WEIGHTS, PROMPT, 5)
        assert single(lm.generate(PROMPT, max_new_tokens=5, min_new_tokens=5)).ids == expected


@pytest.mark.parametrize("junk", [[], {"eos_token_id": "two"}, {"eos_token_id": [1.5]}])
def test_a_junk_generation_config_is_a_bundle_error(tmp_path: Path, junk: Any) -> None:
    path = write_bundle(tmp_path / "bundle", WEIGHTS, junk).path
    with pytest.raises(BundleError):
        accel.load(path, capacity=64)


def test_unsupported_generation_defaults_are_named(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", WEIGHTS, {"num_beams": 4, "no_repeat_ngram_size": 0}).path
    with pytest.warns(UserWarning, match="sets num_beams, which"):
        accel.load(path, capacity=64).close()
