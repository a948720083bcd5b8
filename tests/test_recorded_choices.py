"""What a record of integers says of how to choose them again: commands are complete, differences are told."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest

from accel.bundle import Bundle
from accel.cli import main
from accel.manifest import Quantization, QuantizedLayer
from accel.recorded_choices import options_of
from accel.variants import add_variant


@pytest.fixture
def decoder(tiny_decoder_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "decoder")).resolve()


def test_the_command_chooses_as_it_was_chosen(
    decoder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    keep = {"*.o_proj.weight": 32, "model.layers.0.mlp.down_proj.weight": 8}
    made = add_variant(decoder, "w4g32", algorithm="rtn", keep=keep, head_bits=8, check=False, measure=False)
    known = made.full_manifest.variants["w4g32"].quantization
    (decoder / "w4g32.weights").unlink()
    told = str(Bundle.open(decoder).lost_reason("w4g32", "ort-cpu"))
    options = "--algorithm rtn --head-bits 8 --keep model.layers.0.mlp.down_proj.weight=8 --keep '*.o_proj.weight=32'"
    assert f"--variant w4g32 --target ort-cpu {options} makes it again" in told
    command = [*shlex.split(told[told.index("quantize ") : told.index(" makes it")]), "--no-parity", "--no-quality"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["mended"], found["made_otherwise"]) == (["w4g32/ort-cpu"], {})
    assert Bundle.open(decoder).variant("w4g32").quantization == known and "otherwise" not in caplog.text
    (decoder / "w4g32.2.weights").unlink()
    plain = ["quantize", str(decoder), "--variant", "w4g32", "--algorithm", "rtn", "--no-parity", "--no-quality"]
    assert main(plain) == 0
    assert "; made otherwise than what was lost: " in capsys.readouterr().out


def test_options_that_choose_the_same_again(decoder: Path) -> None:
    """By what is recorded; what defaults choose without measuring is not named."""
    layers = ("model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight")
    names = [form.format(block) for block in range(8) for form in layers]
    wide = ("model.embed_tokens.weight", "lm_head.weight")  # by the manifest's shapes
    plain = Bundle.open(decoder).manifest

    def options(name: str, algorithm: str, *widths: int, kept: dict[str, str] | None = None) -> tuple[str, str]:
        bits = [*widths, *[widths[-1]] * (len(names) + 2 - len(widths))]
        found = tuple(QuantizedLayer(one, width, 32, 0.0) for one, width in zip((*wide, *names), bits))
        made = Quantization(name, algorithm, None, 0, found, 0, 0, kept=kept or {})
        variant = dataclasses.replace(plain.variants["fp32"], quantization=made)
        return options_of(dataclasses.replace(plain, variants={name: variant}), name)

    assert options("w8g32", "rtn", 8) == options("w8g32+kv8", "rtn", 8) == ("", "")
    assert options("fp8", "max", 8) == options("tiny", "rtn", 8) == ("", "")
    assert options("w8a8", "rtn", 8) == ("--algorithm rtn", "")
    assert options("w4g32", "gptq", 8, 8, 4) == ("--head-bits 8", "")
    head = "--keep model.embed_tokens.weight=8 --keep lm_head.weight=4"
    assert options("w4g32", "gptq", 8, 4) == (head, "")
    assert options("w8g32", "rtn", 8, 4, 8) == ("--keep lm_head.weight=4", "")
    assert options("w8g32", "rtn", 8, 8, 4, 8, 4, 8) == (
        "--keep model.layers.0.self_attn.q_proj.weight=4 --keep model.layers.1.self_attn.q_proj.weight=4",
        "",
    )
    assert options("w8g32", "rtn", 8, 8, 4) == ("--keep '*.q_proj.weight=4' --keep '*.up_proj.weight=4'", "")
    assert options("w8g32", "rtn", 8, kept={"other": "2 outputs: too few", "raised": "raised: it lost 1%"}) == (
        "--keep raised=32",
        "",
    )
    many = (8, 8, *[4, 8] * 7, 8)
    assert options("w8g32", "gptq", *many) == ("--algorithm gptq", "without the --keep of 7 layers that it had")
