"""Caches in int8 and 8-bit floats: what goes in is rounded as it should be, and attention sees what is in there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.comparing import Maker, assert_close

torch = pytest.importorskip("torch")
from accel_kernels import decode_attention as decode  # noqa: E402
from accel_kernels import rotary_append as append  # noqa: E402
from accel_kernels import varlen_attention as varlen  # noqa: E402
from accel_kernels.device import INTERPRETED, capability  # noqa: E402
from accel_kernels.narrow_cache import EIGHT_BITS, FLOAT8_SM, rounded  # noqa: E402

TOLERANCES = decode.TOLERANCES
CAPACITY = 80
PASTS = (0, -1, 77, 30)  # nothing cached yet, sits out, ragged
LENGTHS = (5, 0, 22)  # of prompts; one row has no tokens


@pytest.fixture(params=EIGHT_BITS, ids=["int8", "float8"])
def kind(request: pytest.FixtureRequest, device: Any) -> Any:
    """The cache's type, where the device has it."""
    if request.param == torch.float8_e4m3fn and not INTERPRETED and capability(device) < FLOAT8_SM:
        pytest.skip("the GPU does not convert 8-bit floats")
    return request.param


def scales_of(make: Maker, kind: Any, kv_heads: int, dim: int) -> dict[str, Any]:
    """Scales whose largest is some 50 times the smallest; the small ones cut off what normal numbers bring."""
    step = 0.02 if kind == torch.int8 else 0.006
    drawn = (make.normal(kv_heads, dim, dtype=torch.float32).clamp(-2, 2).exp() * step for _ in range(2))
    return dict(zip(("key_scales", "value_scales"), drawn))


def caches_of(make: Maker, kind: Any, rows: int, kv_heads: int, capacity: int, dim: int) -> tuple[Any, Any]:
    """Keys and values as a cache holds them."""
    drawn = (make.normal(rows, kv_heads, capacity, dim, scale=60, dtype=torch.float32) for _ in range(2))
    keys, values = (rounded(part, torch.ones(kv_heads, 1, dim, device=part.device), kind).to(kind) for part in drawn)
    return keys, values


def poison(cache: Any, row: int, start: int) -> None:
    """What nobody wrote yet: numbers that would tell."""
    cache[row, :, start:] = 127 if cache.dtype == torch.int8 else float("nan")


def assert_held(actual: Any, expected: Any) -> None:
    """The very numbers, but for ties that a last bit decides: of 200 at most one is the next number."""
    ours, theirs = actual.double(), expected.double()
    different = ours != theirs
    assert int(different.sum()) <= theirs.numel() / 200, f"{int(different.sum())} of {theirs.numel()} differ"
    step = 1.0 if actual.dtype == torch.int8 else theirs.abs().clamp(min=2.0**-6) / 8
    assert ((ours - theirs).abs() <= step)[different].all()


