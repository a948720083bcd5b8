"""What sentence-transformers' own files in a bundle say about embedding and ranking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from accel.bundle import Bundle
from accel.errors import BundleError, InputError
from accel.runtime.pooling import SIMILARITIES, parse_modes

# In the order in which sentence-transformers concatenates them.
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "identity", "Tanh": "tanh", "ReLU": "relu"}
_TRANSFORMER_CONFIG = "sentence_bert_config.json"
_MODEL_CONFIG = "config_sentence_transformers.json"


@dataclass(frozen=True)
class SentenceConfig:
    """How the model's authors embed with it.

    Attributes:
        pooling: Modes, concatenated in this order.
        include_prompt: Whether a prompt's tokens are pooled too.
        normalize: Whether vectors are scaled to unit length.
        max_length: Tokens per text, special tokens included; None: the model's own limit.
        lowercase: Whether texts are lowercased before the tokenizer.
        prompts: Texts put before each input, by name.
        default_prompt: The prompt's name when the caller gives none.
        similarity: ``cosine``, ``dot``, ``euclidean`` or ``manhattan``.
        activation: A cross-encoder's activation on its logits; None: not given.
        unsupported: Listed modules that are not applied here, by type; embedding is refused while there is one.
    """

    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    normalize: bool = True
    max_length: int | None = None
    lowercase: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"
    activation: str | None = None
    unsupported: tuple[str, ...] = ()

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> SentenceConfig:
        """Reads ``modules.json`` and the files that belong to it, as far as the bundle has them.

        Without ``modules.json``: mean pooling and unit length.

        Raises:
            BundleError: A file that is there is not what sentence-transformers writes.
        """
        fields: dict[str, Any] = {}
        if bundle.has("modules.json"):
            fields |= _read_modules(bundle)
        if bundle.has(_TRANSFORMER_CONFIG):
            fields |= _read_transformer(_read_object(bundle, _TRANSFORMER_CONFIG))
        model = _read_object(bundle, _MODEL_CONFIG) if bundle.has(_MODEL_CONFIG) else {}
        prompts = model.get("prompts") or {}
        fields["prompts"] = {str(name): str(text) for name, text in prompts.items() if text is not None}
        fields["default_prompt"] = model.get("default_prompt_name")
        fields["similarity"] = model.get("similarity_fn_name") or "cosine"
        if fields["similarity"] not in SIMILARITIES:
            what = f"Unknown similarity_fn_name {fields['similarity']!r}"
            raise BundleError(what, where=_MODEL_CONFIG, remedy=f"Known: {', '.join(SIMILARITIES)}")
        fields["activation"] = _read_activation(bundle, model)
        return cls(**fields)

    def resolve_prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        """The text to put before each input; empty: none.

        Raises:
            InputError: Both are given, or the name is not one of the model's prompts.
        """
        if prompt is not None and prompt_name is not None:
            raise InputError("Both prompt and prompt_name are given", where="prompt", remedy="Give one of them")
        if prompt is not None:
            return prompt
        name = prompt_name if prompt_name is not None else self.default_prompt
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none; pass the text itself as prompt="
            raise InputError(f"The model has no prompt named {name!r}", where="prompt_name", remedy=f"It has: {known}")
        return self.prompts[name]


def _read_object(bundle: Bundle, name: str) -> dict[str, Any]:
    data = bundle.read_json(name)
    if not isinstance(data, dict):
        raise BundleError("The file is not a JSON object", where=name, remedy="Export the model again")
    return data


def _read_modules(bundle: Bundle) -> dict[str, Any]:
    modules = bundle.read_json("modules.json")
    if not isinstance(modules, list) or not all(isinstance(m, dict) and "type" in m for m in modules):
        raise BundleError("modules.json is not a list of modules", where="modules.json", remedy="Export again")
    fields: dict[str, Any] = {"normalize": False}
    unsupported = []
    for module in modules:
        kind = str(module["type"]).rsplit(".", 1)[-1]
        if kind == "Pooling":
            fields |= _read_pooling(bundle, f"{module.get('path') or '1_Pooling'}/config.json")
        elif kind == "Normalize":
            fields["normalize"] = True
        elif kind not in ("Transformer", "Dropout"):  # dropout does nothing at inference
            unsupported.append(str(module["type"]))
    return fields | {"unsupported": tuple(unsupported)}


def _read_pooling(bundle: Bundle, name: str) -> dict[str, Any]:
    config = _read_object(bundle, name)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _LEGACY_MODES.items() if config.get(key)] or ["mean"]
    try:
        pooling = parse_modes(modes, where=name)
    except InputError as error:
        raise BundleError(error.what, where=name, remedy=error.remedy) from error
    return {"pooling": pooling, "include_prompt": bool(config.get("include_prompt", True))}


def _read_transformer(config: dict[str, Any]) -> dict[str, Any]:
    processor = config.get("processor_kwargs") or config.get("tokenizer_args") or {}
    limit = config.get("max_seq_length") or processor.get("model_max_length")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise BundleError(f"max_seq_length is {limit!r}", where=_TRANSFORMER_CONFIG, remedy="Export the model again")
    return {"max_length": limit, "lowercase": bool(config.get("do_lower_case", False))}


def _read_activation(bundle: Bundle, model: dict[str, Any]) -> str | None:
    """sentence-transformers' order: the model config's new key, its old key, then its own file."""
    config = _read_object(bundle, "config.json") if bundle.has("config.json") else {}
    nested = config.get("sentence_transformers") or {}
    path = nested.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    path = path or model.get("activation_fn")
    if path is None:
        return None
    name = str(path).rsplit(".", 1)[-1]
    if not str(path).startswith("torch.") or name not in _ACTIVATIONS:
        what = f"The cross-encoder's activation function {path!r} is not known"
        remedy = f"Known are torch's {', '.join(_ACTIVATIONS)}; call the encoder with ids for its logits"
        raise BundleError(what, where="config.json", remedy=remedy)
    return _ACTIVATIONS[name]


__all__ = ["SentenceConfig"]
