"""The command ``accel``: argparse over the package's functions.

Exit codes: 0 done, 1 an error that is explained, 2 wrong usage, 130 interrupted, 143 ended by SIGTERM, which is treated
as Ctrl-C is: nothing half made is left behind. A warm-up that builds ends with its report and 130 after either.
ACCEL_DEBUG=1 shows the traceback of an error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import accel
from accel import build_commands, commands, engine_commands, variant_commands
from accel.errors import AccelError

AGAIN_SECONDS = 2.0  # after SIGTERM, between two looks whether the command ends


class _Terminated(KeyboardInterrupt):
    """SIGTERM: whatever cleans up after Ctrl-C does so after it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (wrong usage raises SystemExit(2), as argparse does)."""
    options = _parse(arguments)
    try:
        with _terminable():
            code: int = options.command(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print("\nInterrupted.", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("ACCEL_DEBUG") == "1":
            raise
        report_error(error, as_json=getattr(options, "json", False))
        return 1


@contextmanager
def _terminable() -> Iterator[None]:
    """Meanwhile SIGTERM raises, unless somebody else handles or ignores it. Main thread only, else nothing.

    It comes once, and some code swallows what is raised in it (a bare ``except`` around an import, a finalizer): it is
    raised again and again until the command unwinds.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
        raise _Terminated

    def end_again(*_: object) -> None:
        if not _unwinds(sys.exc_info()[1]):
            raise _Terminated

    signal.signal(signal.SIGTERM, end)
    alarm = signal.signal(signal.SIGALRM, end_again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unwinds(error: BaseException | None) -> bool:
    """Whether what is handled right now, by a ``finally`` for instance, goes back to SIGTERM."""
    while error is not None and not isinstance(error, _Terminated):
        error = error.__context__
    return error is not None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand before, between and behind texts; argparse takes only the first run of positionals."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    texts = rest if not any(word.startswith("-") for word in rest) else []
    if texts and isinstance(getattr(options, "texts", None), list):
        options.texts += texts
    elif len(texts) == 1 and getattr(options, "prompt", "") is None:
        options.prompt = texts[0]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def report_error(error: Exception, as_json: bool) -> None:
    """Prints an error as one red block to stderr, or as a JSON object to stdout."""
    known = isinstance(error, AccelError)
    what = error.what if isinstance(error, AccelError) else f"Unexpected {type(error).__name__}: {error}"
    where = error.where if isinstance(error, AccelError) else None
    remedy = error.remedy if isinstance(error, AccelError) else "This is a bug: ACCEL_DEBUG=1 shows where it happened"
    if as_json:
        kind = type(error).__name__ if known else "InternalError"
        print(json.dumps({"error": {"type": kind, "what": what, "where": where, "remedy": remedy}}))
        return
    from rich.console import Console
    from rich.text import Text

    lines = [f"Error: {what}", *([f"   at: {where}"] if where else []), *([f"  try: {remedy}"] if remedy else [])]
    Console(stderr=True, soft_wrap=True).print(Text("\n".join(lines), style="red"))


def build_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand's function stands in ``command``."""
    parser = argparse.ArgumentParser(prog="accel", description="Exports transformer models and runs them fast.")
    parser.add_argument("--version", action="version", version=f"accel {accel.__version__}")
    sub = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_export(sub.add_parser("export", help="export a model to a bundle"))
    _add_run(sub.add_parser("run", help="generate text with a bundle"))
    _add_embed(sub.add_parser("embed", help="embed texts with a bundle"))
    _add_inspect(sub.add_parser("inspect", help="show what is in a bundle"))
    _add_report(sub.add_parser("report", help="compare a bundle's precisions with fp32: quality, size, time"))
    _add_quantize(sub.add_parser("quantize", help="add a precision to a bundle, or drop one"))
    _add_build(sub.add_parser("build", help="build a bundle's TensorRT engines"))
    _add_cache(sub.add_parser("cache", help="list, check and remove built engines"))
    _add_doctor(sub.add_parser("doctor", help="show what this machine can run and what is missing"))
    _add_bench(sub.add_parser("bench", help="measure a bundle's engines, and remember the fastest"))
    _add_warmup(sub.add_parser("warmup", help="build or warm up the engines that a jobs file names, and measure them"))
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a local folder, a GGUF file, or a hub id")
    parser.add_argument("out", type=Path, help="the bundle's directory")
    parser.add_argument("--recipe", help="a packaged recipe's name, or a YAML file")
    parser.add_argument("--task", help="e.g. feature-extraction; default: read from the architecture")
    parser.add_argument("--max-positions", type=int, metavar="N", help="longest sequence; default: the model's own")
    parser.add_argument("--variant", action="append", metavar="NAME", help="add a variant too; may be repeated")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the checkpoint brings")
    parser.add_argument("--no-parity", action="store_true", help="skip the comparison with PyTorch")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that stands at OUT")
    _finish(parser, commands.export)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt", nargs="?", help="the text to continue; default: standard input")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    parser.add_argument("--system", help="a system message (with --chat)")
    group = parser.add_argument_group("generation, as in transformers; default: the bundle's generation config")
    for name in ("max-new-tokens", "min-new-tokens", "top-k", "seed", "num-return-sequences"):
        group.add_argument(f"--{name}", type=int, metavar="N")
    for name in ("temperature", "top-p", "min-p", "repetition-penalty"):
        group.add_argument(f"--{name}", type=float, metavar="X")
    group.add_argument("--do-sample", action=argparse.BooleanOptionalAction, default=None, help="draw tokens at random")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    _add_loading(parser)
    parser.add_argument("--capacity", type=int, metavar="N", help="cache positions per row")
    _finish(parser, commands.run)


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--file", type=Path, help="read texts from here, one per line")
    parser.add_argument("--out", type=Path, help="write the vectors here, as .npy or .json")
    parser.add_argument("--pooling", help="mean, cls, max, ...; default: the model's own")
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=None, help="scale to unit length")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument("--prompt-name", help="one of the model's prompts, e.g. query")
    _add_loading(parser)
    _finish(parser, commands.embed)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page")
    parser.add_argument("--verify", action="store_true", help="also read every file and compare its sha256")
    _finish(parser, commands.inspect)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant", action="append", metavar="NAME", help="may be repeated; default: all")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page")
    group = parser.add_argument_group("measuring, where nothing is stored")
    group.add_argument("--measure", action="store_true", help="measure what is stored, too")
    text = "UTF-8, blank lines between passages; measures what is stored, too. Default: a small set that is built in"
    group.add_argument("--text", type=Path, metavar="FILE", help=text)
    group.add_argument("--max-tokens", type=int, default=1 << 16, metavar="N", help="of the text (default 65536)")
    group.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decoders: generated (default 32)")
    group.add_argument("--engine", default="auto", help="of the variants; fp32 runs on ort-cpu")
    group.add_argument("--device", default="auto")
    group.add_argument("--threads", type=int, metavar="N", help="default: all cores that this process may use")
    group.add_argument("--save", action="store_true", help="put what was measured into the manifest")
    _add_gate(parser)
    _finish(parser, commands.report)