def check_decode(
    make: Maker, kind: Any, *, heads: int = 4, kv_heads: int = 2, dim: int = 16, splits: int = 2, parts: int = 0,
    pasts: tuple[int, ...] = PASTS, tables: bool = True, scale: float | None = None, larger: float = 1.0,
    **options: Any,
) -> None:  # fmt: skip
    """One step of some rows against the reference; ``larger``: times the keys' scales."""
    rows = len(pasts)
    qkv = make.normal(*((parts,) if parts else ()), rows, (heads + 2 * kv_heads) * dim,
                      dtype=torch.float32 if parts else None)  # fmt: skip
    keys, values = caches_of(make, kind, rows, kv_heads, CAPACITY, dim)
    for row, past in enumerate(pasts):
        poison(keys, row, max(past, 0))
        poison(values, row, max(past, 0))
    scales = scales_of(make, kind, kv_heads, dim)
    scales["key_scales"] *= larger
    options = {"heads": heads, "scale": scale or dim**-0.5, **scales, **options}
    if tables:
        options["cos"], options["sin"] = make.angles(CAPACITY, dim // 2)
    past = make.ints(*pasts)
    expected, new_keys, new_values = decode.reference(qkv, keys, values, past, **options)
    before, out = (keys.clone(), values.clone()), make.poison(rows, heads * dim)
    space = decode.workspace(rows, kv_heads, heads // kv_heads, dim, splits, make.device)
    decode.decode_attention(qkv, keys, values, past, out, space, splits=splits, block=16, least=16, **options)
    taking_part = [row for row, past in enumerate(pasts) if past >= 0]
    assert_close(out[taking_part], expected[taking_part], TOLERANCES[make.dtype])
    assert out[[row for row, past in enumerate(pasts) if past < 0]].isnan().all()
    for cache, wanted, old in zip((keys, values), (new_keys, new_values), before):
        assert_held(cache[taking_part, :, past[taking_part].long()], wanted[taking_part, :, past[taking_part].long()])
        same = torch.ones(rows, CAPACITY, dtype=torch.bool)
        same[taking_part, past[taking_part].long().cpu()] = False
        as_bytes = cache.view(torch.uint8).transpose(1, 2), old.view(torch.uint8).transpose(1, 2)
        assert torch.equal(*(part[same] for part in as_bytes)), "only the new token's slot is written"


def check_varlen(make: Maker, kind: Any, *, heads: int = 4, kv_heads: int = 2, dim: int = 16, **options: Any) -> None:
    """Prefill: rows on different pasts in a cache that is garbage behind them."""
    starts, pasts = (0, 5, 5), (0, 7, 21)
    stops = [start + length for start, length in zip(starts, LENGTHS)]
    query = make.normal(stops[-1], (heads + 2 * kv_heads) * dim)
    keys, values = caches_of(make, kind, 3, kv_heads, 64, dim)
    for row, (past, length) in enumerate(zip(pasts, LENGTHS)):
        poison(keys, row, past + length)
        poison(values, row, past + length)
    options = {
        "heads": heads, "kv_heads": kv_heads, "dim": dim, "scale": dim**-0.5, "past_lengths": make.ints(*pasts),
        "causal": True, **scales_of(make, kind, kv_heads, dim), **options,
    }  # fmt: skip
    given = query, keys, values
    rows, out = (make.ints(*starts), make.ints(*stops)), make.poison(stops[-1], heads * dim)
    varlen.varlen_attention(*given, out, *rows, longest=max(LENGTHS), block_m=16, block_n=16, **options)
    assert_close(out, varlen.reference(*given, *rows, **options), TOLERANCES[make.dtype])


def check_append(make: Maker, kind: Any, heads: int, kv_heads: int, dim: int, tables: bool) -> None:
    """Ragged rows on different pasts, with padding behind them."""
    pasts, padding = (0, 7, 3), 2
    rows = [row for row, length in enumerate(LENGTHS) for _ in range(length)] + [-1] * padding
    slots = [past + i for past, length in zip(pasts, LENGTHS) for i in range(length)] + [99999] * padding
    qkv = make.normal(len(rows), (heads + 2 * kv_heads) * dim)
    keys, values = caches_of(make, kind, 3, kv_heads, 32, dim)
    cos, sin = make.angles(32, dim // 2) if tables else (None, None)
    options: dict[str, Any] = {"heads": heads, "cos": cos, "sin": sin, **scales_of(make, kind, kv_heads, dim)}
    expected = append.reference(qkv, keys, values, make.ints(*rows), make.ints(*slots), **options)
    before = keys.clone()
    append.rotary_append(qkv, keys, values, make.ints(*rows), make.ints(*slots), **options)
    assert_close(qkv, expected[0], append.TOLERANCES[make.dtype])
    assert_held(keys, expected[1])
    assert_held(values, expected[2])
    assert (keys.view(torch.uint8) != before.view(torch.uint8)).any()


@pytest.mark.parametrize("tables", [True, False])
def test_appending(make: Maker, kind: Any, tables: bool) -> None:
    check_append(make, kind, 6, 2, 24, tables)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 64), (3, 3, 80), (8, 1, 16), (7, 7, 16)])
def test_appending_heads_of_any_number_and_size(device: Any, kind: Any, heads: int, kv_heads: int, dim: int) -> None:
    check_append(Maker(device, torch.float16), kind, heads, kv_heads, dim, True)


def append_row(make: Maker, kind: Any, numbers: list[float], scale: float) -> Any:
    """What a cache holds of keys that are these numbers."""
    row = torch.tensor(numbers, dtype=torch.float32, device=make.device)
    keys, values = (torch.zeros(1, 1, 2, len(numbers), device=make.device).to(kind) for _ in range(2))
    scales = torch.full((1, len(numbers)), scale, device=make.device)
    places = make.ints(0), make.ints(1)
    append.rotary_append(
        row.repeat(3)[None], keys, values, *places, heads=1, key_scales=scales, value_scales=scales.clone()
    )  # fmt: skip
    assert torch.equal(keys.view(torch.uint8), values.view(torch.uint8))
    return keys[0, 0, 1].float().tolist()


