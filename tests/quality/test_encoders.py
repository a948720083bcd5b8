from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel.errors import BundleError, EngineError, InputError
from accel.quality import encoders, resolve_text
from accel.runtime.encoder import Encoder
from tests.runtime.encoder_samples import ARCH, HIDDEN, FakeSession, Opened, write_bundle

Head = Callable[[NDArray, dict[str, NDArray]], dict[str, NDArray]]
TEXT = resolve_text(["A dog barks.", "The cat sleeps all day on the sofa.", "Rain is expected.", "It rains a lot."])
MIXING = np.random.default_rng(3).standard_normal((HIDDEN, 4)).astype(np.float32)


def opened(path: Path, task: Any = "feature-extraction", head: Head | None = None, **files: Any) -> Encoder:
    bundle = write_bundle(path, replace(ARCH, task=task), sentence=task == "feature-extraction", **files)
    return Encoder(bundle, Opened(FakeSession(head)))


def observed(encoder: Encoder, plan: Any = None) -> tuple[Any, Any]:
    plan = plan or encoders.make_plan(encoder, TEXT, 1000)
    told: list[int] = []
    found = encoders.observe(encoder, plan, told.append)
    assert sum(told) == plan.tokens
    return plan, found


def compared(plan: Any, ours: Any, theirs: Any) -> Any:
    return encoders.compare(plan, ours, theirs)["encoder"]


