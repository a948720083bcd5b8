"""What can be exported, as data: tasks by class name, the families that are tested, and what is refused and why."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accel.errors import InputError, UnsupportedArchitectureError
from accel.spec import AttentionSpec, Kind, Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "electra", "mpnet")
DECODERS = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo2", "smollm3", "granite",
    "starcoder2",
)  # fmt: skip
SUFFIXES: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForMaskedLM", "fill-mask"),
)
AUTO_CLASSES: dict[Task, str] = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
}
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PARTS = ("vision_config", "audio_config", "text_config")


@dataclass(frozen=True)
class Refusal:
    """Why a config cannot be exported, and what can be."""

    what: str
    remedy: str


def infer_task(architecture: str | None) -> Task:
    """The task that a model class's name says; ``feature-extraction`` for a bare model."""
    for suffix, task in SUFFIXES:
        if architecture is not None and architecture.endswith(suffix):
            return task
    return "feature-extraction"


def check_task(task: str) -> Task:
    """A task's name as a ``Task``.

    Raises:
        InputError: There is no such task.
    """
    for known in AUTO_CLASSES:
        if task == known:
            return known
    near = difflib.get_close_matches(task, AUTO_CLASSES, n=1)
    remedy = f"Did you mean '{near[0]}'" if near else f"Known: {', '.join(AUTO_CLASSES)}"
    raise InputError(f"There is no task {task!r}", where="task", remedy=remedy)


def kind_of(task: Task) -> Kind:
    """Causal language models are decoders, everything else is an encoder."""
    return "decoder" if task == "text-generation" else "encoder"


def nearest_family(name: str, kind: Kind | None = None) -> str:
    """The supported family whose name is nearest; llama or bert when none is near."""
    families = {"encoder": ENCODERS, "decoder": DECODERS, None: ENCODERS + DECODERS}[kind]
    near = difflib.get_close_matches(name, families, n=1, cutoff=0.4)
    return near[0] if near else ("llama" if kind == "decoder" else "bert")


def check_config(config: PretrainedConfig, task: Task) -> None:
    """Refuses what one attention node per layer cannot express, before any weight is read.

    Raises:
        UnsupportedArchitectureError: Names the nearest supported family and what to try.
    """
    refusal = _refuse(config, task)
    if refusal is not None:
        family = nearest_family(str(config.model_type), kind_of(task))
        remedy = f"{refusal.remedy}; the nearest supported family is {family}"
        raise UnsupportedArchitectureError(refusal.what, where=f"model_type {config.model_type}", remedy=remedy)


def _refuse(config: Any, task: Task) -> Refusal | None:
    family = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        return Refusal("Encoder-decoder models are not supported", "Export an encoder or a decoder-only model")
    if any(getattr(config, part, None) is not None for part in _PARTS):
        return Refusal(
            "Models made of several parts (vision, audio, text) are not supported",
            "Export a text-only checkpoint, or load the model yourself and pass its language model",
        )
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        return Refusal("Mixture-of-experts models are not supported", "Export a dense model")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if others:
        return Refusal(
            f"Layers of type {', '.join(others)} are not supported",
            "Export a model whose layers are full or sliding attention",
        )
    if getattr(config, "is_decoder", False) and family in ENCODERS:
        return Refusal(
            f"A {family} with is_decoder=True is not supported",
            "Set is_decoder to false, or export a decoder-only model",
        )
    if getattr(config, "quantization_config", None) is not None:
        return Refusal("The checkpoint is quantised", "Export the checkpoint it was quantised from")
    return None


def check_causality(model: PreTrainedModel, task: Task) -> None:
    """The direction of the model's attention must be the one its task is exported with.

    Raises:
        UnsupportedArchitectureError: A causal model as an encoder, or a bidirectional one as a decoder.
    """
    flags = {flag for module in model.modules() if isinstance(flag := getattr(module, "is_causal", None), bool)}
    causal = kind_of(task) == "decoder"
    if not flags or flags == {causal}:
        return
    remedy = (
        "Export it as an encoder (fill-mask, feature-extraction), or take a decoder such as llama"
        if causal
        else "Export it for text-generation, or take a bidirectional encoder such as bert"
    )
    what = f"{type(model).__name__} has {'bidirectional' if causal else 'causal'} attention, unlike task {task} here"
    raise UnsupportedArchitectureError(what, where=f"model_type {model.config.model_type}", remedy=remedy)


def check_layers(config: PretrainedConfig, layers: list[AttentionSpec]) -> None:
    """The traced layers must be those that the config promises: as many, with the windows where it says.

    A window that a model puts in its mask alone would be lost, because the tracer gives no mask.

    Raises:
        UnsupportedArchitectureError: They disagree; names the layer.
    """
    where, remedy = f"model_type {config.model_type}", f"Try {nearest_family(str(config.model_type))}"
    expected = getattr(config, "num_hidden_layers", None)
    if expected is not None and expected != len(layers):
        what = f"The config has {expected} layers, but {len(layers)} dispatch their attention through transformers"
        raise UnsupportedArchitectureError(what, where=where, remedy=remedy)
    for index, wanted in enumerate(_expected_windows(config, len(layers))):
        if wanted is not None and wanted != (layers[index].window is not None):
            promised = "a sliding window" if wanted else "no window"
            what = f"Layer {index} should have {promised}, but its attention has window {layers[index].window}"
            raise UnsupportedArchitectureError(what, where=where, remedy=remedy)


def _expected_windows(config: Any, count: int) -> list[bool | None]:
    """Per layer whether the config promises a window; None: it does not say."""
    types = getattr(config, "layer_types", None)
    if types:
        return [name == "sliding_attention" for name in types]
    uses = getattr(config, "use_sliding_window", True)
    return [True if getattr(config, "sliding_window", None) and uses else None] * count


__all__ = [
    "AUTO_CLASSES", "DECODERS", "ENCODERS", "check_causality", "check_config", "check_layers", "check_task",
    "infer_task", "kind_of", "nearest_family",
]  # fmt: skip
