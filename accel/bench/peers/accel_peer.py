"""accel itself, through its public interface: fp32 and its quantised variants."""

from __future__ import annotations

import shutil
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from accel.bench.peers.base import BindForward, EmbedTexts, Feeds, Forward, Generate, Peer, transformers_generate


class AccelPeer(Peer):
    """``accel.export`` and ``accel.load``; the loaded model is called as a user calls it, wrapper included."""

    name = "accel"
    label = "accel"
    packages = ("accelrt", "onnxruntime")
    ours = True
    variant: ClassVar[str] = "auto"
    target: ClassVar[str] = "ort-cpu"  # what the variant is lowered for
    engine: ClassVar[str] = "auto"
    choices: ClassVar[dict[str, Any]] = {}  # of accel.add_variant

    def export(self) -> None:
        import accel
        from accel.variant_targets import find_target

        find_target(self.target)  # raises before the work is done
        shutil.rmtree(self.artifact, ignore_errors=True)
        accel.export(str(self.source), str(self.artifact))
        if self.variant != "auto":
            # Unchecked and unmeasured: the benchmark compares every peer's answers with PyTorch's itself, and what
            # rounding costs on text says nothing about the decoders' random weights. No algorithm makes them better.
            choices: dict[str, Any] = {"algorithm": "rtn"} if self.decodes else {}
            choices |= self.choices
            accel.add_variant(self.artifact, self.variant, target=self.target, check=False, measure=False, **choices)

    def _load(self) -> Any:
        import accel

        chosen: dict[str, Any] = {"engine": self.engine, "variant": self.variant, **self.selection}
        return accel.load(str(self.artifact), threads=self.threads, **chosen)

    def open_encoder(self) -> BindForward:
        model = self._load()

        def bind(feeds: Feeds) -> Forward:
            return lambda: next(iter(model(**feeds).values()))

        return bind

    def open_embedder(self) -> EmbedTexts:
        model = self._load()
        return lambda texts: model.embed(texts)

    def open_decoder(self) -> Generate:
        model = self._load()

        def generate(prompt: NDArray[np.int64], new_tokens: int) -> list[int]:
            result = model.generate(prompt, max_new_tokens=new_tokens, eos_token_id=[])
            return list((result[0] if isinstance(result, list) else result).ids)

        return generate


class AccelW8A8(AccelPeer):
    """int8 weights per row, activations in int8 with scales found per token."""

    name = "accel-w8a8-dyn"
    label = "accel w8a8-dyn"
    variant = "w8a8-dyn"


class AccelW8G128(AccelPeer):
    """int8 weights in groups of 128, activations in int8 with scales found per token and group."""

    name = "accel-w8g128"
    label = "accel w8g128"
    variant = "w8g128"


class AccelW4G32(AccelPeer):
    """int4 weights in groups of 32, the head's too, as the peers have it."""

    name = "accel-w4g32"
    label = "accel w4g32"
    variant = "w4g32"
    choices: ClassVar[dict[str, Any]] = {"head_bits": 4}


class AccelOpenVINOBf16(AccelPeer):
    """bf16 on the OpenVINO engine, which has kernels for it that ONNX Runtime lacks."""

    name = "accel-openvino-bf16"
    label = "accel bf16, OpenVINO engine"
    packages = ("accelrt", "openvino")
    variant = "bf16"
    target = "openvino"
    engine = "openvino"


class TorchBundlePeer(Peer):
    """Eager PyTorch on the bundle's own weights: the comparison where only a bundle is at hand (``accel bench``)."""

    name = "torch-bundle"
    label = "eager PyTorch (the bundle's weights)"
    packages = ("torch", "transformers")
    exports = False

    def _load(self) -> Any:
        import torch

        from accel.bundle import Bundle
        from accel.engines.torch_reference import build_model

        torch.set_num_threads(self.threads)
        model, _ = build_model(Bundle.open(self.artifact), self.threads)
        # The reference engine computes attention step by step, for its exactness; users of PyTorch run sdpa.
        model.set_attn_implementation("sdpa")
        return model

    def open_encoder(self) -> BindForward:
        import torch

        model = self._load()

        def bind(feeds: Feeds) -> Forward:
            tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}

            def forward() -> NDArray[np.float32]:
                with torch.inference_mode():
                    return model(**tensors)[0].numpy()

            return forward

        return bind

    def open_decoder(self) -> Generate:
        return transformers_generate(self._load())
