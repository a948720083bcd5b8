"""What the caller gave -> a PyTorch model in eval mode, fp32, on the CPU, every weight from the checkpoint."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import CheckpointError, DependencyError, InputError, UnsupportedArchitectureError
from accel.exporter.checkpoint import check_finite, check_folder, check_weight_file, read_json
from accel.exporter.families import (
    AUTO_CLASSES,
    check_causality,
    check_config,
    infer_task,
    nearest_family,
)
from accel.spec import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_log = logging.getLogger("accel")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".py")
_LISTED = 5  # names shown in an error before "and N more"


@dataclass(frozen=True)
class Source:
    """Where a model comes from, before its weights are read.

    Attributes:
        label: What the manifest records: a folder's or file's name, a hub id, a class name.
        config: The model's config.
        folder: Where config, tokenizer and weights lie; None for a loaded model.
        root: The folder given: ``folder``, or a sentence-transformers folder that holds it.
        gguf: The GGUF file's name inside ``folder``.
        module: The loaded model that the caller gave.
        trust_remote_code: Whether the checkpoint's own Python code may run.
    """

    label: str
    config: PretrainedConfig
    folder: Path | None = None
    root: Path | None = None
    gguf: str | None = None
    module: PreTrainedModel | None = None
    trust_remote_code: bool = False

    @property
    def task(self) -> Task:
        """The task that the architecture's name says."""
        if self.root is not None and (self.root / "modules.json").is_file():
            return "feature-extraction"
        if self.gguf is not None:
            return "text-generation"
        names = [type(self.module).__name__] if self.module is not None else self.config.architectures
        return infer_task(names[0] if names else None)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments that every ``from_pretrained`` of this source needs."""
        gguf = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"trust_remote_code": self.trust_remote_code, **gguf}


@dataclass
class LoadedModel:
    """The model to trace, and what was noted while it was loaded."""

    model: PreTrainedModel
    notes: tuple[str, ...] = ()
    _training: dict[str, bool] = field(default_factory=dict)

    def release(self) -> None:
        """Gives a caller's model its training flags back and forgets the model."""
        for name, flag in self._training.items():
            self.model.get_submodule(name).training = flag
        self._training = {}
        del self.model


def resolve_source(model: str | Path | PreTrainedModel, trust_remote_code: bool = False) -> Source:
    """Finds out what ``model`` is and reads its config; no weight is read.

    Args:
        model: A local folder, a GGUF file, a hub id, or a loaded ``PreTrainedModel``.
        trust_remote_code: Whether Python code that the checkpoint brings may run.

    Raises:
        InputError: It is none of these.
        CheckpointError: Files are missing, truncated or corrupt.
        UnsupportedArchitectureError: transformers does not know the architecture.
        DependencyError: ``gguf`` or ``accelerate`` is needed and missing.
    """
    if not isinstance(model, (str, Path)):
        return _from_module(model)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path, trust_remote_code)
    if path.exists() or not _is_hub_id(model):
        return _from_folder(path, path.name or str(path), trust_remote_code)
    return _from_folder(_download(str(model), trust_remote_code), str(model), trust_remote_code)


def load_model(source: Source, task: Task) -> LoadedModel:
    """Builds the model with every weight from the checkpoint.

    Safetensors in fp32 are mapped, not copied. A loaded model is used as it is when it is fp32
    on the CPU, else copied; ``LoadedModel.release`` gives its training flags back.

    Raises:
        CheckpointError: Weights are missing or not finite, or their shapes disagree with the config.
        UnsupportedArchitectureError: see ``families``.
    """
    check_config(source.config, task)
    loaded = _adopt(source.module, task) if source.module is not None else _read(source, task)
    try:
        check_causality(loaded.model, task)
        check_finite(loaded.model, str(source.folder or source.label))
        loaded.model.eval()
    except BaseException:
        loaded.release()
        raise
    return loaded


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' progress bars and reports stay silent; errors are raised, and ours say more."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


