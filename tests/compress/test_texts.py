from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from accel.bundle import Bundle
from accel.compress.builtin_texts import TEXTS
from accel.compress.texts import resolve_calibration
from accel.errors import InputError
from accel.quality.texts import PASSAGES
from accel.runtime.text import Tokenizer
from accel.spec import ArchSpec

WORDS = "the quick brown fox jumps over the lazy dog " * 20


@pytest.fixture(scope="module")
def decoder(tiny_decoder_bundle: Path) -> tuple[ArchSpec, Tokenizer]:
    bundle = Bundle.open(tiny_decoder_bundle)
    return bundle.manifest.arch, Tokenizer.from_bundle(bundle)


def test_built_in_texts_are_varied_and_not_those_that_quality_is_measured_on() -> None:
    assert len(TEXTS) == 64 == len(set(TEXTS))
    assert all(150 < len(text) < 700 for text in TEXTS)

    def parts(texts: tuple[str, ...]) -> set[str]:
        words = [text.split() for text in texts]
        return {" ".join(some[at : at + 6]) for some in words for at in range(len(some) - 5)}

    assert not parts(TEXTS) & parts(PASSAGES)


def test_a_decoder_gets_long_samples(decoder: tuple[ArchSpec, Tokenizer]) -> None:
    arch, tokenizer = decoder
    found = resolve_calibration(None, arch, tokenizer)
    assert found.name == "built-in" and found.tokens <= 16384
    assert {len(sample) for sample in found.samples[:-1]} == {512}
    assert tokenizer.decode(found.samples[0].tolist()).startswith(TEXTS[0][:200])
    assert resolve_calibration(None, arch, tokenizer).sha256 == found.sha256
    narrow = resolve_calibration(None, dataclasses.replace(arch, max_positions=64), tokenizer)
    assert max(map(len, narrow.samples)) == 64
    assert resolve_calibration(None, arch, tokenizer, max_tokens=1000).tokens == 1000


def test_an_encoder_gets_passages(minilm_bundle: Path) -> None:
    bundle = Bundle.open(minilm_bundle)
    tokenizer = Tokenizer.from_bundle(bundle)
    found = resolve_calibration(None, bundle.manifest.arch, tokenizer)
    assert len(found.samples) == len(TEXTS) and found.samples[3].tolist() == tokenizer.encode(TEXTS[3])


def test_a_file_and_lists(tmp_path: Path, decoder: tuple[ArchSpec, Tokenizer]) -> None:
    arch, tokenizer = decoder
    path = tmp_path / "text.txt"
    path.write_text(f"{WORDS}\r\n\r\n{WORDS}\n \n\n{WORDS}", encoding="utf-8-sig")
    found = resolve_calibration(path, arch, tokenizer)
    assert found.name == "text.txt"
    assert found.sha256 == resolve_calibration([WORDS.strip()] * 3, arch, tokenizer).sha256
    ids = [list(range(10)) * 20, np.arange(90, dtype=np.int32)]
    given = resolve_calibration(ids, arch, None)
    assert given.name == "given" and [len(sample) for sample in given.samples] == [200, 90]
    assert all(sample.dtype == np.int64 for sample in given.samples)


def test_empty(tmp_path: Path, decoder: tuple[ArchSpec, Tokenizer]) -> None:
    arch, tokenizer = decoder
    path = tmp_path / "text.txt"
    path.write_text(" \n\n ")
    for source, where in ((path, "text.txt"), ([], "calibration"), (["", " "], "calibration")):
        with pytest.raises(InputError, match=f"the calibration data is empty.*{where}.*Give at least 256 tokens"):
            resolve_calibration(source, arch, tokenizer)


def test_too_short(decoder: tuple[ArchSpec, Tokenizer]) -> None:
    arch, tokenizer = decoder
    with pytest.raises(InputError, match=r"too short: 200 tokens, and 256 are the least \(at given\).*built-in"):
        resolve_calibration([list(range(10)) * 20], arch, tokenizer)
    with pytest.raises(InputError, match="too short"):
        resolve_calibration(["a few words"], arch, tokenizer)


def test_wrong_form(tmp_path: Path, decoder: tuple[ArchSpec, Tokenizer]) -> None:
    arch, tokenizer = decoder
    wrong = [
        (["text", [1, 2, 3]], r"neither a text nor token ids.*at calibration\[0\].*not both"),
        ([[1, 2], [0.5, 1.5]], r"neither a text nor token ids: \[0.5, 1.5\].*at calibration\[1\]"),
        ([[1, 2], [3, [4]]], r"neither a text nor token ids.*at calibration\[1\]"),
        ([[1, 2], [3]], r"neither a text nor token ids: \[3\].*at calibration\[1\]"),
        ([{"text": "x"}], "neither a text nor token ids"),
        ([[1, 999999]], "999999 is no token of a vocabulary of"),
        (5, "5 is no calibration data"),
        ({"text": "x"}, "is no calibration data"),
        ([[1] * 5000], "5000 tokens are more than the model's 512 positions"),
        (tmp_path / "missing.txt", "cannot be read: No such file.*missing.txt"),
    ]
    for source, message in wrong:
        with pytest.raises(InputError, match=message):
            resolve_calibration(source, arch, tokenizer)  # type: ignore[arg-type]
    path = tmp_path / "latin.txt"
    path.write_bytes("Grüße".encode("latin-1") * 100)
    with pytest.raises(InputError, match="not UTF-8.*latin.txt.*Convert"):
        resolve_calibration(path, arch, tokenizer)
    path.write_text('[{"text": "' + WORDS + '"}]')
    with pytest.raises(InputError, match="the calibration text is JSON"):
        resolve_calibration(path, arch, tokenizer)
    path.write_bytes(b"\0" * 5000)
    with pytest.raises(InputError, match="the calibration text is binary"):
        resolve_calibration(path, arch, tokenizer)
    with pytest.raises(InputError, match="no tokenizer.*Give token ids"):
        resolve_calibration(None, arch, None)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_no_more_is_tokenized_than_is_looked_at(
    decoder: tuple[ArchSpec, Tokenizer], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of one line of hundreds of megabytes would keep a tokenizer busy for an hour."""
    arch, tokenizer = decoder
    arch, seen = dataclasses.replace(arch, kind=kind), list[int]()
    encode, encode_batch = tokenizer.encode, tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode", lambda text, **more: (seen.append(len(text)), encode(text, **more))[1])
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts, **more: (seen.extend(map(len, texts)), encode_batch(texts, **more))[1]
    )
    found = resolve_calibration([WORDS * 1000] * 3, arch, tokenizer, max_tokens=1024)
    assert 1000 <= found.tokens <= 1024 and sum(seen) <= 3 * 1024 * 64 + 2
