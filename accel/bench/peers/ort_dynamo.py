"""Plain ONNX Runtime: ``torch.onnx.export(dynamo=True)`` of the model, with its cache, and a thin loop."""

from __future__ import annotations

from typing import Any

from accel.bench.peers.base import BindForward, Generate, Peer, fresh_folder
from accel.bench.peers.ort_common import bind_session_forward, greedy_loop, open_session


class OrtDynamo(Peer):
    """What PyTorch and ONNX Runtime give without further tools."""

    name = "ort-dynamo"
    label = "plain ONNX Runtime"
    environment = "current"
    packages = ("onnxruntime", "torch", "onnxscript", "transformers")

    def export(self) -> None:
        folder = fresh_folder(self.artifact)
        program = _export_decoder(self.source) if self.decodes else _export_encoder(self.source)
        program.save(str(folder / "model.onnx"), external_data=True)

    def open_encoder(self) -> BindForward:
        return bind_session_forward(open_session(self.artifact / "model.onnx", self.threads))

    def open_decoder(self) -> Generate:
        return greedy_loop(open_session(self.artifact / "model.onnx", self.threads))


class OrtDynamoValues(OrtDynamo):
    """The same decoder graph under a loop that keeps the cache in OrtValues: a better loop than most would write."""

    name = "ort-dynamo-values"
    label = "plain ONNX Runtime, OrtValue loop"
    export_of = "ort-dynamo"

    def open_decoder(self) -> Generate:
        return greedy_loop(open_session(self.artifact / "model.onnx", self.threads), keep_values=True)


def _export_encoder(source: Any) -> Any:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            return output.last_hidden_state

    ids = torch.randint(5, 1000, (2, 16))
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=2, max=512)}
    return torch.onnx.export(
        LastHiddenState(),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        dynamo=True,
        dynamic_shapes=(axes, axes, axes),
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["last_hidden_state"],
    )


def _export_decoder(source: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = model.config
    layers, head_dim = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    class FlatCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: list[Any]) -> tuple[Any, ...]:
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=DynamicCache([(past[2 * i], past[2 * i + 1]) for i in range(layers)]),
                use_cache=True,
            )
            present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
            return (output.logits, *present)

    tokens, past_tokens = 16, 7
    names = [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]
    dynamic = torch.export.Dim.DYNAMIC
    axes = {0: dynamic, 1: dynamic}
    return torch.onnx.export(
        FlatCache(),
        (
            torch.randint(5, 1000, (2, tokens)),
            torch.ones(2, past_tokens + tokens, dtype=torch.long),
            torch.arange(past_tokens, past_tokens + tokens)[None].expand(2, -1).contiguous(),
            [torch.randn(2, kv_heads, past_tokens, head_dim) for _ in names],
        ),
        dynamo=True,
        dynamic_shapes=(axes, axes, axes, [{0: dynamic, 2: dynamic} for _ in names]),
        input_names=["input_ids", "attention_mask", "position_ids", *names],
        output_names=["logits", *(name.replace("past_key_values", "present") for name in names)],
    )
