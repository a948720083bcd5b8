"""The architecture as data: from the config, the traced layers and the parameters; nothing is guessed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accel.errors import InputError, UnsupportedArchitectureError
from accel.exporter.families import check_layers, kind_of
from accel.spec import ArchSpec, AttentionSpec, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("accel")
_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "position_embedding")


def read_arch(
    model: PreTrainedModel, layers: list[AttentionSpec], task: Task, max_positions: int | None = None
) -> ArchSpec:
    """Describes one model.

    Args:
        model: The model that will be traced.
        layers: What ``probe_layers`` read off its attention.
        task: What it is exported for.
        max_positions: Longest sequence; None: what the position scheme covers.

    Raises:
        UnsupportedArchitectureError: The config and the layers disagree, or no position limit is known.
        InputError: ``max_positions`` is more than the position scheme covers.
    """
    config = model.config
    check_layers(config, layers)
    table = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)
    if kind_of(task) == "decoder" and (head is None or head.shape[0] != table.shape[0]):
        raise UnsupportedArchitectureError(
            "The language model head has another number of tokens than the embedding",
            where=f"model_type {config.model_type}",
            remedy="Resize both to one vocabulary: model.resize_token_embeddings(...)",
        )
    return ArchSpec(
        family=str(config.model_type),
        architecture=type(model).__name__,
        kind=kind_of(task),
        task=task,
        hidden_size=int(config.hidden_size),
        vocab_size=int(table.shape[0]),
        max_positions=_limit_positions(model, max_positions),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tied_embeddings=head is table,
        layers=tuple(layers),
    )


def _limit_positions(model: PreTrainedModel, wanted: int | None) -> int:
    covered, learned = _covered_positions(model)
    where = f"model_type {model.config.model_type}"
    if wanted is None:
        if covered is None:
            raise UnsupportedArchitectureError(
                "The config names no longest sequence", where=where, remedy="Pass max_positions"
            )
        return covered
    if covered is not None and wanted > covered:
        kind = "learned position table" if learned else "config"
        what = f"max_positions {wanted} is more than the {covered} that the model's {kind} covers"
        raise InputError(what, where="max_positions", remedy=f"Pass at most {covered}")
    return wanted


def _covered_positions(model: Any) -> tuple[int | None, bool]:
    """The longest sequence, and whether a learned table sets it.

    A table with a padding index (roberta, mpnet) starts to count behind that index.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _POSITION_TABLES and hasattr(module, "num_embeddings"):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings) - offset, True
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return None, False
    switch = min(_switch_points(getattr(model.config, "rope_parameters", None) or {}), default=int(limit))
    if switch < limit:
        _log.warning("The rotary scheme changes beyond %d tokens: the bundle is limited to them", switch)
    return min(int(limit), switch), False


def _switch_points(rope: dict[str, Any]) -> Iterator[int]:
    """Lengths beyond which a rotary scheme changes its frequencies, which one table cannot follow."""
    for part in rope.values():
        if isinstance(part, dict):  # one scheme per layer type
            yield from _switch_points(part)
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original:
        yield int(original)


__all__ = ["read_arch"]
