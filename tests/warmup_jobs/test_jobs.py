"""Jobs files: strict, with defaults, expanded to single engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import accel
from accel.cli import build_parser
from accel.errors import InputError, RecipeError
from accel.warmup_jobs.jobs import expand, read_jobs

JOB = {"bundle": "llama", "target": "rtx", "sm": "sm86"}


def write(folder: Path, text: str) -> Path:
    path = folder / "jobs.yaml"
    path.write_text(text)
    return path


def test_a_file_becomes_single_engines(tmp_path: Path) -> None:
    text = """
    defaults: {target: rtx, sm: [SM86, 89], max_batch: 4}
    jobs:
      - {bundle: llama, capacity: [64, 128], workspace: 1GiB}
      - {bundle: [bert, mpnet], sm: sm120, max_batch: 2}
      - {bundle: bert, sm: sm120, max_batch: 2}
    """
    found = expand(*read_jobs(write(tmp_path, text)))
    named = [(Path(one.bundle).name, one.sm, one.capacity, one.max_batch, one.workspace) for one in found]
    assert named == [
        ("llama", "sm86", 64, 4, 1 << 30),
        ("llama", "sm89", 64, 4, 1 << 30),
        ("llama", "sm86", 128, 4, 1 << 30),
        ("llama", "sm89", 128, 4, 1 << 30),
        ("bert", "sm120", None, 2, None),  # asked for twice, found once
        ("mpnet", "sm120", None, 2, None),
    ]
    assert {one.target for one in found} == {"rtx"}
    assert found[0].bundle == str(tmp_path / "llama")  # beside the file


@pytest.mark.parametrize(
    ("data", "where", "remedy"),
    [
        ({"jobs": [JOB], "memroy": "1GB"}, "", "'memory'"),
        ({"jobs": [JOB, {**JOB, "capasity": 8}]}, r"jobs\[1\]", "'capacity'"),
        ({"jobs": [JOB], "defaults": {"targt": "rtx"}}, "defaults", "'target'"),
        ({"jobs": [{**JOB, "target": "rtxx"}]}, r"jobs\[0\]: target", "Correct"),
        ({"jobs": [{**JOB, "sm": [8.6]}]}, r"jobs\[0\]: sm", "Correct"),
        ({"jobs": [{"sm": "sm86"}]}, r": jobs\[0\]", "a string"),
        ({"jobs": ["llama"]}, r"jobs\[0\]", "Correct"),
        ({"jobs": "llama"}, ": jobs", "Correct"),
        ({}, "", "Add it: a list"),
    ],
)
def test_wrong_keys_and_values_are_named(data: dict[str, Any], where: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=rf"\(at the given mapping.*{where}.*{remedy}"):
        read_jobs(data)


@pytest.mark.parametrize("name", ["bundle", "target", "sm", "precision", "capacity"])
def test_an_empty_list_is_no_silence(name: str) -> None:
    with pytest.raises(InputError, match=rf"empty.*jobs\[0\]: {name}"):
        read_jobs({"jobs": [{**JOB, name: []}]})


def test_nothing_to_do() -> None:
    with pytest.raises(InputError, match="no jobs"):
        read_jobs({"jobs": []})


@pytest.mark.parametrize("text", ["jobs: [", "- a list", "jobs: []\njobs: []"])
def test_no_yaml(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="jobs file is not (YAML|a mapping)|stands twice"):
        read_jobs(write(tmp_path, text))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Cannot read the jobs file: No such file"):
        read_jobs(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match=r"ends in \.yaml"):
        read_jobs(tmp_path / "jobs.json")


@pytest.mark.parametrize("size", ["much", "0", -1, "4GX"])
def test_a_workspace_that_is_no_size(size: int | str) -> None:
    with pytest.raises(RecipeError, match=f"'?{size}'? is .*at workspace"):
        expand(*read_jobs({"jobs": [{**JOB, "workspace": size}]}))


@pytest.mark.parametrize("target", ["cuda", "ort-cuda"])
@pytest.mark.parametrize(
    ("bundle", "sizes", "said"),
    [
        ("llama", {"capacity": 999_999}, "capacity 999,999 exceeds the 160 positions that the model covers"),
        ("llama", {"capacity": 0}, "capacity must be an integer of at least 1"),
        ("llama", {"max_batch": 0}, "max_batch must be an integer of at least 1"),
        ("bert", {"max_batch": 0}, "max_batch must be an integer of at least 1"),
    ],
)
def test_sizes_that_no_cache_can_have_fail_in_the_plan(
    bundles: Path, target: str, bundle: str, sizes: dict[str, int], said: str
) -> None:
    """Of engines that build nothing too; whether the bundle has their graph or not."""
    job = {"bundle": str(bundles / bundle), "target": target, "precision": "fp16", **sizes}
    for dry_run in (True, False):
        (line,) = accel.warmup({"jobs": [job]}, store=bundles / "store", dry_run=dry_run).engines
        assert line.status == "failed" and said in str(line.reason)


@pytest.mark.parametrize("size", [{"capacity": 160}, {"capacity": None}])
def test_a_capacity_that_the_model_covers_is_planned(bundles: Path, size: dict[str, int | None]) -> None:
    job = {"bundle": str(bundles / "llama"), "target": "cuda", "precision": "fp16", **size}
    (line,) = accel.warmup({"jobs": [job]}, store=bundles / "store", dry_run=True).engines
    assert line.status in ("hit", "miss")


def test_the_help_says_what_a_jobs_file_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "build or warm up the engines that a jobs file names" in " ".join(build_parser().format_help().split())
    with pytest.raises(SystemExit, match="0"):
        build_parser().parse_args(["warmup", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "precisions" in told and "docs/warmup.md" in told