def _from_module(model: Any) -> Source:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"A {type(model).__name__} cannot be exported",
            where="model",
            remedy="Give a model folder, a .gguf file, a hub id, or a transformers PreTrainedModel",
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise CheckpointError("The model has no weights: its parameters are on the meta device", where="model")
    return Source(label=type(model).__name__, config=model.config, module=model)


def _from_gguf(path: Path, trust_remote_code: bool) -> Source:
    from importlib.util import find_spec

    check_weight_file(path)
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]  # transformers needs both
    if missing:
        what = f"Reading a GGUF file needs the package {' and '.join(missing)}"
        raise DependencyError(what, remedy=f"Install it: pip install {' '.join(missing)}")
    options = {"gguf_file": path.name, "trust_remote_code": trust_remote_code}
    try:
        config = _read_config(path.parent, options)
    except (UnsupportedArchitectureError, CheckpointError):
        raise
    except Exception as error:  # gguf's reader raises whatever the broken bytes lead it to
        remedy = "Copy or download the file again"
        raise CheckpointError(f"The GGUF file cannot be read: {error}", where=str(path), remedy=remedy) from error
    return Source(
        label=path.name, config=config, folder=path.parent, root=None, gguf=path.name,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _from_folder(root: Path, label: str, trust_remote_code: bool) -> Source:
    folder = root
    if (root / "modules.json").is_file():
        folder = root / _transformer_path(root / "modules.json")
    check_folder(folder)
    config = _read_config(folder, {"trust_remote_code": trust_remote_code})
    return Source(label=label, config=config, folder=folder, root=root, trust_remote_code=trust_remote_code)


def _transformer_path(path: Path) -> str:
    """Where a sentence-transformers folder keeps its transformer; older ones use a subfolder."""
    import json

    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [(str(module["type"]).rsplit(".", 1)[-1], str(module.get("path", ""))) for module in modules]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = "modules.json is not a list of modules"
        raise CheckpointError(what, where=str(path), remedy="Copy it again") from error
    if not kinds or kinds[0][0] != "Transformer":
        first = kinds[0][0] if kinds else "nothing"
        raise UnsupportedArchitectureError(
            f"The sentence-transformers model starts with {first}, not with a Transformer",
            where=str(path),
            remedy="Export a model whose first module is a Transformer, such as all-MiniLM-L6-v2",
        )
    if Path(kinds[0][1]).is_absolute() or ".." in Path(kinds[0][1]).parts:
        raise CheckpointError(f"modules.json leads out of its folder: {kinds[0][1]!r}", where=str(path))
    return kinds[0][1]


def _is_hub_id(model: str | Path) -> bool:
    return isinstance(model, str) and model.count("/") == 1 and _HUB_ID.fullmatch(model) is not None


def _download(name: str, trust_remote_code: bool) -> Path:
    """Fetches a hub model's root files (one weight format) and its sentence-transformers module folders."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        try:
            files = HfApi().list_repo_files(name)
        except (OfflineModeIsEnabled, OSError, LocalEntryNotFoundError) as error:
            if isinstance(error, HfHubHTTPError):
                raise
            return Path(snapshot_download(name, local_files_only=True))  # what an earlier download left in the cache
        return Path(snapshot_download(name, allow_patterns=_wanted(files, trust_remote_code)))
    except Exception as error:  # the hub client raises its own errors, httpx's and OSError
        raise CheckpointError(
            f"The model cannot be fetched from the hub: {type(error).__name__}: {error}".split("\n")[0],
            where=name,
            remedy="Check the id and the network; for a local folder, check its path",
        ) from error


def _wanted(files: list[str], trust_remote_code: bool) -> list[str]:
    suffixes = _HUB_FILES if trust_remote_code else _HUB_FILES[:-1]
    top = [name for name in files if "/" not in name and not name.startswith("consolidated")]
    root = [name for name in top if name.endswith(suffixes)]
    if not any(name.endswith(".safetensors") for name in root):
        root += [name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")]
    if "modules.json" in files:
        root += [name for name in files if re.match(r"\d+_\w+/[^/]+$", name)]
    return root


def _read_config(folder: Path, options: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, **options)
    except (ValueError, KeyError, ImportError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise UnsupportedArchitectureError(
                "The checkpoint brings its own Python code, which is not run unasked",
                where=str(folder),
                remedy="Read that code; if you trust it, pass trust_remote_code=True",
            ) from error
        name = str(read_json(folder / "config.json").get("model_type", "")) if "gguf_file" not in options else text
        what = f"transformers cannot build this architecture: {text.splitlines()[0]}"
        remedy = f"The nearest supported family is {nearest_family(name)}; or upgrade transformers"
        raise UnsupportedArchitectureError(what, where=f"model_type {name!r}", remedy=remedy) from error
    except (OSError, TypeError) as error:
        raise CheckpointError(f"The config cannot be read: {error}", where=str(folder)) from error


def _adopt(module: PreTrainedModel, task: Task) -> LoadedModel:
    import torch

    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in module.parameters()):
        copied = copy.deepcopy(module).to(device="cpu", dtype=torch.float32)
        return LoadedModel(copied)
    return LoadedModel(module, _training={name: part.training for name, part in module.named_modules()})


def _read(source: Source, task: Task) -> LoadedModel:
    """``from_pretrained``, held to its own report; the pooler is left out when the checkpoint has none."""
    model, report = _from_pretrained(source, task, {})
    missing = report["missing_keys"]
    optional = (
        task == "feature-extraction" and "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    )
    if optional and missing and all(name.startswith("pooler.") for name in missing):
        model, report = _from_pretrained(source, task, {"add_pooling_layer": False})
    _check_report(report, source, task)
    unexpected = sorted(report["unexpected_keys"])
    if not unexpected:
        return LoadedModel(model)
    note = f"{len(unexpected)} checkpoint tensors are not part of the model: {_list(unexpected)}"
    # Another head's weights are left behind when another task is asked for; in the model's own class each should count.
    own = type(model).__name__ in (source.config.architectures or ())
    _log.log(logging.WARNING if own else logging.INFO, "%s", note)
    return LoadedModel(model, (note,))


def _from_pretrained(source: Source, task: Task, extra: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    loader = getattr(transformers, AUTO_CLASSES[task])
    assert source.folder is not None, "a loaded model is adopted, not read"
    try:
        with quiet_transformers():
            return loader.from_pretrained(
                source.folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True,
                ignore_mismatched_sizes=True, **source.options, **extra,
            )  # fmt: skip
    except Exception as error:  # unpicklers, safetensors and converters each raise their own types
        if isinstance(error, MemoryError):
            raise
        text = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
            family = nearest_family(str(source.config.model_type))
            raise UnsupportedArchitectureError(
                f"transformers has no {AUTO_CLASSES[task]} for this model",
                where=f"model_type {source.config.model_type}",
                remedy=f"Give another task=; the nearest supported family is {family}",
            ) from error
        what = f"The weights cannot be loaded: {text}"
        remedy = "Check the files, or copy or download them again"
        raise CheckpointError(what, where=str(source.folder), remedy=remedy) from error


def _check_report(report: dict[str, Any], source: Source, task: Task) -> None:
    where = str(source.folder)
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        what = (
            f"{len(mismatched)} weights disagree with config.json: {name} has shape {list(found)}, "
            f"the config makes it {list(expected)}"
        )
        raise CheckpointError(what, where=where, remedy="Take config.json and the weights from one checkpoint")
    missing = sorted(report["missing_keys"])
    if missing:
        what = f"{len(missing)} weights are missing from the checkpoint: {_list(missing)}"
        remedy = f"They would be random. Check the files, or that task {task} is what the checkpoint was trained for"
        raise CheckpointError(what, where=where, remedy=remedy)
    if report["error_msgs"]:
        raise CheckpointError(f"The weights cannot be loaded: {report['error_msgs'][0]}", where=where)


def _list(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


__all__ = ["LoadedModel", "Source", "load_model", "quiet_transformers", "resolve_source"]
