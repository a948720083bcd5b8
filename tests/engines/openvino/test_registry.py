"""Why the engine cannot run here, with or without the package."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import accel
from accel import capabilities
from accel.bundle import Bundle
from accel.engines import ENGINES, open_session
from accel.engines.openvino import package, registry
from accel.errors import DependencyError, EngineUnavailableError, InputError
from accel.manifest import GraphEntry, Variant
from accel.spec import ArchSpec
from accel.variants import add_variant
from tests.engines.openvino.needs import needs_openvino

ENTRY = GraphEntry("g.onnx", 24, (), (), ())


def with_graphs(bundle: Bundle, *variants: str) -> Bundle:
    made = {name: Variant("float32", (), {"openvino": ENTRY}) for name in variants}
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, variants={**bundle.manifest.variants, **made}))


@pytest.fixture
def encoder(minilm_bundle: Path) -> Bundle:
    return Bundle.open(minilm_bundle)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "import_openvino", lambda: None)


@pytest.mark.usefixtures("installed")
def test_reasons(encoder: Bundle, tiny_decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "runs encoders only" in str(registry.probe(Bundle.open(tiny_decoder_bundle), "auto"))
    missing = str(registry.probe(encoder, "auto"))
    assert missing.endswith(f"accel quantize {encoder.path} --variant fp32 --target openvino adds it")
    assert "--variant bf16 --target openvino" in str(registry.probe(encoder, "bf16"))
    assert "runs fp32 and bf16 here, not fp16" in str(registry.probe(with_graphs(encoder, "fp16"), "fp16"))
    monkeypatch.setattr(registry, "open_core", lambda: None)
    for able in (True, False):
        monkeypatch.setattr(registry, "computes_bfloat16", lambda core, able=able: able)
        reason = registry.probe(with_graphs(encoder, "bf16"), "bf16")
        assert reason is None if able else "no bfloat16 instructions" in str(reason)


def test_rounding_is_never_picked(encoder: Bundle) -> None:
    assert registry.pick_precision(with_graphs(encoder, "bf16"), "auto") is None
    assert registry.pick_precision(with_graphs(encoder, "bf16", "fp32"), "auto") == "fp32"
    assert registry.pick_precision(with_graphs(encoder, "bf16"), "bf16") == "bf16"


def test_its_place_in_the_order() -> None:
    assert [engine.name for engine in ENGINES if engine.device == "cpu"] == ["ort-cpu", "openvino", "torch"]


@pytest.mark.parametrize("version", [None, "2024.6.0"])
def test_a_package_that_is_missing_or_old(
    encoder: Bundle, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (package, capabilities):
        monkeypatch.setattr(module, "version_of", lambda name: version if name == "openvino" else None)
    why = "openvino is not installed" if version is None else "openvino 2024.6.0 is too old: 2025.4"
    with pytest.raises(DependencyError, match=rf'{why}.*pip install "accelrt\[openvino\]"'):
        package.import_openvino()
    with pytest.raises(EngineUnavailableError, match=why):
        open_session(encoder, engine="openvino")
    row = capabilities._openvino_engine()
    assert not row.available and why in row.reason and 'accelrt[openvino]"' in str(row.install)
    assert package.is_installed() == (version is not None)
    reason = registry.probe(with_graphs(encoder, "fp16"), "fp16")
    assert reason == "OpenVINO runs fp32 and bf16 here, not fp16", "installing it would not help"


def test_a_package_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "version_of", lambda name: "2026.4.1")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyError, match="openvino cannot be imported"):
        package.import_openvino()
    monkeypatch.setitem(sys.modules, "openvino", sys)
    with pytest.raises(DependencyError, match="^openvino is damaged: its folder holds no usable package") as found:
        package.import_openvino()
    assert str(found.value).count(package.INSTALL) == 1


def test_what_it_refuses_to_add(encoder: Bundle, tiny_decoder_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"OpenVINO cannot run this decoder as fp32.*Targets that can"):
        add_variant(tiny_decoder_bundle, "fp32", target="openvino")
    for variant in ("fp16", "w8a8-dyn"):
        with pytest.raises(InputError, match="it runs fp32 and bf16 here"):
            add_variant(encoder, variant, target="openvino")


def test_without_the_package_nothing_is_added(encoder: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel.variant_targets import sensible_targets

    arch: ArchSpec = encoder.manifest.arch
    monkeypatch.setattr(package, "version_of", lambda name: "2026.4.1")
    assert "openvino" in sensible_targets(arch, "bf16")
    monkeypatch.setattr(package, "version_of", lambda name: None)
    assert "openvino" not in sensible_targets(arch, "bf16"), "accel quantize asks for what can be checked"


@needs_openvino
def test_the_doctor_says_that_it_runs() -> None:
    row = capabilities._openvino_engine()
    assert row.available and row.install is None and "encoders" in row.reason


@needs_openvino
def test_importing_it_tells_nobody() -> None:
    """openvino reports every import to Google Analytics unless its telemetry package is out of reach."""
    code = """
import sys
from accel.engines.openvino.package import import_openvino, open_core
openvino = import_openvino()
print("openvino_telemetry" in sys.modules, open_core().available_devices)
from openvino.tools.ovc import telemetry_utils
print(telemetry_utils.tm.__name__)
import openvino_telemetry
print("importable for whoever wants it")
"""
    roots = [str(Path(accel.__file__).parents[1]), str(Path(accel.__file__).parents[1] / "kernels")]
    done: Any = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {roots!r}\n{code}"], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "False ['CPU']", done.stderr
    assert lines[1].endswith("telemetry_stub") and len(lines) == 3
