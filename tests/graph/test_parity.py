from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.engines.session import StepInputs
from accel.errors import ParityError
from accel.graph import parity
from accel.recipe import ParityRecipe
from accel.spec import ArchSpec, AttentionSpec

VOCAB = 50
LAYER = AttentionSpec(heads=2, kv_heads=1, head_dim=8, scale=0.35, causal=True)
DECODER = ArchSpec("llama", "L", "decoder", "text-generation", 16, VOCAB, 128, 1000, False, (LAYER,))
ENCODER = dataclasses.replace(DECODER, kind="encoder", task="feature-extraction")


def logits_of(prefix: NDArray[np.int64]) -> NDArray[np.float32]:
    """A stand-in model: logits that depend on the whole prefix."""
    weights = np.arange(1, len(prefix) + 1)
    return np.sin(np.arange(VOCAB) * float((prefix * weights).sum() % 97)).astype(np.float32)


class Session:
    """Appends each row's tokens to its own history, as a decoder session does, and may be wrong by a factor."""

    max_batch = 3

    def __init__(self, factor: float = 1.0, spoil: Any = None) -> None:
        self.factor, self.spoil = factor, spoil
        self.rows: list[list[int]] = [[] for _ in range(self.max_batch)]

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        assert len(inputs.query_lengths) == self.max_batch
        every, start = [], 0
        for row, count in enumerate(inputs.query_lengths):
            past = int(inputs.past_lengths[row])
            self.rows[row] = self.rows[row][:past]
            assert len(self.rows[row]) == past
            for offset in range(count):
                assert inputs.position_ids[start + offset] == past + offset
                self.rows[row].append(int(inputs.input_ids[start + offset]))
                every.append(logits_of(np.array(self.rows[row])))
            start += count
        logits = np.array(every)[inputs.logits_positions] * np.float32(self.factor)
        return self.spoil(logits) if self.spoil else logits


def decoder_cases(recipe: ParityRecipe, arch: ArchSpec = DECODER) -> list[parity.Case]:
    cases = parity.make_cases(arch, recipe)
    for case in cases:
        assert isinstance(case, parity.DecoderCase)
        case.expected = [
            np.array([logits_of(row[: position + 1]) for position in positions])
            for row, positions in zip(case.rows, case.positions, strict=True)
        ]
    return cases


def test_decoder_passes_and_is_recorded() -> None:
    recipe = ParityRecipe()
    result = parity.check_parity(Session(), DECODER, decoder_cases(recipe), recipe)  # type: ignore[arg-type]
    assert (result.cases, result.max_abs_error, result.max_rel_error, result.limit) == (3, 0.0, 0.0, 1e-4)
    assert result.greedy_tokens_equal == result.greedy_tokens_total
    assert result.greedy_tokens_total is not None
    assert result.greedy_tokens_total > 50


def test_decoder_error_names_case_value_and_limit() -> None:
    recipe = ParityRecipe()
    with pytest.raises(ParityError, match=r"1\.00e-03 .*limit 1\.0e-04 \(at case 0 .*step 0\)") as caught:
        parity.check_parity(Session(1.001), DECODER, decoder_cases(recipe), recipe)  # type: ignore[arg-type]
    assert caught.value.value == pytest.approx(1e-3, rel=0.01)


def test_not_a_number_never_passes() -> None:
    recipe = ParityRecipe(limit=1e9)
    session = Session(spoil=lambda logits: np.full_like(logits, math.nan))
    with pytest.raises(ParityError, match="NaN or infinity") as caught:
        parity.check_parity(session, DECODER, decoder_cases(recipe), recipe)  # type: ignore[arg-type]
    assert caught.value.value == math.inf


def test_a_reference_that_is_not_finite_is_not_blamed_on_the_graph() -> None:
    recipe = ParityRecipe()
    cases = decoder_cases(recipe)
    cases[0].expected[0][0, 0] = math.nan
    with pytest.raises(ParityError, match="PyTorch itself gives NaN") as caught:
        parity.check_parity(Session(), DECODER, cases, recipe)  # type: ignore[arg-type]
    assert "without parity" not in str(caught.value) and caught.value.value is None


