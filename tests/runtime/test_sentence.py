"""sentence-transformers' own files, in its old and new spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accel.errors import BundleError, InputError
from accel.runtime.sentence import SentenceConfig
from tests.runtime.encoder_samples import write_bundle

POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}


def read(path: Path, **files: Any) -> SentenceConfig:
    return SentenceConfig.from_bundle(write_bundle(path / "b", sentence=False, **files))


def test_the_real_model(tmp_path: Path) -> None:
    config = SentenceConfig.from_bundle(write_bundle(tmp_path / "b"))
    assert config == SentenceConfig(pooling=("mean",), normalize=True, max_length=256)


def test_without_any_file(tmp_path: Path) -> None:
    assert read(tmp_path) == SentenceConfig(pooling=("mean",), normalize=True, max_length=None)


def test_modules_without_normalize(tmp_path: Path) -> None:
    pooling = {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True, "include_prompt": False}
    config = read(tmp_path, modules=[POOLING], **{"1_Pooling__config": pooling})
    assert not config.normalize
    assert config.pooling == ("cls", "max")  # sentence-transformers' order, not the file's
    assert not config.include_prompt


@pytest.mark.parametrize("mode, modes", [("lasttoken", ("lasttoken",)), (["max", "cls"], ("max", "cls"))])
def test_new_spelling_of_the_modes(tmp_path: Path, mode: Any, modes: tuple[str, ...]) -> None:
    config = read(tmp_path, modules=[POOLING], **{"1_Pooling__config": {"pooling_mode": mode}})
    assert config.pooling == modes


def test_other_modules_are_noted(tmp_path: Path) -> None:
    dense = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    dropout = {"type": "sentence_transformers.models.Dropout", "path": ""}
    config = read(tmp_path, modules=[POOLING, dense, dropout], **{"1_Pooling__config": {}})
    assert config.unsupported == ("sentence_transformers.models.Dense",)


def test_prompts(tmp_path: Path) -> None:
    model = {"prompts": {"query": "query: ", "none": None}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    config = read(tmp_path, config_sentence_transformers=model)
    assert config.similarity == "dot"
    assert config.resolve_prompt(None, None) == "query: "
    assert config.resolve_prompt("other: ", None) == "other: "
    assert config.resolve_prompt("", None) == ""
    with pytest.raises(InputError, match="'passage'.*query"):
        config.resolve_prompt(None, "passage")
    with pytest.raises(InputError, match="Both"):
        config.resolve_prompt("a", "query")


def test_activation_is_read_from_each_place_in_order(tmp_path: Path) -> None:
    torch_path = "torch.nn.modules.linear.Identity"
    nested = {"sentence_transformers": {"activation_fn": torch_path}}
    assert read(tmp_path / "1", config=nested).activation == "identity"
    old = {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}
    assert read(tmp_path / "2", config=old).activation == "sigmoid"
    assert read(tmp_path / "3", config_sentence_transformers={"activation_fn": torch_path}).activation == "identity"
    assert read(tmp_path / "4").activation is None
    with pytest.raises(BundleError, match=r"my\.module\.Act"):
        read(tmp_path / "5", config={"sbert_ce_default_activation_function": "my.module.Act"})


@pytest.mark.parametrize(
    "files, message",
    [
        ({"modules": {"type": "x"}}, "list of modules"),
        ({"modules": [POOLING], "1_Pooling__config": {"pooling_mode": "average"}}, "'average'"),
        ({"modules": [POOLING], "1_Pooling__config": [1]}, "not a JSON object"),
        ({"modules": [POOLING]}, "1_Pooling/config.json"),
        ({"sentence_bert_config": {"max_seq_length": -1}}, "max_seq_length is -1"),
        ({"config_sentence_transformers": {"similarity_fn_name": "hamming"}}, "'hamming'"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read(tmp_path, **files)
