from __future__ import annotations

from pathlib import Path

import pytest

from accel.bench.main import choose
from accel.errors import InputError
from tests.loaded_modules import load_module


def test_suite_is_cut_down_to_the_peers_asked_for() -> None:
    assert choose("decoder", ["genai", "accel"]).peers == ("accel", "genai")
    assert len(choose("decoder", None).peers) > 2


def test_subject_takes_the_place_of_the_suites_own() -> None:
    suite = choose("int8-decoder", None, "accel")
    assert suite.subject == suite.peers[0] == "accel" and "accel-w8a8-dyn" not in suite.peers
    assert suite.targets == choose("int8-decoder", None).targets
    with pytest.raises(InputError, match="'genai' is no variant of accel.*accel-w4g32"):
        choose("int8-decoder", None, "genai")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InputError, match="no suite is called 'train'.*encoder, embed"):
        choose("train", None)
    with pytest.raises(InputError, match="suite embed has no peer genai.*sentence-transformers"):
        choose("embed", ["accel", "genai"])


def test_script_parses_and_reports_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_module(Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py")
    assert script.parse(["--suite", "gpt2", "--quick"]).quick
    assert script.main(["--suite", "embed", "--peers", "genai", "--cache", str(tmp_path)]) == 2
    assert "suite embed has no peer genai" in capsys.readouterr().err
