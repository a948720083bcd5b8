from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accel.builder.profiles import Profile, Range, check_profiles, default_profiles, input_shapes, read_profiles, takes
from accel.builder.source import GraphSource
from accel.errors import InputError, RecipeError
from tests.builder import graphs


@pytest.fixture
def source(tmp_path: Path) -> GraphSource:
    return GraphSource(graphs.save(graphs.decoder(), tmp_path), 64)


def test_defaults_of_a_decoder(source: GraphSource) -> None:
    prefill, decode = default_profiles(graphs.arch(), 4, 64)
    assert (prefill.name, prefill.batch, prefill.sequence) == ("prefill", Range(1, 1, 1), Range(1, 64, 64))
    assert (decode.name, decode.batch, decode.sequence) == ("decode", Range(1, 4, 4), Range(1, 1, 1))
    check_profiles((prefill, decode), source, graphs.arch(), cover=[(1, 64), (4, 1)])


def test_defaults_of_an_encoder(tmp_path: Path) -> None:
    (profile,) = default_profiles(graphs.arch(kind="encoder"), 8)
    assert profile == Profile("encode", Range(1, 8, 8), Range(1, 128, 512))
    check_profiles((profile,), GraphSource(graphs.save(graphs.encoder(), tmp_path)), graphs.arch(kind="encoder"))


def test_shapes_of_every_input(source: GraphSource) -> None:
    shapes = input_shapes(Profile("prefill", Range(1, 2, 4), Range(1, 16, 64)), source.inputs)
    assert shapes == {
        "input_ids": ((1, 1), (2, 16), (4, 64)),
        "position_ids": ((1, 1), (2, 16), (4, 64)),
        "write_index": ((1,), (2,), (4,)),
        "logits_positions": ((1,), (2,), (32,)),
        "past.0.key": ((1, 2, 64, 32), (2, 2, 64, 32), (4, 2, 64, 32)),
        "past.0.value": ((1, 2, 64, 32), (2, 2, 64, 32), (4, 2, 64, 32)),
    }


def test_reads_a_recipe() -> None:
    ranges = {"batch": {"min": 1, "opt": 2, "max": 4}, "sequence": {"min": 1, "opt": 1, "max": 1}}
    assert read_profiles({"decode": ranges}) == (Profile("decode", Range(1, 2, 4), Range(1, 1, 1)),)


ONE = {"min": 1, "opt": 1, "max": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"decode": {"batch": {"min": 1, "opt": 2, "max": 4}}}, "sequence"),
        ({"decode": {"batch": {"min": 1, "opt": 2, "maximum": 4}, "sequence": {}}}, "profiles.decode"),
        ({"decode": {"batch": {"min": 1, "opt": "2", "max": 4}, "sequence": ONE}}, "profiles.decode: batch: opt"),
        ({"decode": 4}, "profiles.decode"),
    ],
)
def test_refuses_a_wrong_recipe(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_profiles(data)


GOOD = Profile("prefill", Range(1, 2, 4), Range(1, 16, 64))


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (replace(GOOD, batch=Range(4, 2, 1)), r"batch must be 1 <= min <= opt <= max, not 4, 2, 1.*profile prefill"),
        (replace(GOOD, sequence=Range(1, 65, 64)), r"sequence must be.*profile prefill, input input_ids, dimension 1"),
        (replace(GOOD, batch=Range(0, 1, 1)), "not 0, 1, 1"),
        (replace(GOOD, sequence=Range(1, 16, 65)), "goes up to 65, the capacity to 64.*larger capacity"),
        (replace(GOOD, sequence=Range(2, 16, 64)), "No profile takes 1 rows of 1 tokens"),
    ],
)
def test_refuses_wrong_ranges(source: GraphSource, profile: Profile, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_profiles([profile], source, graphs.arch())


def test_refuses_what_the_model_cannot(tmp_path: Path) -> None:
    path = graphs.save(graphs.decoder(), tmp_path)
    with pytest.raises(InputError, match="capacity 1024 is more than the model's 512 positions"):
        check_profiles([GOOD], GraphSource(path, 1024), graphs.arch())
    with pytest.raises(InputError, match="goes up to 64, the model's positions to 32"):
        check_profiles([GOOD], GraphSource(path, 32), graphs.arch(max_positions=32))


def test_refuses_none_two_of_a_name_and_uncovered_calls(source: GraphSource) -> None:
    with pytest.raises(InputError, match="needs a profile"):
        check_profiles([], source, graphs.arch())
    with pytest.raises(InputError, match="stands twice in prefill, prefill"):
        check_profiles([GOOD, GOOD], source, graphs.arch())
    with pytest.raises(InputError, match="No profile takes 5 rows of 16 tokens"):
        check_profiles([GOOD], source, graphs.arch(), cover=[(4, 16), (5, 16)])


def test_refuses_ranges_outside_fixed_dimensions(tmp_path: Path) -> None:
    proto = graphs.decoder()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    source = GraphSource(graphs.save(proto, tmp_path), 64)
    with pytest.raises(InputError, match=r"graph has 1 for the batch, the profile 1 to 4.*input_ids, dimension 0"):
        check_profiles([GOOD], source, graphs.arch())
    check_profiles([replace(GOOD, batch=Range(1, 1, 1))], source, graphs.arch())


def test_refuses_an_unknown_symbol(tmp_path: Path) -> None:
    proto = graphs.decoder()
    proto.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "T"
    source = GraphSource(graphs.save(proto, tmp_path), 64)
    with pytest.raises(InputError, match=r"'T' \(at profile prefill, input position_ids, dimension 1\)"):
        check_profiles([GOOD], source, graphs.arch())


def test_defaults_refuse_nothing_to_do() -> None:
    with pytest.raises(InputError, match="max_batch must be at least 1, not 0"):
        default_profiles(graphs.arch(), 0, 64)


def test_takes() -> None:
    assert takes(GOOD, 4, 64) and not takes(GOOD, 5, 64) and not takes(GOOD, 4, 65)
