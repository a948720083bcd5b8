"""Copies what stands beside the weights: config, generation config, tokenizer, sentence-transformers' files."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import CheckpointError, InputError
from accel.exporter.source import Source, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("accel")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Any of these means that the folder has a tokenizer which transformers can convert.
_SLOW_FILES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def copy_files(source: Source, model: PreTrainedModel, tokenizer: Any, out: Path) -> tuple[str, ...]:
    """Writes the bundle's configuration and tokenizer files into ``out``.

    Args:
        source: Where the model comes from.
        model: The loaded model; only read.
        tokenizer: A tokenizer, or a folder with one, that replaces the source's; None: the source's.
        out: The bundle's folder.

    Returns:
        Notes on what the source does not have.

    Raises:
        CheckpointError: The tokenizer cannot be read or converted.
        InputError: ``tokenizer`` is neither a tokenizer nor a folder.
        OSError: Writing failed.
    """
    _write_config(model, out)
    _write_generation_config(source, model, out)
    notes = _write_tokenizer(source, tokenizer, out)
    if source.root is not None and (source.root / "modules.json").is_file():
        _copy_sentence_files(source.root, source.folder or source.root, out)
    return notes


def _write_config(model: PreTrainedModel, out: Path) -> None:
    """The config as loaded, so that every source (GGUF and objects too) gives the same kind of file."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    (out / "config.json").write_text(config.to_json_string(), encoding="utf-8")


def _write_generation_config(source: Source, model: PreTrainedModel, out: Path) -> None:
    given = source.folder / "generation_config.json" if source.folder is not None and source.gguf is None else None
    if given is not None and given.is_file():
        shutil.copyfile(given, out / given.name)
        return
    config = getattr(model, "generation_config", None)
    if config is not None and model.can_generate():
        (out / "generation_config.json").write_text(config.to_json_string(), encoding="utf-8")


def _write_tokenizer(source: Source, tokenizer: Any, out: Path) -> tuple[str, ...]:
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        if not hasattr(tokenizer, "save_pretrained"):
            what = f"A {type(tokenizer).__name__} is no tokenizer"
            raise InputError(what, where="tokenizer", remedy="Give a transformers tokenizer or a folder with one")
        return _save(tokenizer, out)
    folder = source.folder if tokenizer is None else Path(tokenizer).expanduser()
    if tokenizer is not None and (folder is None or not folder.is_dir()):
        raise InputError("There is no tokenizer folder", where=str(folder), remedy="Check the path")
    if folder is None:
        return _without("a loaded model brings none")
    gguf = source.gguf is not None and tokenizer is None
    if not gguf and (folder / "tokenizer.json").is_file():
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
        return ()
    if not gguf and not any((folder / name).is_file() for name in _SLOW_FILES):
        return _without("the source has none")
    return _save(_load_tokenizer(folder, source.options if gguf else {**source.options, "gguf_file": None}), out)


def _without(reason: str) -> tuple[str, ...]:
    note = f"The bundle has no tokenizer ({reason}): it takes ids, no text"
    _log.warning("%s", note)
    return (note,)


def _load_tokenizer(folder: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    options = {name: value for name, value in options.items() if value is not None}
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # converters raise whatever the vocabulary leads them to
        text = (str(error) or type(error).__name__).splitlines()[0]
        remedy = "Give a tokenizer with tokenizer= that has a tokenizer.json"
        raise CheckpointError(f"The tokenizer cannot be loaded: {text}", where=str(folder), remedy=remedy) from error


def _save(tokenizer: Any, out: Path) -> tuple[str, ...]:
    """Lets transformers convert and write the tokenizer; only what the runtime reads is kept."""
    if not getattr(tokenizer, "is_fast", False):
        what = f"{type(tokenizer).__name__} cannot be converted to a tokenizer.json"
        raise CheckpointError(what, where="tokenizer", remedy="Give a fast tokenizer with tokenizer=")
    folder = out / "tokenizer"
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            (folder / name).replace(out / name)
    shutil.rmtree(folder)
    return ()


def _copy_sentence_files(root: Path, folder: Path, out: Path) -> None:
    """sentence-transformers' own files and module folders; its transformer lies at the bundle's root."""
    for name in _SENTENCE_FILES:
        given = root / name if (root / name).is_file() else folder / name
        if given.is_file():
            shutil.copyfile(given, out / name)
    modules = json.loads((root / "modules.json").read_text(encoding="utf-8"))
    for module in modules[1:]:
        path = str(module.get("path", ""))
        if not Path(path).parts or not (root / path).is_dir():  # ".": the transformer itself, written already
            continue
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise CheckpointError(f"modules.json leads out of its folder: {path!r}", where=str(root))
        for file in sorted((root / path).iterdir()):
            if file.is_file() and file.suffix in (".json", ".safetensors"):  # no pickles in a bundle
                (out / path).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, out / path / file.name)


__all__ = ["copy_files"]