def shaken(scale: float, change: Callable[[NDArray], NDArray]) -> Head:
    """Logits [B, S, 4] or [B, C] from hidden states, with noise that is the same in each run."""

    def head(hidden: NDArray, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        noise = np.random.default_rng(0).standard_normal((512, 4)).astype(np.float32)
        kept = feeds["attention_mask"][..., None]
        return {"logits": change((np.where(kept == 1, hidden, 0) @ MIXING) + scale * noise[: hidden.shape[1]] * kept)}

    return head


def test_embeddings_and_their_pairs(tmp_path: Path) -> None:
    encoder = opened(tmp_path / "b")
    plan, found = observed(encoder)
    assert plan.output == "embeddings" and plan.texts == TEXT.passages and len(plan.pairs) == 6
    vectors = encoder.embed(list(TEXT.passages))
    np.testing.assert_allclose(np.stack(found.outputs.vectors), vectors, atol=1e-6)
    table = encoder.similarity(vectors, vectors)
    expected = [table[a, b] for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    np.testing.assert_allclose(found.outputs.scores, expected)
    assert [item.name for item in found.timings] == ["forward of 1x128", "forward of 8x128", "embedding of 4 texts"]
    assert all(item.compute > 0 and item.total > item.compute for item in found.timings)
    itself = compared(plan, found, found)
    assert (itself.cosine_mean, itself.cosine_min, itself.rank_correlation) == pytest.approx((1, 1, 1))
    assert (itself.texts, itself.pairs, itself.logit_error, itself.label_agreement) == (4, 6, None, None)


def test_cosines_and_ranks_of_other_embeddings(tmp_path: Path) -> None:
    plan, reference = observed(opened(tmp_path / "a"))
    vectors = [vector.copy() for vector in reference.outputs.vectors]
    vectors[2] = -vectors[2]
    outputs = reference.outputs._replace(vectors=tuple(vectors), scores=-reference.outputs.scores)
    found = compared(plan, replace(reference, outputs=outputs), reference)
    assert (found.cosine_mean, found.cosine_min, found.rank_correlation) == pytest.approx((0.5, -1, -1))


def test_the_text_ends_where_enough_is_measured(tmp_path: Path) -> None:
    plan = encoders.make_plan(opened(tmp_path / "b"), TEXT, 18)
    assert plan.texts == TEXT.passages[:2] and plan.tokens <= 18 and plan.pairs.tolist() == [[0, 1]]
    assert len(encoders.make_plan(opened(tmp_path / "c"), TEXT, 2).texts) == 1  # one always


def test_labels_of_texts(tmp_path: Path) -> None:
    head = shaken(0.0, lambda logits: logits.sum(axis=1))
    labels = {str(index): f"L{index}" for index in range(4)}
    config = {"type_vocab_size": 2, "id2label": labels}
    plan, reference = observed(opened(tmp_path / "a", "text-classification", head, config=config))
    assert plan.output == "logits" and plan.texts == TEXT.passages
    assert reference.outputs.decisions.tolist() == [vector.argmax() for vector in reference.outputs.vectors]
    noisy = shaken(0.3, lambda logits: logits.sum(axis=1))
    _, other = observed(opened(tmp_path / "b", "text-classification", noisy, config=config), plan)
    found = compared(plan, other, reference)
    pairs = list(zip(other.outputs.vectors, reference.outputs.vectors, strict=True))
    largest = max(np.abs(b).max() for _, b in pairs)
    assert found.logit_error == pytest.approx(max(np.abs(a - b).max() for a, b in pairs) / largest)
    assert found.logit_error > 0
    assert found.label_agreement == np.mean([a.argmax() == b.argmax() for a, b in pairs]) and found.labels == 4
    assert 0 < found.cosine_min < found.cosine_mean < 1 and found.rank_correlation is None


def test_rankers_are_given_pairs_and_have_no_labels(tmp_path: Path) -> None:
    config = {"type_vocab_size": 2, "id2label": {"0": "LABEL_0"}}
    head = shaken(0.0, lambda logits: logits.sum(axis=(1, 2))[:, None])
    plan, reference = observed(opened(tmp_path / "a", "text-classification", head, config=config))
    assert plan.texts == TEXT.pairs and len(reference.outputs.scores) == 6 and len(plan.pairs) == 0
    assert all(1 in row.type_ids for row in plan.rows)
    found = compared(plan, reference, reference)
    assert (found.rank_correlation, found.cosine_mean) == pytest.approx((1, 1)) and found.label_agreement is None
    other = opened(tmp_path / "b", "text-classification", head, config=config)
    with pytest.raises(InputError, match="takes pairs"):
        encoders.make_plan(other, resolve_text(["One text."]), 100)


def test_tokens_and_their_labels(tmp_path: Path) -> None:
    plan, found = observed(opened(tmp_path / "a", "token-classification", shaken(0.0, lambda logits: logits)))
    assert found.outputs.decisions.shape == (plan.tokens,)  # padding decides nothing
    assert [vector.size for vector in found.outputs.vectors] == [4 * len(row.ids) for row in plan.rows]


def test_answers_have_two_ends(tmp_path: Path) -> None:
    def head(hidden: NDArray, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        return {"start_logits": hidden[..., 0], "end_logits": hidden[..., 1]}  # 1e4 at padding

    plan, found = observed(opened(tmp_path / "a", "question-answering", head))
    assert plan.texts == TEXT.pairs and len(found.outputs.decisions) == 2 * len(TEXT.pairs)
    assert max(np.abs(vector).max() for vector in found.outputs.vectors) <= 1


def test_the_middle_is_masked_for_fill_mask(tmp_path: Path) -> None:
    def head(hidden: NDArray, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        place = (feeds["input_ids"] == 103).argmax(axis=1)
        logits = np.zeros((*hidden.shape[:2], 50), np.float32)
        logits[np.arange(len(place)), place, place] = 9  # the mask's own place is the best token there
        return {"logits": logits}

    plan, found = observed(opened(tmp_path / "a", "fill-mask", head))
    assert all(row.ids.count(103) == 1 for row in plan.rows)
    assert found.outputs.decisions.tolist() == [len(row.ids) // 2 for row in plan.rows]
    without = {"special_tokens_map": {}, "tokenizer_config": {}}
    with pytest.raises(BundleError, match="no mask token"):
        encoders.make_plan(opened(tmp_path / "b", "fill-mask", head, **without), TEXT, 1000)


def test_several_labels_at_once(tmp_path: Path) -> None:
    config = {"type_vocab_size": 2, "problem_type": "multi_label_classification", "id2label": {"0": "a", "1": "b"}}
    head = shaken(0.0, lambda logits: logits.sum(axis=1))
    _, found = observed(opened(tmp_path / "a", "text-classification", head, config=config))
    expected = np.concatenate([vector > 0 for vector in found.outputs.vectors])
    assert found.outputs.decisions.tolist() == expected.astype(int).tolist()


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    head = shaken(0.0, lambda logits: logits.sum(axis=1) * np.float32(np.nan))
    with pytest.raises(EngineError, match="NaN or infinity"):
        observed(opened(tmp_path / "a", "text-classification", head))
