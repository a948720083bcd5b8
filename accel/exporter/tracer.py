"""PyTorch model -> canonical graph: one trace with dynamic shapes, attention already one node per layer."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim
from transformers import PreTrainedModel

from accel.errors import ExportError, UnsupportedArchitectureError
from accel.exporter.attention import PROBE, TRACE, AttentionContext, StepTensors, attention_context
from accel.exporter.cache import PassThroughCache
from accel.exporter.patches import fixed_rotary_frequencies, mpnet_attention_by_name
from accel.spec import OUTPUT_NAMES, AttentionSpec, Kind, Task

OPSET = 23  # RMSNormalization and RotaryEmbedding need 23; torch 2.11 to 2.13 write at most 23


class PackedDecoder(torch.nn.Module):
    """A causal LM over packed tokens: rows stand one after another, without padding."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past_lengths: torch.Tensor,
        query_lengths: torch.Tensor,
        logits_positions: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """input_ids, position_ids int64 [T]; lengths int32 [B]; logits_positions int64 [R] -> logits [R, V]."""
        step = StepTensors(past=past, past_lengths=past_lengths, query_lengths=query_lengths)
        context = AttentionContext(causal=True, step=step)
        with attention_context(self.model, TRACE, context):
            output = self.model(
                input_ids=input_ids.unsqueeze(0),
                position_ids=position_ids.unsqueeze(0),
                past_key_values=PassThroughCache(),
                use_cache=True,
                logits_to_keep=logits_positions,
            )
        return output.logits.squeeze(0), context.present


class MaskedEncoder(torch.nn.Module):
    """A bidirectional encoder with whatever head its task has."""

    def __init__(self, model: PreTrainedModel, outputs: tuple[str, ...], token_types: bool) -> None:
        super().__init__()
        self.model, self.outputs, self.token_types = model, outputs, token_types

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """All inputs int64 [B, S]."""
        extra = {"token_type_ids": token_type_ids} if self.token_types else {}
        context = AttentionContext(causal=False, attention_mask=attention_mask)
        with attention_context(self.model, TRACE, context), mpnet_attention_by_name(self.model):
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, **extra)
        return tuple(getattr(output, name) for name in self.outputs)


def probe_layers(model: PreTrainedModel, kind: Kind) -> list[AttentionSpec]:
    """Runs two tokens eagerly and reads every attention layer's spec off its tensors, in call order."""
    ids = torch.ones((1, 2), dtype=torch.long)
    context = AttentionContext(causal=kind == "decoder")
    arguments: dict[str, Any] = {"input_ids": ids}
    if kind == "decoder":
        arguments |= {"past_key_values": PassThroughCache(), "use_cache": True, "position_ids": torch.arange(2)[None]}
    else:
        arguments["attention_mask"] = torch.ones_like(ids)
    with torch.inference_mode(), attention_context(model, PROBE, context), mpnet_attention_by_name(model):
        model(**arguments)
    if not context.layers:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} computes its attention past transformers' attention registry",
            where=model.config.model_type,
            remedy="Only models that dispatch through ALL_ATTENTION_FUNCTIONS can be exported; bert is the nearest "
            "encoder, llama the nearest decoder",
        )
    return context.layers


def trace_decoder(model: PreTrainedModel, layers: list[AttentionSpec]) -> ir.Model:
    """Traces a causal LM into one graph for prefill, chunked prefill and decode.

    Inputs input_ids, position_ids int64 [T]; past_lengths, query_lengths int32 [B];
    logits_positions int64 [R]; past.{i}.key/value [B, kv_heads, C, head_dim].
    Outputs logits [R, V]; present.{i}.key/value.
    """
    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}.forward takes no logits_to_keep", where=model.config.model_type
        )
    dtype = next(model.parameters()).dtype
    batch, tokens, capacity = 2, 7, 16
    cache = [(batch, layer.kv_heads, capacity, layer.head_dim) for layer in layers]
    # Key and value must be distinct tensors: one tensor given twice would be traced as one input.
    past = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for shape in cache]
    example = {
        "input_ids": torch.ones(tokens, dtype=torch.long),
        "position_ids": torch.arange(tokens),
        "past_lengths": torch.zeros(batch, dtype=torch.int32),
        "query_lengths": torch.tensor([4, 3], dtype=torch.int32),
        "logits_positions": torch.tensor([1, 3, 6]),
        "past": past,
    }
    t, b, c, r = (Dim(name, min=1) for name in ("T", "B", "C", "R"))
    row = {0: b, 2: c}
    shapes = {
        "input_ids": {0: t},
        "position_ids": {0: t},
        "past_lengths": {0: b},
        "query_lengths": {0: b},
        "logits_positions": {0: r},
        "past": [(row, row)] * len(layers),
    }
    names = [f"{{}}.{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]
    return _export(
        PackedDecoder(model),
        example,
        shapes,
        inputs=[*list(example)[:-1], *(name.format("past") for name in names)],
        outputs=["logits", *(name.format("present") for name in names)],
    )


def trace_encoder(model: PreTrainedModel, task: Task) -> ir.Model:
    """Traces an encoder. Inputs input_ids, attention_mask (, token_type_ids) int64 [B, S]."""
    token_types = takes_token_types(model)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if token_types else [])]
    example = {name: torch.ones((2, 7), dtype=torch.long) for name in names}
    if token_types:
        example["token_type_ids"] = torch.zeros((2, 7), dtype=torch.long)
    rows, columns = Dim("B", min=1), Dim("S", min=1)
    shapes = {name: {0: rows, 1: columns} for name in names}
    outputs = OUTPUT_NAMES[task]
    return _export(MaskedEncoder(model, outputs, token_types), example, shapes, inputs=names, outputs=list(outputs))


def takes_token_types(model: PreTrainedModel) -> bool:
    """Whether segment ids change this model's output: an argument alone does not make an input."""
    if "token_type_ids" not in inspect.signature(type(model).forward).parameters:
        return False
    return getattr(model.config, "type_vocab_size", 0) > 1


def _export(
    module: PackedDecoder | MaskedEncoder,
    example: dict[str, Any],
    shapes: dict[str, Any],
    inputs: list[str],
    outputs: list[str],
) -> ir.Model:
    try:
        with torch.no_grad(), _quiet(), fixed_rotary_frequencies(module.model):
            program = torch.onnx.export(
                module.eval(),
                kwargs=example,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # torch.onnx raises many types; the innermost cause is what helps
        if isinstance(error, ExportError):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ExportError):
            raise cause from error
        raise ExportError(f"tracing failed: {type(cause).__name__}: {cause}", where=type(module).__name__) from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns about its own internals on every export; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "torch.fx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
