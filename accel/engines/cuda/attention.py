"""Attention over the cache and of encoders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from accel_kernels.decode_attention import decode_attention
from accel_kernels.decode_attention import workspace as decode_workspace
from accel_kernels.launches import ENCODER_ATTENTION_TILES, decode_launch, label
from accel_kernels.rotary_append import rotary_append
from accel_kernels.varlen_attention import varlen_attention

from accel.engines.cuda.products import Products, as_tensor
from accel.engines.cuda.values import Parts


@dataclass
class StepTensors:
    """One step's places, on the device.

    Attributes:
        past_lengths: int32 [B]; of a one-token step negative for rows that sit out.
        starts, stops: int32 [B], where each row's tokens stand.
        rows, slots: int32 [T], each token's cache row (negative: padding) and slot.
        longest: At least the most tokens of a row; 1: a one-token step, token b is row b's.
        long_past: Whether rows may be long enough for several programs to share one head's positions.
        room: Of an encoder, tokens that each row has room for; what stands behind its last one becomes zero.
    """

    past_lengths: torch.Tensor
    starts: torch.Tensor | None = None
    stops: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    longest: int = 1
    long_past: bool = True
    room: int = 0


@dataclass(frozen=True)
class Constants:
    """What a decoder's attention node reads beside queries, keys and values; see the kernels.

    Attributes:
        cos, sin: [positions, D / 2]; None: nothing rotates.
        key_scales, value_scales: float32 [KV, D] of caches in 8 bits; None: they are floats.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


class CachedAttention:
    """Runs the decoder's attention nodes over caches that it holds.

    Args:
        caches: Keys and values per node, [rows, KV, C, D] in the engine's type, or in 8 bits.
        products: Brings values into that type.
    """

    def __init__(self, caches: dict[ir.Node, tuple[torch.Tensor, torch.Tensor]], products: Products) -> None:
        self._caches, self._products = caches, products
        self._spaces: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, node: ir.Node, operands: list[object], constants: Constants, step: StepTensors) -> torch.Tensor:
        """[T, H * D] in the engine's type; the cache grows in place."""
        keys, values = self._caches[node]
        scale = node.attributes["scale"].as_float()
        softcap, window = node.attributes.get_float("softcap", None), node.attributes.get_int("window", None)
        heads = node.attributes["num_heads"].as_int()
        qkv = self._packed(operands)
        if step.longest == 1:
            return self._decode(qkv, keys, values, step, heads, scale, softcap, window, constants)
        assert step.rows is not None and step.slots is not None and step.starts is not None and step.stops is not None
        qkv = as_tensor(qkv)
        kv_heads, dim = keys.shape[1], keys.shape[3]
        rotary_append(
            qkv, keys, values, step.rows, step.slots, heads=heads, cos=constants.cos, sin=constants.sin,
            key_scales=constants.key_scales, value_scales=constants.value_scales,
        )  # fmt: skip
        out = torch.empty(len(qkv), heads * dim, dtype=qkv.dtype, device=qkv.device)  # padding keeps to itself
        return varlen_attention(
            qkv, keys, values, out, step.starts, step.stops, heads=heads, kv_heads=kv_heads, dim=dim,
            longest=step.longest, scale=scale, past_lengths=step.past_lengths, causal=True, softcap=softcap,
            window=window, block_n=64 if dim <= 128 else 32, key_scales=constants.key_scales,
            value_scales=constants.value_scales,
        )  # fmt: skip

    def slot_bytes(self, node: ir.Node) -> int:
        """Of one position's key and value in all heads."""
        keys, _ = self._caches[node]
        return 2 * keys.shape[1] * keys.shape[3] * keys.element_size()

    def _packed(self, operands: list[object]) -> torch.Tensor | Parts:
        """Query, key and value side by side, in a tensor of their own: queries are rotated in place."""
        if operands[1] is None:
            return operands[0] if isinstance(operands[0], Parts) else self._products.low(operands[0])
        return torch.cat([self._products.low(value) for value in operands[:3]], 1)

    def _decode(self, qkv: torch.Tensor | Parts, keys: torch.Tensor, values: torch.Tensor, step: StepTensors,
                heads: int, scale: float, softcap: float | None, window: int | None,
                constants: Constants) -> torch.Tensor:  # fmt: skip
        rows = step.past_lengths.numel()
        kv_heads, dim = keys.shape[1], keys.shape[3]
        launch = decode_launch(rows, kv_heads, dim, step.long_past, keys.dtype)
        packed = qkv.parts if isinstance(qkv, Parts) else qkv
        out = torch.empty(rows, heads * dim, dtype=self._products.dtype, device=keys.device)
        return decode_attention(
            packed, keys[:rows], values[:rows], step.past_lengths, out,
            self._space(rows, kv_heads, heads // kv_heads, dim, launch["splits"]), heads=heads, scale=scale,
            cos=constants.cos, sin=constants.sin, softcap=softcap, window=window, key_scales=constants.key_scales,
            value_scales=constants.value_scales, **launch,
        )  # fmt: skip

    def _space(self, rows: int, kv_heads: int, group: int, dim: int, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for ranges that are put together; layers of one shape share it, as they run one after another."""
        sizes = rows, kv_heads, group, dim, splits
        if sizes not in self._spaces:
            device = next(iter(self._caches.values()))[0].device
            self._spaces[sizes] = decode_workspace(rows, kv_heads, group, dim, splits, device)
        return self._spaces[sizes]


def encoder_attention(
    node: ir.Node, operands: list[object], bias: torch.Tensor | None, step: StepTensors, products: Products
) -> torch.Tensor:
    """[T, H * D] in the engine's type."""
    starts, stops, longest = step.starts, step.stops, step.longest
    assert starts is not None and stops is not None
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    if operands[1] is None:
        packed = products.low(operands[0])
        dim = packed.shape[1] // (heads + 2 * kv_heads)
        query, key, value = packed.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    else:
        query, key, value = (products.low(operand) for operand in operands[:3])
        dim = query.shape[1] // heads
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()  # the kernel knows one key stride
    out = torch.empty(len(query), heads * dim, dtype=query.dtype, device=query.device)
    softcap, window = node.attributes.get_float("softcap", None), node.attributes.get_int("window", None)
    attend = partial(
        varlen_attention, query, key, value, out, starts, stops, heads=heads, kv_heads=kv_heads, dim=dim,
        longest=longest, scale=node.attributes["scale"].as_float(), softcap=softcap, window=window,
        bias=None if bias is None else bias[0].contiguous(), room=step.room,
    )  # fmt: skip
    ways = {label(tile): partial(attend, **tile) for tile in ENCODER_ATTENTION_TILES}
    options = f"softcap {softcap}, window {window}, bias {bias is not None}"
    if not step.room:
        options += f", {len(query)} tokens side by side"
    key_of = f"attention of {len(starts)}x{longest}, {heads} heads on {kv_heads} of {dim}, {query.dtype}, {options}"
    return ways[products.fastest(key_of, ways, query if operands[1] is not None else packed)]()


__all__ = ["CachedAttention", "Constants", "StepTensors", "encoder_attention"]
