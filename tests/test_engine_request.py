"""What is asked of an engine: what is filled in, what is refused before anything is made, and what its key tells."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import accel
from accel import engine_request
from accel.bundle import Bundle, file_entry
from accel.engine_build import build
from accel.engine_request import load_builder, prepare, settle
from accel.engines.tensorrt.adapter import load_flavour
from accel.errors import AccelError, BundleError, DependencyError, InputError, RecipeError
from accel.recipe import read_yaml
from accel.store import EngineStore
from accel.variants import add_variant
from tests.test_engine_build import PROFILES, RANGE, SMALL, bundle, fp16_decoder, key_of, own_cache

__all__ = ["bundle", "fp16_decoder", "own_cache"]  # fixtures
pytest.importorskip("tensorrt_rtx")


def test_keys_tell_engines_apart(bundle: Path) -> None:
    add_variant(bundle, "bf16", check=False)
    changes: list[dict[str, Any]] = [
        {}, {"precision": "bf16"}, {"capacity": 128}, {"max_batch": 4}, {"sm": "sm89"}, {"optimization_level": 1},
        {"workspace": 1 << 28}, {"profiles": PROFILES},
    ]  # fmt: skip
    digests = [key_of(bundle, **change) for change in changes]
    assert len(set(digests)) == len(changes)
    assert digests == [key_of(bundle, **change) for change in changes]
    assert key_of(bundle, sm="SM86") == key_of(bundle, sm=["sm86"]) == digests[0]
    assert key_of(bundle, workspace="256MiB") == digests[6]
    assert key_of(bundle, precision="fp16") == digests[0]


def test_copies_of_a_bundle_share_engines(bundle: Path, tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    """Also where each added the variant itself."""
    other = add_variant(shutil.copytree(tiny_decoder_bundle, tmp_path / "other"), "fp16").path
    assert key_of(other) == key_of(bundle)


@pytest.mark.parametrize("part", ["weights", "graph", "norms in the fp32 file"])
def test_another_bundle_has_another_key(bundle: Path, part: str) -> None:
    """Changed bytes are an error, and another key where the manifest was changed with them."""
    names = {"weights": "fp16.weights", "graph": "fp16.tensorrt.onnx", "norms in the fp32 file": "fp32.weights"}
    before, path = key_of(bundle), bundle / names[part]
    data = bytearray(path.read_bytes())
    if part == "graph":
        place = data.index(b"logits_positions")
        data[place : place + 1] = b"L"
    else:
        data[100] ^= 1
    path.write_bytes(data)
    if part == "norms in the fp32 file":  # no byte of the fp16 engine comes from there
        assert key_of(bundle) == before
        return
    with pytest.raises(BundleError, match=f"sha256 differs .*{names[part]}"):
        key_of(bundle)
    describe_again(bundle, names[part])
    assert key_of(bundle) != before


def describe_again(bundle: Path, name: str) -> None:
    """The manifest takes a changed file for the right one."""
    from accel.bundle import file_entry

    data = json.loads((bundle / "manifest.json").read_text())
    entry = file_entry(bundle / name)
    data["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_an_encoder(minilm_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(minilm_bundle, tmp_path / "minilm"))
    with pytest.raises(InputError, match="capacity sizes a decoder's cache"):
        build(folder, "rtx", "sm86", capacity=64)
    assert "fp16" not in Bundle.open(folder).manifest.variants  # it was said before anything was made
    (request,) = prepare(Bundle.open(folder), load_flavour("rtx"), "sm89")
    assert request.max_batch == 32 and request.key.capacity is None
    assert request.key.profiles["encode"]["input_ids"] == ((1, 1), (32, 128), (32, 512))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"precision": "fp61"}, InputError, "unknown variant 'fp61'.*Did you mean"),
        ({"precision": "fp8", "sm": "sm86"}, InputError, "sm86 does not compute in fp8: sm89 was the first"),
        ({"sm": "sm90"}, InputError, "does not support sm90"),
        ({"sm": []}, InputError, "No SM"),
        ({"sm": ["sm86", "sm86"]}, InputError, "stands twice"),
        ({"sm": "sm86,,sm89"}, InputError, "'' is not the name of an SM"),
        ({"sm": "sm75", "precision": "bf16"}, InputError, "sm75 does not compute in bf16: sm80 was the first.*fp16"),
        ({"sm": "sm75", "precision": "fp32"}, InputError, "no matrices in fp32 on sm75: sm80 is the first.*fp16"),
        ({"sm": 8.6}, InputError, "8.6 is not the name of an SM.*Write it like"),
        ({"sm": None}, InputError, "None is not the name of an SM"),
        ({"sm": [True]}, InputError, "True is not the name of an SM"),
        ({"profiles": "p.yaml"}, InputError, "mapping, not 'p.yaml'.*--profiles"),
        ({"precision": 16}, InputError, "16 is no precision.*'fp16'"),
        ({"optimization_level": True}, InputError, "no optimization level True"),
        ({"workspace": [1]}, InputError, "is no size"),
        ({"hardware_compatibility": "some"}, InputError, "no hardware compatibility 'some'.*ampere"),
        ({"workspace": "2 gallons"}, InputError, "'2 gallons' is no size.*at workspace"),
        ({"workspace": "0"}, InputError, "workspace must be at least 1 byte"),
        ({"capacity": 0}, InputError, "capacity must be"),
        ({"capacity": 1024}, InputError, "1024 is more than the model's 512 positions"),
        ({"max_batch": -1}, InputError, "max_batch must be"),
        ({"optimization_level": 9}, InputError, "no optimization level 9"),
        ({"hardware_compatibility": "same"}, InputError, "hardware compatibility"),
        ({"profiles": {"decode": {"batch": RANGE}}}, RecipeError, "sequence"),
        ({"profiles": {}}, InputError, "There is no profile"),
        ({"profiles": {"a": {"batch": {"min": 3, "opt": 2, "max": 1}, "sequence": RANGE}}}, InputError, "not 3, 2, 1"),
        ({"profiles": {"a": {"batch": RANGE, "sequence": {"min": 1, "opt": 8, "max": 65}}}}, InputError, "to 65"),
        ({"profiles": {"a": {"batch": {"min": 2, "opt": 2, "max": 2}, "sequence": RANGE}}}, InputError, "no profile"),
    ],
)
def test_wrong_requests(
    bundle: Path, tmp_path: Path, changes: dict[str, Any], error: type[AccelError], message: str
) -> None:
    with pytest.raises(error, match=f"(?i){message}"):
        build(bundle, store=tmp_path / "store", **{**SMALL, **changes})
    assert EngineStore(tmp_path / "store").entries() == []


@pytest.mark.parametrize("sm", [86, "86", ["86"], (86,), "sm86"])
def test_an_sm_by_its_number(bundle: Path, sm: Any) -> None:
    (request,) = prepare(Bundle.open(bundle), load_flavour("rtx"), sm, capacity=64)
    assert request.key.sm == ("sm86",)


@pytest.mark.parametrize("path", ["", None, 3])
def test_a_path_that_is_none(path: Any) -> None:
    with pytest.raises(InputError, match="is not the path of a bundle.*accel.export"):
        build(path, **SMALL)


def test_nothing_is_added_for_a_request_that_is_wrong(tiny_decoder_bundle: Path, tmp_path: Path) -> None:
    """All that needs no graph is checked before a precision is added."""
    folder = Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "bundle"))
    for changes in (
        {"capacity": 1024}, {"capacity": 63}, {"sm": "sm75", "precision": "bf16"}, {"precision": "fp8"},
        {"sm": "sm75", "precision": "fp32"},
        {"profiles": {"a": {"batch": RANGE, "sequence": {"min": 1, "opt": 8, "max": 65}}}},
        {"profiles": {"a": {"batch": {"min": 2, "opt": 2, "max": 2}, "sequence": RANGE}}},
    ):  # fmt: skip
        with pytest.raises(InputError):
            build(folder, **{**SMALL, **changes})
    assert set(Bundle.open(folder).manifest.variants) == {"fp32"}
    (request,) = prepare(Bundle.open(folder), load_flavour("rtx"), "sm80", precision="bf16", capacity=64)
    assert request.variant == "bf16"


def test_capacity_is_the_model_s_where_it_is_short(bundle: Path) -> None:
    (request,) = prepare(Bundle.open(bundle), load_flavour("rtx"), "sm86")
    assert request.settings.capacity == request.key.capacity == 512 and request.max_batch == 8


def test_sm_auto_without_a_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_request, "current_sm", lambda: None)
    for asked in ("auto", ["auto"]):
        with pytest.raises(InputError, match="no GPU here to build for .*at sm.*--sm sm89.*sm120"):
            build(bundle, "rtx", asked)
    monkeypatch.setattr(engine_request, "current_sm", lambda: "sm120")
    (request,) = prepare(Bundle.open(bundle), load_flavour("rtx"), "auto")
    assert request.key.sm == ("sm120",)


@pytest.mark.parametrize("target", ["tensorrt", "rtx"])
def test_the_flavour_that_is_installed_is_named(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    def missing(name: str) -> Any:
        raise DependencyError(f"{name} is not installed", where=name, remedy="Run: pip install it")

    other = {"tensorrt": "rtx", "rtx": "tensorrt"}[target]
    monkeypatch.setattr(engine_request, "load_flavour", missing)
    monkeypatch.setattr(engine_request, "find_spec", lambda name: name == engine_request.MODULES[other] or None)
    with pytest.raises(DependencyError, match=f"pip install it; or build for .*installed: --target {other} "):
        load_builder(target)
    monkeypatch.setattr(engine_request, "find_spec", lambda _: None)
    with pytest.raises(DependencyError, match="pip install it$"):
        load_builder(target)


def test_the_profiles_of_the_docs(bundle: Path, tmp_path: Path, minilm_bundle: Path) -> None:
    text = (Path(engine_request.__file__).parents[1] / "docs" / "build.md").read_text(encoding="utf-8")
    decoder, encoder = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    for example, model in ((decoder, bundle), (encoder, shutil.copytree(minilm_bundle, tmp_path / "minilm"))):
        file = tmp_path / "profiles.yaml"
        file.write_text(example)
        found = settle(Bundle.open(model), load_flavour("rtx"), "sm86", profiles=read_yaml(file))
        names = [profile.name for profile in found.settings.profiles]
        assert names == list(yaml.safe_load(example)) and found.max_batch == (16 if model == bundle else 64)


def test_profiles_of_the_recipe_come_with_the_bundle(tiny_decoder_source: Path, tmp_path: Path) -> None:
    """What is asked of the build itself goes first."""
    recipe: dict[str, Any] = {"parity": {"enabled": False}, "profiles": PROFILES}
    opened, flavour = accel.export(tiny_decoder_source, tmp_path / "bundle", recipe), load_flavour("rtx")

    def ranges(**asked: Any) -> dict[str, tuple[int, int]]:
        settled = settle(opened, flavour, "sm86", capacity=64, **asked)
        return {profile.name: (profile.batch.max, profile.sequence.max) for profile in settled.settings.profiles}

    assert ranges() == {"prefill": (1, 32), "decode": (4, 1)}
    assert ranges(max_batch=2) == {"prefill": (1, 64), "decode": (2, 1)}  # the usual ones
    assert ranges(profiles={"all": {"batch": RANGE, "sequence": RANGE}}) == {"all": (1, 1)}
    with pytest.raises(InputError, match="The sequence goes up to 32, the capacity to 16 .at profile prefill"):
        settle(opened, flavour, "sm86", capacity=16)
    recipe["profiles"] = {"long": {"batch": RANGE, "sequence": {"min": 1, "opt": 8, "max": 1024}}}
    with pytest.raises(InputError, match="The sequence goes up to 1024, the model's positions to 512"):
        accel.export(tiny_decoder_source, tmp_path / "other", recipe)
    assert not (tmp_path / "other").exists()


KEY = """
import sys, time
from accel.bundle import Bundle
from accel.engine_request import prepare
from accel.engines.tensorrt.adapter import load_flavour
flavour = load_flavour("rtx")
started = time.perf_counter()
(request,) = prepare(Bundle.open(sys.argv[1]), flavour, "sm86", capacity=64, max_batch=2)
seconds = time.perf_counter() - started
print(seconds, request.key.digest, *(name for name in ("torch", "onnx_ir", "onnxscript") if name in sys.modules))
"""


@pytest.mark.slow
def test_the_key_of_a_gigabyte_is_there_at_once_when_warm(bundle: Path, own_cache: Path) -> None:
    """In a process of its own, the imports that it takes included."""
    weights, manifest = bundle / "fp16.weights", bundle / "manifest.json"
    with weights.open("r+b") as stream:
        stream.truncate(1 << 30)
    data, entry = json.loads(manifest.read_text()), file_entry(weights)
    data["files"][weights.name] = {"size": entry.size, "sha256": entry.sha256}
    manifest.write_text(json.dumps(data))
    environment = {**os.environ, "PYTHONPATH": str(Path(accel.__file__).parents[1]), "ACCEL_CACHE": str(own_cache)}
    command = [sys.executable, "-c", KEY, str(bundle)]
    answers = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        answers.append(done.stdout.split())
    (_, first), (warm, second) = answers  # and nothing heavy was imported
    assert first == second and float(warm) < 2
