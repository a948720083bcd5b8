"""Names of variants."""

from __future__ import annotations

import pytest

from accel.errors import InputError
from accel.scheme import BASES, CACHES, QUANTIZED, Scheme, gpu_type, parse_scheme


@pytest.mark.parametrize("cache", ["", *(f"+{name}" for name in CACHES)])
@pytest.mark.parametrize("weights", [*BASES, *QUANTIZED])
def test_every_name_is_kept(weights: str, cache: str) -> None:
    scheme = parse_scheme(weights + cache)
    assert scheme.name == weights + cache
    assert scheme.kv_bits == CACHES.get(cache[1:]) and scheme.kv_float8 == (cache == "+kvfp8")
    assert scheme.quantized == (weights in QUANTIZED)
    assert scheme.lossless == (weights == "fp32" and not cache)


def test_parts() -> None:
    assert parse_scheme("w4g32+kv8") == Scheme("w4g32+kv8", weight_bits=4, group=32, kv_bits=8)
    assert parse_scheme("w8a8-dyn") == Scheme("w8a8-dyn", weight_bits=8, activations="dynamic")
    assert parse_scheme("w8a8").activations == "static"
    assert parse_scheme("kv4") == Scheme("fp32+kv4", kv_bits=4)
    assert parse_scheme("kvfp8") == Scheme("fp32+kvfp8", kv_bits=8, kv_float8=True)
    assert parse_scheme("bf16").base == "bf16"


def test_what_gpus_compute_in() -> None:
    """The manifest's type is the CPU's where something is rounded that a GPU has beside fp16."""
    types = {"kv8": "float32", "w4g32+kv8": "float32", "fp16+kvfp8": "float16", "bf16+kv8": "bfloat16"}
    found = {name: gpu_type(name, dtype) for name, dtype in types.items()}
    assert found == {**types, "w4g32+kv8": "float16"}
    assert gpu_type("a name of somebody's", "bfloat16") == "bfloat16"


UNKNOWN = ["", "w4", "w4g33", "w4g", "w3g32", "kv8+kv4", "w4g32+kv8+kv8", "w8a8+fp16", "W4g32", "+kv8"]
UNKNOWN += ["w4g032", "w4g\uff13\uff12", "w4g32+", "kv8+w4g32", " w4g32", "w4g32\n"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_point_to_known_ones(name: str) -> None:
    with pytest.raises(InputError, match="unknown variant") as caught:
        parse_scheme(name)
    assert "w4g32+kv8" in str(caught.value)


NEAREST = [
    ("w4g33", "Did you mean 'w4g32'?"),
    ("fp16+kvv8", "Did you mean 'fp16+kv8'?"),
    ("fp16+vk8", "Did you mean 'fp16+kv8'?"),
    ("kv8+fp16", "Did you mean 'fp16+kv8'?"),
    ("fp61+kvv8", "Did you mean 'fp16+kv8'?"),
    ("FP16+KV8", "Did you mean 'fp16+kv8'?"),
    ("fp16+kv8+kv8", "Did you mean 'fp16+kv8'?"),
    ("fp16+fp8", "Did you mean 'fp16+kvfp8'?"),
    ("fp16+kv8+kvfp8", "A variant has one cache: fp16+kv8 or fp16+kvfp8"),
    ("kv8+kv4", "A variant has one cache: kv8 or kv4"),
    ("fp16+", "Did you mean 'fp16'?"),
]


@pytest.mark.parametrize(("name", "said"), NEAREST)
def test_nearest_name(name: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_scheme(name)
    assert caught.value.remedy == f"{said}; + joins one with a cache: w4g32+kv8"
