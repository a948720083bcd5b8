"""The last fallback: transformers' own model in eager mode, its parameters mapped from the bundle's weight file."""

from __future__ import annotations

import importlib.util
import inspect
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from accel.engines.kv_cache import CacheShape, resolve_cache
from accel.engines.lifetime import Lifetime
from accel.engines.session import DecoderSession, EncoderSession, EngineInfo, SessionOptions, StepInputs
from accel.errors import BundleError, DependencyError, EngineError, InputError
from accel.machine import available_cores
from accel.spec import OUTPUT_NAMES

if TYPE_CHECKING:
    from accel.bundle import Bundle

NAME = "torch"
INSTALL = 'pip install "accelrt[export]"'
_build_lock = threading.Lock()  # building patches torch.nn.Module for its duration


def probe(bundle: Bundle, variant: str) -> str | None:
    """Why the reference cannot run this bundle here; None when it can."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed. Install it: {INSTALL}"
    manifest = bundle.manifest
    if not manifest.parameters or not bundle.has("config.json"):
        return "the bundle does not say where the PyTorch parameters lie"
    if variant not in ("auto", _parameter_variant(bundle)):
        return f"it runs the variant that holds the PyTorch parameters, not {variant!r}"
    return None


def open_reference(bundle: Bundle, variant: str, options: SessionOptions) -> EncoderSession | DecoderSession:
    """Builds the model over mapped weights.

    Raises:
        DependencyError: torch or transformers cannot be imported, or does not know the architecture.
        BundleError: The parameters do not fit the model.
    """
    model, info = build_model(bundle, options.threads or available_cores())
    arch = bundle.manifest.arch
    if arch.kind == "encoder":
        return TorchEncoderSession(model, info, OUTPUT_NAMES[arch.task])
    return TorchDecoderSession(model, info, arch.vocab_size, resolve_cache(arch, options))


def build_model(bundle: Bundle, threads: int) -> tuple[Any, EngineInfo]:
    """The transformers model in eval mode, eager attention, fp32 or whatever the parameters are."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DependencyError(f"The PyTorch reference cannot be imported: {error}", remedy=INSTALL) from error
    arch = bundle.manifest.arch
    cls = _model_class(transformers, arch.architecture)
    config = transformers.AutoConfig.for_model(**bundle.read_json("config.json"))
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    has_pooler = any(name.startswith("pooler.") for name in bundle.manifest.parameters)
    if not has_pooler and "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        options["add_pooling_layer"] = False  # a checkpoint without one was exported without one
    with _build_lock, _parameters_on_meta(torch):
        model = cls._from_config(config, **options)
    _assign_parameters(torch, model, bundle)
    torch.set_num_threads(threads)
    return model.eval(), EngineInfo(NAME, torch.__version__, "cpu", _parameter_variant(bundle), threads)


def _model_class(transformers: Any, name: str) -> Any:
    """The class of this name; the manifest may name nothing else of transformers."""
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    what = f"transformers {transformers.__version__} has no model {name!r}"
    raise DependencyError(what, remedy="Upgrade it: pip install --upgrade transformers")


@contextmanager
def _parameters_on_meta(torch: Any) -> Iterator[None]:
    """Parameters take no memory, but buffers are really computed: rotary tables are in no weight file.

    ``torch.device("meta")`` would leave those tables without values.
    """
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def _parameter_variant(bundle: Bundle) -> str:
    """The variant whose weight files hold the PyTorch parameters."""
    files = {entry.file for entry in bundle.manifest.parameters.values()}
    for name, variant in bundle.manifest.variants.items():
        if files <= set(variant.weights):
            return name
    return "fp32"


def _assign_parameters(torch: Any, model: Any, bundle: Bundle) -> None:
    manifest = bundle.manifest
    maps = {name: _map_file(bundle, name) for name in {entry.file for entry in manifest.parameters.values()}}
    loaded: dict[str, Any] = {}
    for name, entry in manifest.parameters.items():
        dtype, count = getattr(torch, entry.dtype), int(np.prod(entry.shape, dtype=np.int64))
        view = torch.frombuffer(maps[entry.file], dtype=dtype, count=count, offset=entry.offset)
        loaded[name] = torch.nn.Parameter(view.reshape(entry.shape), requires_grad=False)
    for name, target in manifest.tied.items():
        loaded[name] = loaded[target]
    buffers = dict(model.named_buffers())
    for name, expected in [*model.named_parameters(remove_duplicate=False)]:
        if name not in loaded:
            raise BundleError(
                f"The bundle lacks the parameter {name}", where=str(bundle.path), remedy="Export it again"
            )
        if loaded[name].shape != expected.shape:
            what = f"{name} has shape {tuple(loaded[name].shape)}, but the config makes it {tuple(expected.shape)}"
            raise BundleError(what, where=str(bundle.path), remedy="Export it again")
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = loaded[name]
    for name in buffers.keys() & loaded.keys():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = loaded[name].data


