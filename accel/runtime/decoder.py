"""The decoder that users hold: generating, streaming, chatting and scoring over one opened bundle."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import TracebackType
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from accel.bundle import Bundle
from accel.engines.session import DecoderSession, EngineInfo, Fallback
from accel.errors import EngineError, InputError
from accel.runtime.driver import Client, SlotDriver
from accel.runtime.failover import Failover, Opened
from accel.runtime.requests import GenerationOptions, RequestReader, check_texts
from accel.runtime.results import GenerateResult, TeacherForced
from accel.runtime.sampling import Sampler
from accel.runtime.sequence import Clock, TextWatch
from accel.runtime.sequence import Sequence as Slot
from accel.runtime.slots import SlotLoop, SlotOptions
from accel.runtime.text import TOKENIZER_FILE, StopStrings, Tokenizer
from accel.runtime.token_stream import TokenStream
from accel.runtime.tokenizer_files import read_object, token_ids
from accel.schema import suggest
from accel.spec import ArchSpec

Messages = Sequence[Mapping[str, Any]]


class GenerateArguments(TypedDict, total=False):
    """What ``generate``, ``stream`` and ``chat`` take. None means not given: the model's generation_config.json
    decides, and where it is silent the value named here.

    Attributes:
        max_new_tokens: 128, or what the cache holds.
        min_new_tokens: 0. End-of-sequence tokens are banned until there are as many.
        do_sample: False: the most probable token each time.
        temperature, top_k, top_p, min_p: 1.0, 0 (off), 1.0, 0.0; only with do_sample.
        repetition_penalty: 1.0.
        eos_token_id: An id or several; [] to never stop at one.
        stop: A string or several; the text is cut before the first that appears.
        seed: Makes sampling repeatable.
        num_return_sequences: 1. More need do_sample; they share the prompt's prefill.
        logprobs: Record each token's log probability, and those of this many alternatives.
    """

    max_new_tokens: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    eos_token_id: int | list[int] | None
    stop: str | list[str] | None
    seed: int | None
    num_return_sequences: int | None
    logprobs: int | None


class Decoder:
    """An opened decoder bundle. Thread-safe; a context manager.

    Calls from several threads run together: each of their sequences takes a cache row, and
    every step serves all of them. Sequences beyond the rows wait for one.

    When the engine breaks (EngineBrokenError), the next one takes over, with a warning in the log, and the
    sequences under way go on from their tokens; ``engine``, ``fallbacks``, ``capacity`` and ``max_batch`` then
    speak of the new one. Not after loading with ``strict`` or an engine's name: the calls then raise the error.

    Attributes:
        arch: The model's architecture.
    """

    def __init__(self, bundle: Bundle, opened: Opened, options: SlotOptions | None = None) -> None:
        self._bundle = bundle
        self._failover: Failover[DecoderSession] = Failover(opened)
        self.arch: ArchSpec = bundle.manifest.arch
        self._driver = SlotDriver(SlotLoop(self._session, options, self._failover.replace))
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()
        self._closed = False
        defaults = self._json("generation_config.json")
        self._reader = RequestReader(self.arch.vocab_size, defaults, self._default_eos())

    def __repr__(self) -> str:
        engine = self.engine
        return f"{type(self).__name__}({self.arch.architecture}, {self.arch.task}, {engine.name}, {engine.variant})"

    @property
    def engine(self) -> EngineInfo:
        """What runs."""
        return self._failover.engine

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Engines that were passed over or broke, and why."""
        return self._failover.fallbacks

    @property
    def capacity(self) -> int:
        """Cache positions per sequence: prompt and generated tokens."""
        return self._session.capacity

    @property
    def max_batch(self) -> int:
        """Cache rows: sequences that run at a time."""
        return self._session.max_batch

    @property
    def _session(self) -> DecoderSession:
        return self._failover.session

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            BundleError: The bundle has none.
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = Tokenizer.from_bundle(self._bundle)
            return self._tokenizer

    def generate(
        self, input_ids: Any, attention_mask: Any = None, **options: Unpack[GenerateArguments]
    ) -> GenerateResult | list[GenerateResult]:
        """Continues one or several prompts.

        Args:
            input_ids: A text, token ids (list, array or tensor [S]), or several of either (ids also as [B, S]).
            attention_mask: For padded ids: 1 for real tokens, 0 for padding on the left or right.
            options: See ``GenerateArguments``.

        Returns:
            One result for a single prompt with ``num_return_sequences`` 1, else a list: each prompt's
            sequences together, in the prompts' order. Every result carries the whole call's timings.

        Raises:
            InputError: A bad prompt or option.
            CapacityError: Prompt and new tokens need more positions than ``capacity``.
            CapacityError: Also when an engine that holds less took over meanwhile.
            EngineError: The engine failed, the logits are not finite, or the model is closed.
            EngineUnavailableError: The engine broke, and none is left.
        """
        clock = Clock()
        settled = self._settle(options)
        prompts, single = self._prompts(input_ids, attention_mask)
        return self._generate(prompts, settled, clock, single)

    def stream(
        self, input_ids: Any, attention_mask: Any = None, **options: Unpack[GenerateArguments]
    ) -> TokenStream[str] | TokenStream[int]:
        """Continues one prompt and hands out what comes, as it comes.

        Args:
            input_ids: A text (the pieces are then text), or token ids [S] (then token ids).
            attention_mask: As in ``generate``.
            options: See ``GenerateArguments``.

        Returns:
            An iterator with ``.result`` once it is exhausted. Closing or dropping it early frees the row.

        Raises:
            InputError: More than one prompt or sequence; else as ``generate``. Engine errors come while iterating.
        """
        clock = Clock()
        settled = self._settle(options)
        prompts, single = self._prompts(input_ids, attention_mask)
        if not single:
            raise InputError("only one prompt can be streamed", where="input_ids", remedy="Stream each one on its own")
        return self._stream(prompts[0], settled, clock, as_text=isinstance(input_ids, str))

    def chat(self, messages: Messages, **options: Unpack[GenerateArguments]) -> GenerateResult | list[GenerateResult]:
        """Answers a conversation with the model's chat template.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            options: See ``GenerateArguments``.

        Raises:
            InputError: Malformed messages, or a model without a chat template; else as ``generate``.
        """
        clock = Clock()
        return self._generate([self._render(messages)], self._settle(options), clock, single=True)

    def stream_chat(self, messages: Messages, **options: Unpack[GenerateArguments]) -> TokenStream[str]:
        """As ``chat``, handing out the answer's text as it comes."""
        clock = Clock()
        return self._stream(self._render(messages), self._settle(options), clock, as_text=True)

    def score(self, input_ids: Any, attention_mask: Any = None) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """Log probability of each token given those before it.

        Args:
            input_ids: As in ``generate``; at least two tokens each.
            attention_mask: As in ``generate``.

        Returns:
            float64 [S - 1], entry t for token t + 1; a list of them for several sequences.

        Raises:
            InputError, CapacityError, EngineError: as ``generate``.
        """
        forced = self.teacher_force(input_ids, attention_mask)
        return [item.logprobs for item in forced] if isinstance(forced, list) else forced.logprobs

    def teacher_force(self, input_ids: Any, attention_mask: Any = None) -> TeacherForced | list[TeacherForced]:
        """As ``score``, with the token that the model would have chosen in each place.

        Args:
            input_ids: As in ``generate``; at least two tokens each.
            attention_mask: As in ``generate``.

        Raises:
            InputError, CapacityError, EngineError: as ``generate``.
        """
        clock = Clock()
        prompts, single = self._prompts(input_ids, attention_mask)
        for prompt in prompts:
            if len(prompt) < 2:
                raise InputError("one token alone has no score", where="input_ids", remedy="Give at least two tokens")
            self._reader.check_fits(len(prompt), self.capacity)
        slots = [Slot(prompt=prompt, sampler=None, clock=clock) for prompt in prompts]
        self._run(slots)
        forced = [TeacherForced(np.array(slot.scores), np.array(slot.best, np.int64)) for slot in slots]
        return forced[0] if single else forced

    def close(self) -> None:
        """Ends calls under way with an EngineError and frees the engine and the cache. Safe to call twice.

        In a forked child it does nothing: what the parent opened is not the child's to close.
        """
        if self._driver.forked:
            return
        with self._lock:
            already, self._closed = self._closed, True
        if not already:
            self._driver.close(EngineError("the decoder is closed", remedy="Load the bundle again"))
            self._failover.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _json(self, name: str) -> dict[str, Any]:
        return read_object(self._bundle, name)

    def _default_eos(self) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            value = self._json(name).get("eos_token_id")
            if value is not None:
                return token_ids(value, "eos_token_id")
        return self.tokenizer.eos_token_ids if self._bundle.has(TOKENIZER_FILE) else ()

    def _settle(self, options: GenerateArguments) -> GenerationOptions:
        self._driver.check()
        known = list(GenerateArguments.__annotations__)
        for name in options:
            if name not in known:
                raise InputError(f"unknown argument {name!r}", where=name, remedy=suggest(name, known))
        return self._reader.options(**options)

    def _prompts(self, value: Any, attention_mask: Any) -> tuple[list[NDArray[np.int64]], bool]:
        self._driver.check()
        texts = check_texts(value)
        if texts is None:
            return self._reader.prompts(value, attention_mask)
        if attention_mask is not None:
            raise InputError("attention_mask belongs to token ids, not to texts", where="attention_mask")
        ids = [self.tokenizer.encode(text) for text in texts[0]]
        return self._reader.prompts(ids)[0], texts[1]

    def _render(self, messages: Messages) -> NDArray[np.int64]:
        self._driver.check()
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self._reader.prompts([self.tokenizer.encode(text, add_special_tokens=False)])[0][0]

    def _slots(
        self, prompt: NDArray[np.int64], options: GenerationOptions, clock: Clock, as_text: bool = False
    ) -> list[Slot]:
        fitted = self._reader.fit(options, len(prompt), self.capacity)
        group = object() if fitted.returned > 1 else None
        slots = []
        for index in range(fitted.returned):
            watch = None
            if as_text or fitted.stop:
                stops = StopStrings(list(fitted.stop)) if fitted.stop else None
                watch = TextWatch(self.tokenizer.stream_decoder(), stops)
            slot = Slot(
                prompt=prompt,
                sampler=Sampler(fitted.sampling, self.arch.vocab_size, stream=index),
                max_new_tokens=fitted.max_new_tokens,
                min_new_tokens=fitted.min_new_tokens,
                eos_token_ids=fitted.eos_token_ids,
                watch=watch,
                logprobs=fitted.logprobs,
                group=group,
                clock=clock,
            )
            slots.append(slot)
        return slots

    def _generate(
        self, prompts: list[NDArray[np.int64]], options: GenerationOptions, clock: Clock, single: bool
    ) -> GenerateResult | list[GenerateResult]:
        slots = [slot for prompt in prompts for slot in self._slots(prompt, options, clock)]
        clock.prepost += perf_counter() - clock.started
        self._run(slots)
        after = perf_counter()
        results = [self._result(slot) for slot in slots]
        clock.prepost += perf_counter() - after
        timings = clock.timings()
        results = [replace(result, timings=timings) for result in results]
        return results[0] if single and len(results) == 1 else results

    def _stream(
        self, prompt: NDArray[np.int64], options: GenerationOptions, clock: Clock, as_text: bool
    ) -> TokenStream[Any]:
        if options.returned > 1:
            raise InputError("only one sequence can be streamed", where="num_return_sequences", remedy="Leave it at 1")
        slot = self._slots(prompt, options, clock, as_text)[0]
        client = Client([slot], every_token=True)
        clock.prepost += perf_counter() - clock.started
        self._driver.submit(client)
        return TokenStream(self._driver, client, self._result, as_text)

    def _run(self, slots: list[Slot]) -> None:
        client = Client(slots)
        self._driver.submit(client)
        try:
            self._driver.advance(client)
        finally:
            self._driver.cancel(client)
        for slot in slots:
            if slot.error is not None:
                raise slot.error

    def _result(self, slot: Slot) -> GenerateResult:
        reason = slot.finish_reason
        assert reason in ("eos", "stop", "length"), reason
        ids = slot.new_ids
        if slot.watch is not None:
            text: str | None = "".join(slot.watch.text)
        else:
            text = self.tokenizer.decode(ids) if self._bundle.has(TOKENIZER_FILE) else None
        records = slot.records if slot.logprobs is not None else None
        return GenerateResult(ids, text, reason, records, slot.clock.timings())


__all__ = ["Decoder", "GenerateArguments"]
