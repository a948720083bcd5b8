from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import accel
from accel import cli, commands
from accel.cli import main
from accel.errors import BundleError, InputError
from accel.variant_addition import Addition

ROOT = Path(accel.__file__).parents[1]
Output = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_usage_errors_exit_with_2(capsys: Output) -> None:
    for arguments in ([], ["exprot"], ["run"], ["export", "x"], ["run", "x", "--top-k", "many"]):
        with pytest.raises(SystemExit) as info:
            main(arguments)
        assert info.value.code == 2
    assert "usage: accel" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["run", "b", "hello", "--chat"], {"prompt": "hello"}),
        (["run", "b", "--chat", "hello"], {"prompt": "hello"}),
        (["run", "--chat", "b", "hello"], {"prompt": "hello"}),
        (["run", "b", "--max-new-tokens", "5", "hello"], {"prompt": "hello", "max_new_tokens": 5}),
        (["run", "b", "--chat"], {"prompt": None}),
        (["embed", "b", "--batch-size", "2", "x", "y"], {"texts": ["x", "y"], "batch_size": 2}),
        (["embed", "b", "x", "--json", "y"], {"texts": ["x", "y"]}),
    ],
)
def test_options_and_texts_in_any_order(arguments: list[str], expected: dict[str, object]) -> None:
    found = vars(cli._parse(arguments))
    assert {name: found[name] for name in expected} == expected
    assert found["bundle"] == Path("b")


@pytest.mark.parametrize(
    "arguments",
    [["run", "b", "hello", "--chat", "more"], ["run", "b", "--chat", "two", "texts"], ["run", "b", "--chatt", "hello"],
     ["inspect", "b", "c"], ["bench", "b", "--shapes", "1xq"]],
)  # fmt: skip
def test_what_no_command_takes(arguments: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli._parse(arguments)
    printed = capsys.readouterr().err
    assert "unrecognized arguments" in printed or "'1xq' is no batch and length, such as 8x128" in printed


def test_help_and_version(capsys: Output) -> None:
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in ("export", "run", "embed", "inspect"))):
        with pytest.raises(SystemExit) as info:
            main(arguments)
        assert info.value.code == 0
    printed = capsys.readouterr().out
    assert f"accel {accel.__version__}" in printed
    assert "--min-p" in printed


def test_known_error_is_one_block(capsys: Output, tmp_path: Path) -> None:
    assert run("run", tmp_path / "absent", "hello") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert lines[0] == "Error: There is no bundle directory"
    assert lines[1].strip() == f"at: {tmp_path / 'absent'}"
    assert lines[2].strip().startswith("try: ")
    assert len(lines) == 3


def test_error_as_json(capsys: Output, tmp_path: Path) -> None:
    assert run("run", tmp_path, "hello", "--json") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "BundleError"
    assert error["where"] == str(tmp_path)
    assert "exported first" in error["remedy"]


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCEL_DEBUG", "1")
    with pytest.raises(BundleError):
        run("run", tmp_path, "hello")


def test_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def broken(_: object) -> int:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(commands, "doctor", broken)
    assert run("doctor") == 1
    assert "Unexpected ZeroDivisionError: oops" in capsys.readouterr().err


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "doctor", interrupted)
    assert run("doctor") == 130
    assert "Interrupted" in capsys.readouterr().err