def _map_file(bundle: Bundle, name: str) -> mmap.mmap:
    with bundle.file(name).open("rb") as stream:  # a private mapping: torch wants writable memory, the file stays
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


class TorchEncoderSession:
    """Implements ``EncoderSession`` with the PyTorch model. One run at a time."""

    def __init__(self, model: Any, info: EngineInfo, outputs: tuple[str, ...]) -> None:
        self.info, self._model, self._outputs = info, model, outputs
        self._lock, self._lifetime = threading.Lock(), Lifetime("encoder")
        taken = inspect.signature(type(model).forward).parameters
        self._inputs = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in taken]

    def run(self, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        """See ``EncoderSession.run``."""
        import torch

        self._lifetime.check()
        unknown = sorted(set(feeds) - set(self._inputs))
        if unknown:
            remedy = f"It takes {', '.join(self._inputs)}"
            raise InputError(f"this model takes no {unknown[0]}", where=unknown[0], remedy=remedy)
        tensors = {name: torch.from_numpy(np.array(array, dtype=np.int64)) for name, array in feeds.items()}
        try:
            with self._lock, torch.inference_mode():
                output = self._model(**tensors)
                return {name: getattr(output, name).float().numpy() for name in self._outputs}
        except (RuntimeError, IndexError) as error:
            raise EngineError(f"PyTorch failed: {error}", where="encoder batch") from error

    def run_many(self, batches: Sequence[dict[str, NDArray]]) -> list[dict[str, NDArray]]:
        """Runs independent batches one after another."""
        return [self.run(feeds) for feeds in batches]

    def close(self) -> None:
        """Frees the model."""
        self._lifetime.close()
        self._model = None


class TorchDecoderSession:
    """Implements ``DecoderSession`` with the PyTorch model, row by row, each with a DynamicCache of its own."""

    mixed_steps = True

    def __init__(self, model: Any, info: EngineInfo, vocab_size: int, shape: CacheShape) -> None:
        self.info, self._model, self.vocab_size = info, model, vocab_size
        self.max_batch, self.capacity = shape.rows, shape.capacity
        self._caches: list[Any] = [None] * shape.rows
        self._lifetime = Lifetime("decoder")

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See ``DecoderSession.step``."""
        self._lifetime.check()
        logits = np.empty((len(inputs.logits_positions), self.vocab_size), np.float32)
        start = 0
        for row, count in enumerate(inputs.query_lengths.tolist()):
            if count:
                chosen = np.flatnonzero((inputs.logits_positions >= start) & (inputs.logits_positions < start + count))
                part = self._run_row(row, slice(start, start + count), inputs, inputs.logits_positions[chosen] - start)
                logits[chosen] = part
                start += count
        return logits

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See ``DecoderSession.copy_row``."""
        self._lifetime.check()
        self._caches[target] = self._cut(self._caches[source], length)

    def close(self) -> None:
        """Frees the model and the caches."""
        self._lifetime.close()
        self._model, self._caches = None, []

    def _run_row(self, row: int, part: slice, inputs: StepInputs, wanted: NDArray[np.int64]) -> NDArray[np.float32]:
        import torch

        past = int(inputs.past_lengths[row])
        if past == 0:
            self._caches[row] = self._new_cache()
        elif self._caches[row].get_seq_length() > past:  # a step that failed half way is being repeated
            self._caches[row] = self._cut(self._caches[row], past)
        cache = self._caches[row]
        try:
            with torch.inference_mode():
                output = self._model(
                    input_ids=torch.from_numpy(inputs.input_ids[part].copy())[None],
                    position_ids=torch.from_numpy(inputs.position_ids[part].copy())[None],
                    past_key_values=cache,
                    use_cache=True,
                    # none wanted: one is computed, as an index tensor may not be empty everywhere
                    logits_to_keep=torch.from_numpy(wanted.copy()) if len(wanted) else 1,
                )
                return output.logits[0].float().numpy()[: len(wanted)]
        except (RuntimeError, IndexError) as error:
            raise EngineError(f"PyTorch failed: {error}", where=f"cache row {row}") from error

    def _cut(self, cache: Any, length: int) -> Any:
        """A copy of a cache's first positions (``crop`` counts differently from release to release)."""
        copy = self._new_cache()
        for index, layer in enumerate(cache.layers):
            copy.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
        return copy

    @staticmethod
    def _new_cache() -> Any:
        from transformers import DynamicCache

        return DynamicCache()  # without the config: windowed layers keep all tokens too, so rows can be cut and copied


__all__ = ["TorchDecoderSession", "TorchEncoderSession", "build_model", "open_reference", "probe"]
