"""Several threads over one slot loop: whichever finds it idle drives it for all, the others wait."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Sequences

from accel.engines.lifetime import Lifetime
from accel.errors import AccelError, EngineError
from accel.runtime.sequence import Event, Sequence
from accel.runtime.slots import SlotLoop


class Client:
    """One call's sequences and whether something came for them.

    Args:
        sequences: The call's sequences; each gets this client as its owner.
        every_token: Whether the call wants to be woken at every token (streams) or at the end.

    Attributes:
        news: Whether tokens came since the call last looked (``every_token`` alone).
    """

    def __init__(self, sequences: Sequences[Sequence], every_token: bool = False) -> None:
        self.sequences, self.every_token = sequences, every_token
        self.news = False
        self.condition: threading.Condition | None = None
        for sequence in sequences:
            sequence.owner = self

    @property
    def finished(self) -> bool:
        """Whether all its sequences ended."""
        # A loop: asked after every token, a generator costs more than the answer.
        for sequence in self.sequences:  # noqa: SIM110
            if not sequence.finished:
                return False
        return True

    @property
    def ready(self) -> bool:
        """Whether its caller has something to do."""
        return self.news or self.finished


class SlotDriver:
    """Serialises the threads' use of a slot loop and batches their sequences together."""

    def __init__(self, loop: SlotLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._driving = False
        self._closed: AccelError | None = None
        self._lifetime = Lifetime("decoder")
        self._waiting: list[Client] = []

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that loaded the model."""
        return self._lifetime.forked

    def check(self) -> None:
        """Raises EngineError after ``close`` and in a forked child, before anything is done in vain."""
        self._lifetime.check()
        if self._closed is not None:
            raise self._closed

    def submit(self, client: Client) -> None:
        """Queues a call's sequences.

        Raises:
            AccelError: The error given to ``close``.
            EngineError: This process is a fork of the one that loaded the model.
        """
        self._lifetime.check()
        with self._lock:
            if self._closed is not None:
                raise self._closed
            client.condition = threading.Condition(self._lock)
            for sequence in client.sequences:
                self.loop.submit(sequence)

    def advance(self, client: Client) -> None:
        """Returns once the client is ready, having driven the loop for everyone if nobody else did."""
        if client.ready:
            return
        self._lifetime.check()
        condition = client.condition
        assert condition is not None, "submit first"
        with self._lock:
            while self._driving and not client.ready:
                self._waiting.append(client)
                try:
                    condition.wait()
                finally:
                    self._waiting.remove(client)
            if client.ready:
                self._hand_over()
                return
            self._driving = True
        try:
            while not client.ready and self._closed is None:
                self._step(client)
        finally:
            with self._lock:
                self._driving = False
                self._idle.notify_all()
                self._hand_over()
        if not client.ready:  # closed meanwhile: close() ends the sequences as soon as nobody drives
            self._wait_for_end(client)

    def cancel(self, client: Client) -> None:
        """Ends whatever of the client still runs; the rows are free at the next step."""
        for sequence in client.sequences:
            if not sequence.finished:
                self.loop.cancel(sequence)

    def close(self, error: AccelError) -> None:
        """Ends all sequences with ``error`` after the step under way, and refuses new ones with it."""
        with self._lock:
            self._closed = error
            while self._driving:
                self._idle.wait()
            self.loop.abort(error)
            for client in self._waiting:
                assert client.condition is not None
                client.condition.notify()
            self._idle.notify_all()

    def _step(self, driver: Client) -> None:
        events = self.loop.step()
        if not events and not self.loop.has_work:
            raise EngineError("the slot loop lost a sequence", where="slot loop", remedy="Please report this")
        for event in events:
            self._deliver(event, driver)

    def _deliver(self, event: Event, driver: Client) -> None:
        client = event.sequence.owner
        if not isinstance(client, Client):
            return
        if client.every_token and event.token is not None:
            client.news = True
        if client is driver:  # it looks for itself, after this step
            return
        with self._lock:  # always: a client that is just about to wait must not miss this
            if client in self._waiting and client.ready:
                assert client.condition is not None
                client.condition.notify()

    def _hand_over(self) -> None:
        """Wakes one waiting client to drive on. Called with the lock held."""
        if not self._driving:
            for client in self._waiting:
                if not client.ready:
                    assert client.condition is not None
                    client.condition.notify()
                    return

    def _wait_for_end(self, client: Client) -> None:
        with self._lock:
            while not client.ready:
                self._idle.wait()


__all__ = ["Client", "SlotDriver"]
