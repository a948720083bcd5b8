"""The two models that are carried with real weights, the whole way from the checkpoint to text and vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.engines.torch_reference import build_model
from accel.runtime.decoder import Decoder
from tests.parity.comparison import decoder_references, deviation, excess

GREEDY = 64
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a village by the sea,"]
SENTENCES = ["The cat sits on the mat.", "A cat is resting on a rug.", "Interest rates rose again this quarter."]


@pytest.fixture(scope="module")
def smollm2(smollm2_bundle: Path) -> Iterator[Decoder]:
    with accel.load(smollm2_bundle, capacity=2048, max_batch=3) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def eager(smollm2_bundle: Path) -> Any:
    return build_model(Bundle.open(smollm2_bundle), 2)[0]


def test_smollm2_logits_and_greedy_tokens(smollm2: Decoder, eager: Any) -> None:
    """Three prompts in one ragged batch: 64 tokens equal eager's up to the first that fp32 cannot decide."""
    results = smollm2.generate(PROMPTS, max_new_tokens=GREEDY, do_sample=False, eos_token_id=[])
    encode = smollm2.tokenizer.encode
    for text, result in zip(PROMPTS, results, strict=True):
        prompt = np.array(encode(text))
        ids = np.concatenate([prompt, result.ids])
        (single,), (exact,) = decoder_references(eager, [ids])
        best = np.sort(exact[len(prompt) - 1 : -1], axis=-1)[:, -2:]
        undecided = np.flatnonzero(best[:, 1] - best[:, 0] <= 2 * np.abs(single - exact).max())
        decided = int(undecided[0]) if len(undecided) else GREEDY
        assert decided >= GREEDY // 2, "this text says nothing"
        # Each token is the best after the tokens before it, which the pass above saw: equal to eager's own run.
        assert result.ids[:decided] == exact[len(prompt) - 1 : -1].argmax(-1)[:decided].tolist()

        scores = np.array(smollm2.score(ids.tolist()))
        shifted = exact - exact.max(-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        expected = np.take_along_axis(logprobs[:-1], ids[1:, None], -1)[:, 0]
        np.testing.assert_allclose(scores, expected, atol=5e-4)


def test_smollm2_error_against_fp64(smollm2: Decoder, eager: Any) -> None:
    """Logits of a whole prompt lose at most twice what eager fp32 loses."""
    from accel.engines.session import StepInputs

    ids = np.array(smollm2.tokenizer.encode(" ".join(PROMPTS) * 4))
    (single,), (exact,) = decoder_references(eager, [ids])
    query = np.array([len(ids), 0, 0], np.int32)
    session = smollm2._session  # the packed step gives every token's logits, which generate does not
    steps = StepInputs(ids, np.arange(len(ids)), query, np.zeros(3, np.int32), np.arange(len(ids)))
    assert excess(deviation(session.step(steps).copy(), exact), deviation(single, exact)) <= 1


def test_smollm2_answers(smollm2: Decoder) -> None:
    pieces = list(smollm2.stream("The capital of France is", max_new_tokens=8, do_sample=False))
    assert "Paris" in "".join(pieces) and len(pieces) > 1
    reply = smollm2.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=24)
    assert "Paris" in (reply.text or "")


def test_minilm_against_fp64(minilm_bundle: Path) -> None:
    """Token vectors of a padded batch lose at most twice what eager fp32 loses; sentence vectors follow meaning."""
    from tests.parity.comparison import encoder_references, flatten_real

    model, _ = build_model(Bundle.open(minilm_bundle), 2)
    with accel.load(minilm_bundle) as encoder:
        encoded = [item.ids for item in encoder.tokenizer.encode_batch(SENTENCES * 4)]
        width = max(len(ids) for ids in encoded)
        mask = np.array([[1] * len(ids) + [0] * (width - len(ids)) for ids in encoded])
        ids = np.array([list(ids) + [0] * (width - len(ids)) for ids in encoded])
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        single, exact = (flatten_real(part, feeds) for part in encoder_references(model, feeds, ["last_hidden_state"]))
        found = flatten_real(dict(encoder(**feeds)), feeds)
        assert excess(deviation(found, exact), deviation(single, exact)) <= 1

        vectors = encoder.embed(SENTENCES)
        with torch.no_grad():
            output = model(**{name: torch.from_numpy(array) for name, array in feeds.items()}).last_hidden_state
        pooled = (output * torch.from_numpy(mask)[..., None]).sum(1) / torch.from_numpy(mask).sum(1, keepdim=True)
        expected = torch.nn.functional.normalize(pooled, dim=-1)[: len(SENTENCES)].numpy()
        np.testing.assert_allclose(vectors, expected, atol=2e-6)
        close, far = encoder.similarity(vectors, vectors)[0, 1:]
        assert close > 0.5 > 0.2 > far