def _add_gate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits: a variant over one is an error")
    help_text = "decoders: most that mean log p per token may fall below fp32's"
    group.add_argument("--max-q-drop", type=float, metavar="X", help=help_text)
    group.add_argument("--min-cosine", type=float, metavar="X", help="encoders: least mean cosine to fp32's outputs")


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    variants = "fp16, bf16, fp8, w8a8-dyn, w8a8, w8g128, w4g32, w4g128, kv8, fp16+kvfp8, ...; may be repeated"
    targets = "ort-cpu, openvino, tensorrt, cuda, ort-cuda; may be repeated"
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--variant", action="append", metavar="NAME", help=variants)
    drop = "drop it, with the files that nothing else reads; may be repeated"
    which.add_argument("--drop", action="append", metavar="NAME", help=drop)
    parser.add_argument(
        "--target", action="append", metavar="NAME",
        help=f"{targets}; default: all that run this model in the variant; with integers the first. Of --drop: all",
    )
    parser.add_argument("--no-parity", action="store_true", help="skip the comparison of the graph's numbers")
    group = parser.add_argument_group("integers")
    group.add_argument("--algorithm", default="auto", help="rtn, gptq, awq, smoothquant, ...; default: by the variant")
    group.add_argument("--calibration", metavar="FILE", help="text that the algorithm looks at; default: built in")
    group.add_argument("--keep", action="append", metavar="PATTERN=BITS", help="layers in 8, 4 or 32 (float) bits")
    group.add_argument("--head-bits", type=int, metavar="N", help="of the LM head; default: by the variant")
    group.add_argument("--max-bytes", metavar="SIZE", help="keep the most sensitive layers finer, up to this size")
    group.add_argument(
        "--max-layer-error", type=float, metavar="X", help="keep layers finer whose outputs lose more, relative"
    )
    group.add_argument(
        "--q-budget", type=float, metavar="X", help="decoders: keep layers finer until Q falls by less"
    )
    group = parser.add_argument_group("quality")
    group.add_argument("--no-quality", action="store_true", help="do not measure what the variant costs")
    group.add_argument("--text", metavar="FILE", help="text to measure on; default: built in")
    group.add_argument("--max-q-drop", type=float, metavar="X", help="decoders: refuse it beyond this loss per token")
    group.add_argument("--min-cosine", type=float, metavar="X", help="encoders: refuse it below this mean cosine")
    _finish(parser, variant_commands.quantize)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    targets, default = ("tensorrt", "rtx"), "default: tensorrt"
    parser.add_argument("--target", type=_build_target, choices=targets, default="tensorrt", help=default)
    parser.add_argument("--sm", nargs="+", metavar="SM", help="e.g. sm86 sm89 or sm86,sm89; default: this GPU")
    parser.add_argument(
        "--precision", default="auto", help="fp16, bf16, fp32, w4g32, ...; default: what the bundle has, or fp16"
    )
    parser.add_argument("--capacity", type=int, metavar="N", help="decoders: cache positions per row (default 2048)")
    parser.add_argument("--max-batch", type=int, metavar="N", help="most rows (default 8, encoders 32)")
    parser.add_argument("--profiles", type=Path, metavar="FILE", help="YAML, see docs/build.md; default: the bundle's")
    parser.add_argument("--optimization-level", type=int, default=3, metavar="N", help="0 to 5 (default 3)")
    parser.add_argument("--workspace", metavar="SIZE", help="scratch memory of a layer, e.g. 2G")
    parser.add_argument("--refittable", action="store_true", help="keep the weights replaceable")
    levels = ("none", "same", "ampere+")
    parser.add_argument("--hardware-compatibility", choices=levels, default="none", help="tensorrt only")
    parser.add_argument("--proof", action="store_true", help="print what was proved of the network")
    _add_store(parser)
    _finish(parser, build_commands.build)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    sub = parser.add_subparsers(required=True, metavar="ACTION")
    for name, text, command in (
        ("ls", "list the engines", build_commands.cache_ls),
        ("verify", "read every engine and check it", build_commands.cache_verify),
        ("prune", "remove the least recently used", build_commands.cache_prune),
        ("rm", "remove engines", build_commands.cache_rm),
    ):
        action = sub.add_parser(name, help=text)
        if name == "prune":
            action.add_argument("--max-bytes", required=True, metavar="SIZE", help="keep at most this much, e.g. 20G")
        if name == "rm":
            action.add_argument("digest", nargs="+", help="as cache ls shows it")
        _add_store(action)
        _finish(action, command)