def test_only_rows_that_join_late_see_a_swapped_row() -> None:
    recipe = ParityRecipe()

    def swap(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits[::-1]

    with pytest.raises(ParityError):
        parity.check_parity(Session(spoil=swap), DECODER, decoder_cases(recipe), recipe)  # type: ignore[arg-type]


def test_greedy_tokens_are_compared_where_the_margin_is_clear() -> None:
    gate = parity._Gate(1.0)
    expected = np.array([[0.0, 1.0, 0.99], [0.0, 1.0, 0.0]], np.float32)
    found = np.array([[0.0, 1.0, 1.01], [0.0, 1.0, 0.0]], np.float32)
    gate.compare_greedy("here", found, expected, error=0.02)
    assert (gate.greedy_equal, gate.greedy_total) == (1, 1)  # the near tie does not count
    with pytest.raises(ParityError, match="greedy token differs.*here"):
        gate.compare_greedy("here", found, expected, error=0.001)


def test_prompts_are_longer_than_the_window() -> None:
    arch = dataclasses.replace(DECODER, layers=(LAYER, dataclasses.replace(LAYER, window=60)))
    case = parity.make_cases(arch, ParityRecipe())[0]
    assert isinstance(case, parity.DecoderCase)
    assert case.steps[0] == (68,)
    assert case.positions[0][-1] == len(case.rows[0]) - 1


def test_a_window_that_is_too_dear_is_said(caplog: pytest.LogCaptureFixture) -> None:
    windowed = (dataclasses.replace(LAYER, window=1000),)
    arch = dataclasses.replace(DECODER, layers=windowed, max_positions=4096, parameters=10**12)
    case = parity.make_cases(arch, ParityRecipe(cases=1))[0]
    assert isinstance(case, parity.DecoderCase)
    assert case.steps[0] == (parity.PROMPT,)
    assert "shorter than the attention window of 1000" in caplog.text


@pytest.mark.parametrize("limit", [1, 2, 5, 30])
def test_short_models_get_short_cases(limit: int) -> None:
    arch = dataclasses.replace(DECODER, max_positions=limit)
    recipe = ParityRecipe()
    cases = decoder_cases(recipe, arch)
    assert parity.capacity_of(cases) <= limit
    parity.check_parity(Session(), arch, cases, recipe)  # type: ignore[arg-type]


def test_cases_depend_on_the_seed_alone() -> None:
    first, again, other = (parity.make_cases(DECODER, ParityRecipe(seed=seed))[1] for seed in (0, 0, 1))
    assert isinstance(first, parity.DecoderCase)
    assert isinstance(again, parity.DecoderCase)
    assert isinstance(other, parity.DecoderCase)
    assert all(np.array_equal(a, b) for a, b in zip(first.rows, again.rows))
    assert not np.array_equal(first.rows[0], other.rows[0])


class EncoderSession:
    def __init__(self, spoil_padding: bool = False, spoil_real: bool = False) -> None:
        self.spoil_padding, self.spoil_real = spoil_padding, spoil_real

    def run(self, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        hidden = np.stack([np.cos(feeds["input_ids"]), feeds["token_type_ids"]], -1).astype(np.float32)
        if self.spoil_padding:
            hidden[feeds["attention_mask"] == 0] = math.nan
        if self.spoil_real:
            hidden[-1, 0, 0] += 1
        return {"last_hidden_state": hidden}


def test_encoder_compares_real_positions_only() -> None:
    recipe = ParityRecipe()
    cases = parity.make_cases(ENCODER, recipe, pad_id=1, token_types=2)
    for case in cases:
        assert isinstance(case, parity.EncoderCase)
        case.expected = EncoderSession().run(case.feeds)
        assert np.all(case.feeds["input_ids"][~case.real] == 1)
        assert not np.any(case.feeds["input_ids"][case.real] == 1)
    assert [bool(case.real.all()) for case in cases] == [True, False, True]  # type: ignore[union-attr]
    parity.check_parity(EncoderSession(spoil_padding=True), ENCODER, cases, recipe)  # type: ignore[arg-type]
    with pytest.raises(ParityError, match="case 0 .*last_hidden_state"):
        parity.check_parity(EncoderSession(spoil_real=True), ENCODER, cases, recipe)  # type: ignore[arg-type]


def test_reference_is_eager_and_leaves_the_model_alone() -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes)).eval()
    before = model.config._attn_implementation
    cases = parity.make_cases(DECODER, ParityRecipe(cases=1))
    parity.compute_references(model, DECODER, cases)
    case = cases[0]
    assert isinstance(case, parity.DecoderCase)
    assert model.config._attn_implementation == before
    with torch.no_grad():
        whole = model(input_ids=torch.from_numpy(case.rows[0])[None]).logits[0].numpy()
    np.testing.assert_allclose(case.expected[0], whole[case.positions[0]], atol=1e-5)
