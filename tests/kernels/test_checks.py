"""Arguments that a kernel would read or write past the end of, or take for something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.kernels.comparing import Maker

torch = pytest.importorskip("torch")
from accel_kernels.activation import activation  # noqa: E402
from accel_kernels.argmax import argmax, argmax_workspace  # noqa: E402
from accel_kernels.block_gemm import block_gemm  # noqa: E402
from accel_kernels.checks import Expect  # noqa: E402
from accel_kernels.decode_attention import decode_attention, workspace  # noqa: E402
from accel_kernels.gather import gather  # noqa: E402
from accel_kernels.gemv import gemv  # noqa: E402
from accel_kernels.narrow_gemm import NarrowTile, narrow_gemm  # noqa: E402
from accel_kernels.norm import norm  # noqa: E402
from accel_kernels.packing import pack  # noqa: E402
from accel_kernels.quantized_gemv import quantized_gemv  # noqa: E402
from accel_kernels.rotary_append import rotary_append  # noqa: E402
from accel_kernels.sample import sample, sample_workspace  # noqa: E402
from accel_kernels.tiles import NO_ACTIVATION, RMS_NORM, SILU  # noqa: E402
from accel_kernels.varlen_attention import varlen_attention  # noqa: E402
from accel_kernels.wide_gemm import wide_gemm  # noqa: E402

MAKE = Maker(torch.device("cpu"), torch.float16)
Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


def half(*shape: int) -> Any:
    return MAKE.normal(*shape)


def ints(*numbers: int) -> Any:
    return MAKE.ints(*numbers)


def given(launch: Callable[..., Any]) -> Arguments:
    """Arguments that the launcher takes."""
    words, scales = pack(half(8, 64), 4, 32)
    cache = {"key_cache": half(2, 2, 9, 16), "value_cache": half(2, 2, 9, 16)}
    heads = {"heads": 4, "kv_heads": 2, "dim": 16, "scale": 1.0, "longest": 3}
    rows = {"starts": ints(0, 2), "stops": ints(2, 5)}
    tables = {"cos": half(9, 8), "sin": half(9, 8)}
    product = {"weight": half(8, 32), "bias": half(8)}
    return {
        gemv: {**product, "x": half(32), "out": half(8), "residual": half(8)},
        narrow_gemm: {**product, "x": half(3, 32), "out": half(3, 8), "residual": half(3, 8)},
        block_gemm: {**product, "x": half(3, 32), "out": half(3, 8), "residual": half(3, 8)},
        wide_gemm: {**product, "x": half(3, 32), "out": half(3, 8)},
        quantized_gemv: {"x": half(64), "weight": words, "scales": scales, "out": half(8), "bits": 4},
        norm: {"x": half(3, 8), "weight": half(8), "out": half(3, 8), "eps": 1e-5, "residual": half(2, 3, 8)},
        activation: {"x": half(3, 16), "out": half(3, 8), "kind": SILU, "gated": True},
        gather: {"table": half(9, 8), "ids": ints(1, 2), "out": half(2, 8)},
        argmax: {
            "logits": half(2, 9).float(), "out": torch.zeros(2).long(), "value": torch.zeros(2),
            "space": argmax_workspace(2, MAKE.device),
        },
        sample: {
            "logits": half(2, 9).float(), "draws": torch.ones(2, 5).double() / 2, "out": torch.zeros(2).long(),
            "value": torch.zeros(2), "space": sample_workspace(2, 9, MAKE.device), "span": 1024,
        },
        rotary_append: {
            **cache, **tables, "qkv": half(3, 128), "rows": ints(0, 1, 1), "slots": ints(1, 2, 3), "heads": 4,
        },
        decode_attention: {
            **cache, **tables, "qkv": half(2, 128), "past_lengths": ints(1, 2), "out": half(2, 64), "heads": 4,
            "space": workspace(2, 2, 2, 16, 3, MAKE.device), "splits": 3, "scale": 1.0,
        },
        varlen_attention: {
            "query": half(5, 128), "keys": half(2, 2, 9, 16), "values": half(2, 2, 9, 16), "out": half(5, 64), **rows,
            **heads, "past_lengths": ints(0, 2),
        },
    }[launch]  # fmt: skip


def to(name: str, value: Any) -> Change:
    """Another value of one argument, or what a function makes of it."""
    return lambda arguments: {**arguments, name: value(arguments[name]) if callable(value) else value}


def gap(tensor: Any) -> Any:
    """The same numbers with gaps between them."""
    return torch.stack([tensor, tensor], -1)[..., 0]


CACHES = ("key_cache", "value_cache")
SCALES = ("key_scales", "value_scales")
SCALED = dict.fromkeys(SCALES, torch.ones(2, 16))
INT8 = torch.zeros(2, 2, 9, 16, dtype=torch.int8)
PACKED = {"past_lengths": None, "keys": half(5, 32), "values": half(5, 32)}


def narrow(**others: Any) -> Change:
    """Caches in int8 with their scales, but for what is given."""
    return lambda arguments: {**arguments, **dict.fromkeys(CACHES, INT8), **SCALED, **others}


CASES: list[tuple[Callable[..., Any], Change, type[Exception], str]] = [
    (gemv, to("x", half(31)), ValueError, r"weight has shape \[8, 32\], not \[8, 31\]"),
    (gemv, to("x", half(2, 16)), ValueError, r"x has shape \[2, 16\]"),
    (gemv, to("weight", gap), ValueError, "weight is not contiguous"),
    (gemv, to("weight", lambda w: w.int()), TypeError, "weight is torch.int32"),
    (gemv, to("weight", lambda w: w.to("meta")), ValueError, "weight is on meta, the others are on cpu"),
    (gemv, to("bias", [1.0]), TypeError, "bias is a list, not a tensor"),
    (gemv, to("gated", True), ValueError, r"weight has shape \[8, 32\], not \[16, 32\]"),
    (gemv, to("stripe", 3), ValueError, "stripe 3 does not divide 8"),
    (gemv, to("stripe", 0), ValueError, "stripe 0"),
    (gemv, to("activation", 3), ValueError, "activation 3"),
    (gemv, to("norm", RMS_NORM), ValueError, "no weight for it"),
    (gemv, to("norm", 7), ValueError, "norm 7"),
    (narrow_gemm, to("x", lambda x: x.float()), TypeError, "weight is torch.float16, not torch.float32"),
    (narrow_gemm, to("x", half(257, 32)), ValueError, "257 rows; from 1 to 256 fit"),
    (narrow_gemm, to("out", half(3, 9)), ValueError, r"weight has shape \[8, 32\], not \[9, 32\]"),
    (narrow_gemm, to("residual", half(8)), ValueError, r"residual has shape \[8\], not \[3, 8\]"),
    (narrow_gemm, to("tile", NarrowTile(splits=2)), TypeError, "out is torch.float16, not torch.float32"),
    (
        narrow_gemm, lambda a: {**a, "out": torch.zeros(2, 3, 8), "tile": NarrowTile(splits=2)}, ValueError,
        "sums in parts have no bias",
    ),
    (block_gemm, to("out", half(2, 8)), ValueError, r"out has shape \[2, 8\], not \[3, 8\]"),
    (block_gemm, to("x", half(32)), ValueError, r"x has shape \[32\], not \[-1, -1\]"),
    (block_gemm, to("activation", -2), ValueError, "activation -2"),
    (wide_gemm, to("x", lambda x: x.bfloat16()), TypeError, "weight is torch.float16, not torch.bfloat16"),
    (wide_gemm, lambda a: {**a, "x": half(3, 30), "weight": half(8, 30)}, ValueError, "a row of x has 60 bytes"),
    (wide_gemm, to("x", half(4, 32).flatten()[4:100].view(3, 32)), ValueError, "x starts at no multiple of 16 bytes"),
    (wide_gemm, lambda a: {**a, "x": half(0, 32), "out": half(0, 8)}, ValueError, "x is empty"),
    (wide_gemm, lambda a: {**a, "gated": True, "weight": half(16, 32)}, ValueError, "a gated product has no bias"),
    (
        wide_gemm, lambda a: {**a, "gated": True, "weight": half(16, 32), "bias": None, "activation": SILU}, ValueError,
        "stripes of 128 do not divide 8",
    ),
    (
        wide_gemm, lambda a: {**a, "gated": True, "weight": half(16, 32), "bias": None}, ValueError,
        "needs an activation",
    ),
    (quantized_gemv, to("bits", 3), ValueError, "3 bits"),
    (quantized_gemv, to("bits", 8), ValueError, r"weight has shape \[8, 8\], not \[8, 16\]"),
    (quantized_gemv, to("x", lambda x: x.bfloat16()), TypeError, "x is torch.bfloat16, not torch.float16"),
    (quantized_gemv, to("scales", half(8, 3)), ValueError, "3 scales do not divide a row of 64"),
    (quantized_gemv, to("scales", half(7, 2)), ValueError, r"scales has shape \[7, 2\]"),
    (norm, to("residual", half(3, 9)), ValueError, r"residual has shape \[3, 9\], not \[3, 8\]"),
    (norm, to("weight", half(9)), ValueError, r"weight has shape \[9\], not \[8\]"),
    (norm, to("kind", 0), ValueError, "norm 0"),
    (norm, lambda a: {**a, "residual": None, "stream": half(3, 8)}, ValueError, "stream without a residual"),
    (activation, to("kind", NO_ACTIVATION), ValueError, "activation -1"),
    (activation, to("gated", False), ValueError, r"x has shape \[3, 16\], not \[3, 8\]"),
    (activation, to("stripe", 5), ValueError, "stripe 5 does not divide 8"),
    (gather, to("ids", lambda ids: ids.float()), TypeError, "ids is torch.float32"),
    (gather, lambda call: {**call, "added": half(3, 8), "out": half(3, 8)}, ValueError, "no multiple of 2 ids"),
    (gather, lambda call: {**call, "second": (half(2, 7), ints(1))}, ValueError, r"second has shape \[2, 7\]"),
    (gather, lambda call: {**call, "second": (half(2, 8), ints())}, ValueError, "2 rows are no multiple of 0 ids"),
    (gather, lambda call: {**call, "third": (half(2, 8), ints(1, 0, 1))}, ValueError, "no multiple of 3 ids"),
    (gather, to("out", half(3, 8)), ValueError, r"out has shape \[3, 8\], not \[2, 8\]"),
    (argmax, to("logits", lambda x: x.half()), TypeError, "logits is torch.float16"),
    (argmax, to("logits", torch.zeros(2, 0)), ValueError, "there are no logits"),
    (argmax, to("space", argmax_workspace(1, MAKE.device)), ValueError, "workspace is for fewer than 2 rows"),
    (sample, to("logits", lambda x: x.half()), TypeError, "logits is torch.float16"),
    (sample, to("logits", torch.zeros(2, 0)), ValueError, "0 logits, not between 1 and 1048576"),
    (sample, to("draws", torch.zeros(2, 5)), TypeError, "draws is torch.float32, not torch.float64"),
    (sample, to("turn", ints(0)), ValueError, r"draws has shape \[2, 5\], not \[2, 2, 5\]"),
    (sample, to("draws", lambda draws: draws.to("meta")), ValueError, "a host whose memory is not pinned"),
    (sample, to("value", torch.zeros(3)), ValueError, r"value has shape \[3\], not \[2\]"),
    (sample, to("space", sample_workspace(1, 9, MAKE.device)), ValueError, "workspace is for fewer than 2 rows"),
    (sample, to("space", sample_workspace(2, 8, MAKE.device)), ValueError, "workspace is for fewer than 9 logits"),
    (sample, to("span", 4), ValueError, "spans of 4 are shorter than the workspace's"),
    (rotary_append, to("qkv", half(3, 127)), ValueError, r"qkv has shape \[3, 127\], not \[-1, 128\]"),
    (rotary_append, to("qkv", lambda x: x.float()), TypeError, "qkv is torch.float32"),
    (rotary_append, to("slots", lambda x: x.long()), TypeError, "slots is torch.int64"),
    (rotary_append, to("rows", ints(0)), ValueError, r"rows has shape \[1\], not \[3\]"),
    (rotary_append, to("sin", None), ValueError, "cos and sin come together"),
    (rotary_append, to("cos", half(9, 16)), ValueError, r"cos has shape \[9, 16\], not \[-1, 8\]"),
    (rotary_append, to("value_cache", half(2, 2, 8, 16)), ValueError, "value_cache has shape"),
    (rotary_append, lambda a: {**a, **dict.fromkeys(CACHES, half(2, 2, 9, 7))}, ValueError, "halves"),
    (decode_attention, to("heads", 3), ValueError, "2 key heads for 3 query heads"),
    (decode_attention, to("splits", 4), ValueError, "workspace is too small"),
    (decode_attention, to("splits", 0), ValueError, "splits is 0, not positive"),
    (decode_attention, to("least", 0), ValueError, "least is 0"),
    (decode_attention, to("window", 0), ValueError, "window is 0"),
    (decode_attention, to("softcap", 0.0), ValueError, "softcap is 0.0"),
    (decode_attention, to("past_lengths", lambda x: x.long()), TypeError, "past_lengths is torch.int64"),
    (decode_attention, to("past_lengths", ints(1)), ValueError, r"past_lengths has shape \[1\], not \[2\]"),
    (decode_attention, to("qkv", half(3, 128)), ValueError, r"qkv has shape \[3, 128\]"),
    (decode_attention, to("key_cache", gap), ValueError, "key_cache is not contiguous"),
    (varlen_attention, to("out", half(4, 64)), ValueError, r"out has shape \[4, 64\], not \[5, 64\]"),
    (varlen_attention, to("query", half(5, 63)), ValueError, "query has 63 columns for 4 heads of 16"),
    (varlen_attention, to("query", gap), ValueError, "the last axis of query is not contiguous"),
    (varlen_attention, to("stops", ints(1)), ValueError, r"stops has shape \[1\], not \[2\]"),
    (varlen_attention, to("scale", lambda _: -0.25), ValueError, "scale is -0.25, not positive"),
    (varlen_attention, to("bias", half(4, 9, 9)), ValueError, "there is no bias"),
    (varlen_attention, to("keys", lambda x: x.float()), TypeError, "value_cache is torch.float16"),
    (varlen_attention, lambda a: {**a, **PACKED, "values": half(5, 40)[:, :32]}, ValueError, "two row strides"),
    (varlen_attention, lambda a: {**a, **PACKED, "kv_heads": 4}, ValueError, "keys have 32 columns for 4 heads of 16"),
    (varlen_attention, lambda a: {**a, **PACKED, "bias": half(4, 2, 2)}, ValueError, "smaller than the longest row"),
    (rotary_append, lambda a: {**a, **dict.fromkeys(CACHES, INT8)}, ValueError, "torch.int8 has key_scales"),
    (rotary_append, lambda a: {**a, **SCALED}, ValueError, "a cache of torch.float16 has no key_scales"),
    (decode_attention, lambda a: {**a, **dict.fromkeys(CACHES, INT8)}, ValueError, "torch.int8 has key_scales"),
    (decode_attention, lambda a: {**a, **SCALED}, ValueError, "a cache of torch.float16 has no key_scales"),
    (
        varlen_attention, lambda a: {**a, **dict.fromkeys(("keys", "values"), INT8)}, ValueError,
        "torch.int8 has key_scales",
    ),
    (varlen_attention, lambda a: {**a, **SCALED}, ValueError, "a cache of torch.float16 has no key_scales"),
    (rotary_append, narrow(value_scales=None), ValueError, "torch.int8 has value_scales"),
    (rotary_append, narrow(key_scales=half(2, 16)), TypeError, "key_scales is torch.float16, not torch.float32"),
    (rotary_append, narrow(value_scales=torch.ones(1)), ValueError, r"value_scales has shape \[1\], not \[2, 16\]"),
    (rotary_append, narrow(value_cache=half(2, 2, 9, 16)), TypeError, "value_cache is torch.float16, not torch.int8"),
    (rotary_append, narrow(qkv=torch.zeros(3, 128).long()), TypeError, "qkv is torch.int64"),
    (decode_attention, narrow(key_cache=INT8.to(torch.uint8)), TypeError, "key_cache is torch.uint8"),
    (decode_attention, narrow(out=torch.zeros(2, 64, dtype=torch.int8)), TypeError, "out is torch.int8"),
    (varlen_attention, lambda a: {**a, **PACKED, **SCALED}, ValueError, "packed keys and values have no scales"),
    (varlen_attention, lambda a: {**a, **PACKED, "keys": half(5, 32).to(torch.int8)}, TypeError, "keys is torch.int8"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("launch", "change", "error", "message"), CASES, ids=[f"{c[0].__name__}-{i}" for i, c in enumerate(CASES)]
)
def test_refused(launch: Callable[..., Any], change: Change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        launch(**change(given(launch)))
    assert str(raised.value).startswith(f"{launch.__name__}: ")


@pytest.mark.parametrize("launch", list(dict.fromkeys(case[0] for case in CASES)), ids=lambda launch: launch.__name__)
def test_what_the_cases_start_from_is_taken(launch: Callable[..., Any], device: Any) -> None:
    if device.type != "cpu":
        pytest.skip("the tensors of these tests are on the CPU")
    launch(**given(launch))


def test_a_gpu_that_does_not_convert_8_bit_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel_kernels.checks.capability", lambda _: (8, 6))
    monkeypatch.setattr(Expect, "tensor", lambda *_, **__: None)

    class Cache:  # of a device that is not here
        shape, dtype, device = (2, 2, 9, 16), torch.float8_e4m3fn, torch.device("cuda", 0)

    with pytest.raises(ValueError, match="op: caches of torch.float8_e4m3fn need sm89, this is sm86"):
        Expect("op", Cache.device).cache(Cache(), Cache(), torch.ones(2, 16), torch.ones(2, 16))  # type: ignore


def test_what_a_tensor_may_look_like() -> None:
    expect = Expect("op", MAKE.device)
    expect.tensor("absent", None, 3)
    expect.tensor("a batch of one", half(1, 1, 3), 3)
    expect.tensor("any", half(2, 3), -1, 3)
    expect.tensor("view", half(4, 6)[:, :3], 4, 3, strided=True)
    with pytest.raises(ValueError, match=r"op: number has shape \[\], not \[1\]"):
        expect.tensor("number", torch.tensor(1.0), 1)
