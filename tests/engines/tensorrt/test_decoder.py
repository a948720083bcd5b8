"""The decoder session through accel's own loop, against ONNX Runtime's engine: engines are real, the GPU is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from accel.bundle import Bundle
from accel.engines import OpenedSession, open_session
from accel.engines.session import SessionOptions, StepInputs
from accel.runtime.decoder import Decoder
from accel.runtime.slots import SlotOptions
from tests.engines.tensorrt.conftest import CAPACITY, DECODE
from tests.engines.tensorrt.double import World
from tests.parity.comparison import COURSES, draw_rows, run_course

Bundles, Opener = Callable[[str], Bundle], Callable[..., Any]
FAMILIES = ["llama", "qwen2", "gemma3_text", "gemma2", "mistral"]
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(3, 97, length).tolist() for length in (12, 3, 1, 29, 40, 7, 2)]


def reference(bundle: Bundle, rows: int = 3, capacity: int = CAPACITY) -> Any:
    options = SessionOptions(threads=1, capacity=capacity, max_batch=rows)
    return open_session(bundle, engine="ort-cpu", options=options).session


def decoders(bundle: Bundle, session: Any, chunk: int = 256) -> tuple[Decoder, Decoder]:
    options = SlotOptions(chunk)
    expected = Decoder(bundle, OpenedSession(reference(bundle, session.max_batch)), options)
    return Decoder(bundle, OpenedSession(session), options), expected


def assert_close(found: Any, expected: Any) -> None:
    found, expected = np.concatenate(found), np.concatenate(expected)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_ort(name: str, tiny_bundle: Bundles, open_tiny: Opener) -> None:
    """Seven prompts over three rows: rows join and leave, and prompts run between the steps of others."""
    own, other = decoders(tiny_bundle(name), open_tiny(name, max_batch=3))
    with own, other:
        found, expected = (decoder.generate(PROMPTS, max_new_tokens=20, eos_token_id=[]) for decoder in (own, other))
    assert [result.ids for result in found] == [result.ids for result in expected]
    assert all(len(result.ids) == 20 for result in found)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("course", COURSES)
def test_steps_equal_ort(name: str, course: str, tiny_bundle: Bundles, open_tiny: Opener) -> None:
    """Every token's logits: whole and chunked prefill, ragged batches, mixed steps, rows that wait."""
    session, rows = open_tiny(name, max_batch=3), draw_rows()
    assert_close(
        run_course(session, rows, COURSES[course]), run_course(reference(tiny_bundle(name)), rows, COURSES[course])
    )