def test_sigterm_is_treated_as_an_interrupt(
    tiny_decoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """A variant that is half made when it comes is gone; afterwards the signal ends the process again."""
    folder = Path(shutil.copytree(tiny_decoder_bundle, tmp_path / "copy"))

    def make(self: Addition, check: bool) -> None:
        (self.extension.path / "w8g32.weights").write_bytes(b"half")
        assert list(folder.glob(".extension.tmp-*"))
        signal.raise_signal(signal.SIGTERM)

    before = sorted(folder.iterdir())
    monkeypatch.setattr(Addition, "make", make)
    assert run("quantize", folder, "--variant", "w8g32") == 143
    assert capsys.readouterr().err == "\nInterrupted.\n"
    assert sorted(folder.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare ``except`` of a library may be what runs when it comes."""

    def go_on(options: object) -> int:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(20)
        return 0

    monkeypatch.setattr(cli, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(commands, "doctor", go_on)
    assert run("doctor") == 143
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("fails", [False, True])
def test_what_sigterm_has_cleaned_up_is_not_interrupted(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """However long it takes, and also where something fails on the way."""
    done: list[str] = []

    @contextlib.contextmanager
    def folder() -> Iterator[None]:
        try:
            yield
        finally:
            try:
                time.sleep(0.2)
                if fails:
                    raise OSError("busy")
            except OSError:
                time.sleep(0.2)
            done.append("removed")

    def work(options: object) -> int:
        with folder():
            signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(cli, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(commands, "doctor", work)
    assert run("doctor") == 143 and done == ["removed"]


def test_interrupt_inside_generated_code_exits_with_130(tmp_path: Path) -> None:
    """CPython remembers such an interrupt and would end ``python -m`` by SIGINT."""
    script = """
import runpy, sys
from accel import commands
commands.doctor = lambda options: exec("raise KeyboardInterrupt")
sys.argv = ["accel", "doctor"]
runpy.run_module("accel", run_name="__main__", alter_sys=True)
"""
    (tmp_path / "interrupted_doctor.py").write_text(script)
    command = [sys.executable, "-m", "interrupted_doctor"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nInterrupted.\n")


def test_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -c 'from accel.cli import main; raise SystemExit(main())' doctor | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_doctor(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accel"] == accel.__version__
    assert run("doctor") == 0
    assert "ort-cpu" in capsys.readouterr().out
    import accel.capabilities as capabilities

    monkeypatch.setattr(capabilities, "_torch_engine", lambda: capabilities.EngineStatus("torch", False, "x", None))
    absent = capabilities.EngineStatus("openvino", False, "x", None)
    monkeypatch.setattr(capabilities, "_openvino_engine", lambda: absent)
    nothing = capabilities.OnnxRuntime((), None, (), False, "onnxruntime is not installed")
    monkeypatch.setattr(capabilities, "probe_onnxruntime", lambda: nothing)
    assert run("doctor") == 1
    assert 'pip install "accelrt[cpu]"' in capsys.readouterr().out


def test_export_and_module_entry(tiny_decoder_source: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "bundle"
    assert run("export", tiny_decoder_source, out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["arch"]["architecture"] == "LlamaForCausalLM"
    assert report["path"] == str(out)
    assert report["parity"]
    assert run("export", tiny_decoder_source, out) == 1
    assert "overwrite" in capsys.readouterr().err
    assert run("export", tiny_decoder_source, out, "--overwrite", "--no-parity", "--recipe", "decoder") == 0
    assert "LlamaForCausalLM, text-generation" in capsys.readouterr().out
    assert run("export", tiny_decoder_source, tmp_path / "other", "--recipe", "decodr") == 1
    assert "Did you mean 'decoder'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    shown = subprocess.run([sys.executable, "-m", "accel", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == f"accel {accel.__version__}"


def test_run_streams_what_generate_returns(tiny_decoder_bundle: Path, capsys: Output) -> None:
    arguments = ("run", tiny_decoder_bundle, "hello", "--max-new-tokens", 8, "--no-do-sample")
    assert run(*arguments) == 0
    streamed = capsys.readouterr()
    assert "[ort-cpu: 8 tokens at" in streamed.err
    assert run(*arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["engine"]["name"] == "ort-cpu"
    (result,) = report["results"]
    assert len(result["ids"]) == 8
    assert streamed.out == f"hello{result['text']}\n"


def test_run_with_sampling_chat_and_several_sequences(tiny_decoder_bundle: Path, capsys: Output) -> None:
    drawn = ("--do-sample", "--temperature", 0.8, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3)
    assert run("run", tiny_decoder_bundle, "hi", *drawn, "--max-new-tokens", 6, "--num-return-sequences", 2) == 0
    assert capsys.readouterr().out.count("--- ") == 2
    chat = ("run", tiny_decoder_bundle, "hi", "--chat", "--system", "be brief", "--max-new-tokens", 6)
    assert run(*chat, "--json") == 0
    answer = json.loads(capsys.readouterr().out)["results"][0]["text"]
    assert run(*chat) == 0
    assert capsys.readouterr().out == answer + "\n"
    with accel.load(tiny_decoder_bundle) as model:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        assert model.chat(messages, max_new_tokens=6).text == answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "nan", "--do-sample"), "temperature"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--max-new-tokens", "100000"), "Error:"),
        (("--system", "x"), "Add --chat"),
        (("--engine", "tensorrt"), "tensorrt"),
    ],
)
def test_run_refuses_bad_options(
    tiny_decoder_bundle: Path, arguments: tuple[str, ...], message: str, capsys: Output
) -> None:
    assert run("run", tiny_decoder_bundle, "hello", *arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_embed_prints_similarities_and_writes_vectors(minilm_bundle: Path, tmp_path: Path, capsys: Output) -> None:
    texts = ["A cat sits.", "A kitten rests.", "Stocks fell."]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts[1:]) + "\n\n")
    assert run("embed", minilm_bundle, texts[0], "--file", file) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    table = np.array(rows, float)
    np.testing.assert_allclose(np.diag(table), 1.0, atol=1e-3)
    assert table[0, 1] > table[0, 2]
    assert run("embed", minilm_bundle, *texts, "--json") == 0
    printed = np.array(json.loads(capsys.readouterr().out)["embeddings"])
    np.testing.assert_allclose(printed @ printed.T, table, atol=1e-3)
    for name in ("v.npy", "v.json"):
        assert run("embed", minilm_bundle, *texts, "--out", tmp_path / name) == 0
    assert "3 vectors of 384 numbers" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), printed, atol=1e-6)
    np.testing.assert_allclose(json.loads((tmp_path / "v.json").read_text()), printed, atol=1e-6)
    assert run("embed", minilm_bundle, texts[0], "--no-normalize", "--out", tmp_path / "raw.npy") == 0
    assert abs(np.linalg.norm(np.load(tmp_path / "raw.npy")) - 1) > 0.01


def test_embed_refuses_bad_input(minilm_bundle: Path, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "latin1").write_bytes(b"caf\xe9\n")
    for arguments, message in (
        ((), "There are no texts"),
        (("",), "Error:"),
        (("a", "--out", tmp_path / "v.csv"), ".npy or .json"),
        (("a", "--out", tmp_path / "absent" / "v.npy"), "cannot be written"),
        (("--file", tmp_path / "absent"), "cannot be read"),
        (("--file", tmp_path / "latin1"), "not UTF-8"),
        (("a", "--pooling", "median"), "median"),
    ):
        assert run("embed", minilm_bundle, *arguments) == 1
        assert message in capsys.readouterr().err


def test_the_wrong_kind_of_bundle(minilm_bundle: Path, tiny_decoder_bundle: Path, capsys: Output) -> None:
    assert run("run", minilm_bundle, "hello") == 1
    assert "Use accel embed" in capsys.readouterr().err
    assert run("embed", tiny_decoder_bundle, "hello") == 1
    assert "Use accel run" in capsys.readouterr().err


def test_inspect(tiny_decoder_bundle: Path, tmp_path: Path, capsys: Output) -> None:
    assert run("inspect", tiny_decoder_bundle, "--verify") == 0
    printed, files = capsys.readouterr(), len(list(tiny_decoder_bundle.iterdir())) - 1  # the manifest itself
    assert "LlamaForCausalLM" in printed.out and f"Verified: {files} files of " in printed.err
    assert run("inspect", tiny_decoder_bundle, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) and "Verified" not in printed.err
    page = tmp_path / "page.html"
    assert run("inspect", tiny_decoder_bundle, "--html", page) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert "<html" in page.read_text()
    broken = tmp_path / "broken"
    shutil.copytree(tiny_decoder_bundle, broken)
    weights = broken / "fp32.weights"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    assert run("inspect", broken, "--verify") == 1
    assert "sha256 differs" in capsys.readouterr().err


@pytest.mark.slow
def test_bench(tiny_decoder_bundle: Path, capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    sizes = ("--prompt-tokens", 16, "--rounds", 3, "--threads", 1)
    assert run("bench", tiny_decoder_bundle, *sizes, "--new-tokens", 64, "--no-compare", "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert printed.err == "", "nothing but the object"
    assert [row["metric"] for row in report["rows"]] == ["16+64 tokens: first token", "16+64 tokens: per token"]
    assert all(row["accel_ms"] > 0 for row in report["rows"])
    assert report["chosen"] == "ort-cpu fp32" and report["remembered"] and "torch" not in report["passed_over"]
    assert {row["engine"] for row in report["engines"]} >= {"ort-cpu"} and report["engines"][0]["cost"] > 0
    with accel.load(tiny_decoder_bundle, threads=1) as lm:
        assert lm.engine.why.startswith("measured: ")
    with accel.load(tiny_decoder_bundle, threads=2) as lm:
        assert lm.engine.why == "", "with other threads nothing was measured"
    assert run("bench", tiny_decoder_bundle, *sizes[:2], "--rounds", 1, "--no-compare") == 0
    printed = capsys.readouterr()
    assert "Not remembered for accel.load: 1 rounds are too few" in printed.out
    assert printed.err.startswith("ort-cpu fp32: ready after ") and "\nround 1 of 1: ort-cpu fp32 " in printed.err
    assert run("bench", tiny_decoder_bundle, *sizes, "--new-tokens", 0) == 1
    assert "do not fit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("bench", tiny_decoder_bundle, "--shapes", "8by128")


def test_every_generation_option_reaches_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    class Model:
        def __enter__(self) -> Model:
            return self

        def __exit__(self, *_: object) -> None: ...

        def generate(self, prompt: str, **options: object) -> None:
            given.update(options, prompt=prompt)
            raise InputError("seen")

    monkeypatch.setattr(commands, "_check_kind", lambda *_: None)
    monkeypatch.setattr(accel, "load", lambda *_, **options: given.update(options) or Model(), raising=False)
    values = {"max-new-tokens": 1, "min-new-tokens": 2, "top-k": 3, "seed": 4, "num-return-sequences": 5, "capacity": 6}
    values |= {"temperature": 0.5, "top-p": 0.25, "min-p": 0.125, "repetition-penalty": 1.5, "threads": 7}
    flags = [item for name, value in values.items() for item in (f"--{name}", value)]
    assert run("run", "b", "p", *flags, "--stop", "a", "--stop", "b", "--do-sample", "--strict") == 1
    expected = {name.replace("-", "_"): value for name, value in values.items()}
    assert given == expected | {
        "prompt": "p", "stop": ["a", "b"], "do_sample": True, "strict": True,
        "engine": "auto", "device": "auto", "variant": "auto", "store": None,
    }  # fmt: skip