def _add_store(parser: argparse.ArgumentParser) -> None:
    help_text = "a directory or URL; default: $ACCEL_STORE, else this user's cache"
    parser.add_argument("--store", metavar="URL", help=help_text)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _finish(parser, commands.doctor)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds (default 7)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores that this process may use")
    shapes = "encoders: batch and tokens, e.g. 1x8 8x128"
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="BxS", help=shapes)
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="decoders (default 128)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decoders (default 32)")
    without = "leave eager PyTorch out, which takes most of the time on a CPU"
    parser.add_argument("--no-compare", dest="compare", action="store_false", help=without)
    limits = "measure how near the machine's limits it comes, which takes seconds; default: where the cuda engine runs"
    parser.add_argument("--limits", action=argparse.BooleanOptionalAction, default=None, help=limits)
    batch = "decoders: sequences at a time that these limits are for, beside one alone (default 8)"
    parser.add_argument("--batch", type=int, default=8, metavar="N", help=batch)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="whose engines; default auto")
    _add_store(parser)
    _finish(parser, commands.bench)


def _add_warmup(parser: argparse.ArgumentParser) -> None:
    asked = "bundles, targets, precisions, SMs, capacities, ...: see docs/warmup.md"
    parser.add_argument("jobs", type=Path, metavar="JOBS.yaml", help=asked)
    parser.add_argument("--dry-run", action="store_true", help="print what is there, what would be built and measured")
    parser.add_argument("--store", metavar="URL", help="a directory or URL; default: as the file says")
    parser.add_argument("--workers", type=int, metavar="N", help="most builds at a time; default: one per core")
    parser.add_argument("--memory", metavar="SIZE", help="that all builds may take, e.g. 16GB; default: what is free")
    parser.add_argument("--retries", type=int, default=1, metavar="N", help="of a failed build (default 1)")
    _finish(parser, engine_commands.warmup)


def _build_target(text: str) -> str:
    if text in ("cuda", "ort-cuda"):
        graph = f"accel quantize BUNDLE --variant fp16 --target {text}"
        why = f"the engine {text} needs no build: {graph} adds its graph, and accel warmup warms it up"
        raise argparse.ArgumentTypeError(why)
    return text


def _shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    try:
        return int(batch), int(length)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no batch and length, such as 8x128") from error


def _add_loading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loading")
    engines = "tensorrt, rtx, cuda, ort-cuda, ort-cpu, openvino, torch"
    default = "the fastest that accel bench or warmup measured, else the first that runs"
    group.add_argument("--engine", default="auto", help=f"{engines}; default: {default}")
    group.add_argument("--device", default="auto")
    group.add_argument("--variant", default="auto", help="e.g. fp32; fastest: the fastest that accel bench measured")
    group.add_argument("--threads", type=int, metavar="N", help="default: all cores that this process may use")
    _add_store(group)  # type: ignore[arg-type]
    group.add_argument("--strict", action="store_true", help="fail rather than fall back to another engine")


def _finish(parser: argparse.ArgumentParser, command: commands.Command) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(command=command)


if __name__ == "__main__":
    raise SystemExit(main())