@pytest.mark.parametrize("copied", [False, True])
def test_what_a_row_held_before_does_not_reach_the_next_sequence(
    copied: bool, tiny_bundle: Bundles, open_tiny: Opener, world: World
) -> None:
    """Infinities of an overflow in hidden slots: 0 x inf would be NaN."""
    session, rows = open_tiny("llama", max_batch=3), draw_rows((4, 3, 4))
    for address in session.cache_pointers().values():
        block = world.gpu.blocks[address]
        world.gpu.view(address, (block.size // 4,), np.float32)[:] = np.inf
    lengths, none = np.array([4, 3, 0], np.int32), np.zeros(3, np.int32)
    ids, positions = np.concatenate(rows[:2]), np.concatenate([np.arange(4), np.arange(3)])
    first = session.step(StepInputs(ids, positions, lengths, none, np.arange(7))).copy()
    if copied:
        session.copy_row(0, 2, 3)
        past = np.array([0, 0, 3], np.int32)
        step = StepInputs(rows[0][3:4], np.array([3]), np.array([0, 0, 1], np.int32), past, np.zeros(1, np.int64))
        second = session.step(step)
        np.testing.assert_allclose(second[0], first[3], rtol=1e-4, atol=1e-4)
    assert np.isfinite(first).all()


def test_half_precision_caches(tiny_bundle: Bundles, open_tiny: Opener, world: World) -> None:
    session, rows = open_tiny("llama", ir.DataType.FLOAT16, max_batch=3), draw_rows()
    course = COURSES["rows that join, wait and go"]
    found, expected = run_course(session, rows, course), run_course(reference(tiny_bundle("llama")), rows, course)
    error = np.abs(np.concatenate(found) - np.concatenate(expected)).max()
    assert 0 < error <= 2e-2 * np.abs(np.concatenate(expected)).max()
    sizes = {world.gpu.blocks[address].size for address in session.cache_pointers().values()}
    assert sizes == {3 * 2 * CAPACITY * 16 * 2}


def test_shared_prompts_and_sampling(tiny_bundle: Bundles, open_tiny: Opener) -> None:
    own, other = decoders(tiny_bundle("llama"), open_tiny("llama", max_batch=4))
    options = {"max_new_tokens": 12, "num_return_sequences": 5, "do_sample": True, "seed": 4, "eos_token_id": []}
    with own, other:
        found, expected = (decoder.generate(PROMPTS[0], **options) for decoder in (own, other))
    assert [result.ids for result in found] == [result.ids for result in expected]
    assert len({tuple(result.ids) for result in found}) > 1


@pytest.mark.parametrize("chunk", [256, 5])
def test_scores_and_chunks(chunk: int, tiny_bundle: Bundles, open_tiny: Opener) -> None:
    """Scoring wants the logits of every token, more than one run gives; chunks of five need five runs and more."""
    own, other = decoders(tiny_bundle("qwen2"), open_tiny("qwen2", max_batch=3), chunk)
    with own, other:
        for mine, theirs in zip(own.score([PROMPTS[3], PROMPTS[4]]), other.score([PROMPTS[3], PROMPTS[4]])):
            np.testing.assert_allclose(mine, theirs, atol=1e-4)
        found, expected = (decoder.generate(PROMPTS, max_new_tokens=5, eos_token_id=[]) for decoder in (own, other))
    assert [result.ids for result in found] == [result.ids for result in expected]


@pytest.mark.parametrize("length", [CAPACITY, CAPACITY - 1, CAPACITY - 5])
def test_the_last_slot_is_used(length: int, tiny_bundle: Bundles, open_tiny: Opener) -> None:
    """A prompt up to the capacity, in chunks whose padding would not fit behind it, beside a row that generates."""
    prompt = RNG.integers(3, 97, length).tolist()
    own, other = decoders(tiny_bundle("llama"), open_tiny("llama", max_batch=2), chunk=20)
    prompts, options = [prompt, PROMPTS[0]], {"max_new_tokens": CAPACITY - length + 1, "eos_token_id": []}
    if length == CAPACITY:
        options["max_new_tokens"] = 1
        prompts[0] = prompt[:-1]
    with own, other:
        found, expected = (decoder.generate(prompts, **options) for decoder in (own, other))
    assert [result.ids for result in found] == [result.ids for result in expected]


def test_caches_never_move(open_tiny: Opener, world: World) -> None:
    session = open_tiny("llama", max_batch=3)
    before, used = session.cache_pointers(), world.gpu.used
    rows = draw_rows()
    run_course(session, rows, COURSES["rows that join, wait and go"])
    session.copy_row(0, 2, 9)
    graphs_aside = [context for context in world.contexts if context.captured is None]
    assert session.cache_pointers() == before and world.gpu.used == used
    bound = {context.addresses[f"past.{name}"] for context in graphs_aside for name in before if context.addresses}
    rows_of = {address + row * 2 * CAPACITY * 16 * 4 for address in before.values() for row in range(3)}
    assert bound <= rows_of


def test_rows_are_copied(tiny_bundle: Bundles, open_tiny: Opener) -> None:
    """Row 2 goes on from row 0's first five tokens: the sixth token's logits are the ones of row 0."""
    session, (tokens, *_) = open_tiny("llama", max_batch=3), draw_rows()
    whole = run_course(session, [tokens, tokens, tokens], [(9, 0, 0)])[0].copy()
    session.copy_row(0, 2, 5)
    step = StepInputs(
        tokens[5:6], np.array([5]), np.array([0, 0, 1], np.int32), np.array([0, 0, 5], np.int32), np.array([0])
    )
    np.testing.assert_allclose(session.step(step)[0], whole[5], atol=1e-4)


def test_batches_and_widths_are_padded_to_the_profiles(open_tiny: Opener, world: World) -> None:
    session, rows = open_tiny("llama", max_batch=4), draw_rows((40, 40, 40, 40))
    run_course(session, rows, [(17, 0, 0, 0), (3, 0, 0, 0), (1, 1, 1, 0), (1, 0, 0, 0), (0, 1, 0, 1), (1, 1, 0, 0)])
    # Prefill (0) to widths 16, 24, 32; decode (1) to batches 1, 2, 4; rows 1 and 3 span three: a batch of four.
    shapes = [(profile, shape) for profile, shape in world.runs]
    assert shapes[:3] == [(0, (1, 24)), (0, (1, 16)), (1, (4, 1))]
    assert set(shapes[3:]) == {(1, (1, 1)), (1, (4, 1)), (1, (2, 1))}


def test_one_profile_serves_both_phases(tiny_bundle: Bundles, open_tiny: Opener) -> None:
    wide = ((1,), (2,), (3,)), ((1,), (8,), (32,))
    session, rows = open_tiny("llama", ir.DataType.FLOAT, wide, max_batch=3), draw_rows()
    course = COURSES["rows that join, wait and go"]
    assert_close(run_course(session, rows, course), run_course(reference(tiny_bundle("llama")), rows, course))


def test_a_decode_profile_alone_prefills_token_by_token(tiny_bundle: Bundles, open_tiny: Opener, world: World) -> None:
    session, rows = open_tiny("llama", ir.DataType.FLOAT, DECODE, max_batch=3), draw_rows()
    course = [(5, 0, 2), (1, 1, 1)]
    assert_close(run_course(session, rows, course), run_course(reference(tiny_bundle("llama")), rows, course))
    assert {shape[1] for _, shape in world.runs} == {1}