def test_halves_go_to_the_even_integer_and_the_ends_are_cut_off(device: Any) -> None:
    numbers = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 200.0, 1e9, -128.5, -127.5, -1e9, 0.49, -0.51, 100.7]
    held = append_row(Maker(device), torch.int8, [0.25 * number for number in numbers], 0.25)
    assert held == [0, 2, 2, 0, -2, -2, 126, 127, 127, 127, -128, -128, -128, 0, -1, 101]


def test_floats_of_8_bits(device: Any, kind: Any) -> None:
    """Halves go to the even neighbour, also where that is the next power of two, and below the normal numbers."""
    if kind == torch.int8:
        pytest.skip("has a test of its own")
    tiny = 2.0**-9
    numbers = [17.0, 19.0, 31.0, 30.9, 127.5, -127.5, 448.0, 464.0, 1e9, -1e9, 1.5 * tiny, 2.5 * tiny, 0.4 * tiny, 0.0]
    held = append_row(Maker(device), kind, [*(0.25 * number for number in numbers), 1.0, -1.0], 0.25)
    assert held[:10] == [16, 20, 32, 30, 128, -128, 448, 448, 448, -448]
    assert held[10:] == [2 * tiny, 2 * tiny, 0, 0, 4, -4]


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_decoding(make: Maker, kind: Any, splits: int) -> None:
    check_decode(make, kind, splits=splits)


@pytest.mark.parametrize("dim", [24, 64, 80, 128])
def test_decoding_with_heads_of_any_size(device: Any, kind: Any, dim: int) -> None:
    check_decode(Maker(device, torch.float16), kind, dim=dim, pasts=(40,))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (10, 2), (20, 1)])
def test_decoding_in_groups_of_any_size(device: Any, kind: Any, heads: int, kv_heads: int) -> None:
    check_decode(Maker(device, torch.float16), kind, heads=heads, kv_heads=kv_heads, pasts=(0, 33))


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 40}, {"softcap": 0.5, "scale": 1.0}, {"tables": False}])
def test_decoding_with(device: Any, kind: Any, options: dict[str, Any]) -> None:
    check_decode(Maker(device, torch.float16), kind, **options)


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_are_added_up_before_they_are_rounded(make: Maker, kind: Any, parts: int) -> None:
    check_decode(make, kind, parts=parts)


def test_scales_beyond_float16(device: Any, kind: Any) -> None:
    """Queries take the scales over, and are float16."""
    check_decode(Maker(device, torch.float16), kind, scale=1e-6, larger=1e6, softcap=3.0)


def test_a_full_cache(device: Any, kind: Any) -> None:
    check_decode(Maker(device), kind, pasts=(CAPACITY - 1,), splits=4)


def test_prompts(make: Maker, kind: Any) -> None:
    check_varlen(make, kind)


@pytest.mark.parametrize("dim", [24, 64, 80, 128])
def test_prompts_with_heads_of_any_size(device: Any, kind: Any, dim: int) -> None:
    check_varlen(Maker(device, torch.float16), kind, dim=dim, heads=2, kv_heads=1)


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 10}, {"softcap": 0.5, "scale": 1.0}, {"heads": 5, "kv_heads": 1}]
)
def test_prompts_with(device: Any, kind: Any, options: dict[str, Any]) -> None:
    check_varlen(Maker(device, torch.float16), kind, **options)


def test_tokens_one_after_another_are_as_a_prompt(device: Any, kind: Any) -> None:
    """The same numbers in the cache, and what the last token sees of them."""
    make, heads, dim, steps = Maker(device), 2, 16, 20
    qkv = make.normal(steps, 3 * heads * dim)
    scales = scales_of(make, kind, heads, dim)
    (keys, values), (ours, theirs) = caches_of(make, kind, 2, heads, steps, dim), make.poison(2, steps, heads * dim)
    space = decode.workspace(1, heads, 1, dim, 3, device)
    sizes = {"heads": heads, "scale": 0.25, **scales}
    for step in range(steps):
        now = qkv[step : step + 1], keys[:1], values[:1], make.ints(step), ours[step : step + 1]
        decode.decode_attention(*now, space, splits=3, block=16, least=6, **sizes)
    rows, slots = make.ints(*[1] * steps), make.ints(*range(steps))
    append.rotary_append(qkv, keys, values, rows, slots, heads=heads, **scales)
    assert torch.equal(*keys.view(torch.uint8)) and torch.equal(*values.view(torch.uint8))
    varlen.varlen_attention(
        qkv, keys[1:], values[1:], theirs, make.ints(0), make.ints(steps), kv_heads=heads, dim=dim, longest=steps,
        past_lengths=make.ints(0), causal=True, block_m=16, block_n=16, **sizes,
    )  # fmt: skip
    assert_close(ours, theirs, TOLERANCES[torch.float32])
