"""Making room, and clearing away what killed writers left."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack

from accel.errors import RefusedEngineError
from accel.store.folder import Folder, Record
from accel.store.manifest import decode


def evict(folder: Folder, records: Iterable[Record], max_bytes: int, keep: Collection[str] = ()) -> list[Record]:
    """Removes the least recently used entries until the rest has ``max_bytes`` at most.

    Args:
        folder: Where they lie.
        records: All entries that count.
        max_bytes: The limit. It is exceeded if what is in use or in ``keep`` needs more.
        keep: Digests that stay.

    Returns:
        What was removed, oldest first.
    """
    records = list(records)
    total = sum(record.bytes for record in records)
    if total <= max_bytes:
        return []
    last_used = folder.last_used(records)
    removed = []
    for record in sorted(records, key=lambda r: (last_used[r.stem], r.stem)):
        if total <= max_bytes:
            break
        if record.digest not in keep and remove_unused(folder, record):
            total -= record.bytes
            removed.append(record)
    return removed


def remove_unused(folder: Folder, record: Record) -> bool:
    """Removes an entry that nobody uses; False if somebody does. The manifest goes first: then the entry is gone."""
    with ExitStack() as stack:
        if not all(stack.enter_context(folder.unused(plan)) for plan in record.plans):
            return False
        for name in sorted(record.files, key=lambda name: name != record.manifest):
            folder.remove(name)
        return True


def sweep(folder: Folder, identity: str) -> None:
    """Removes what writers that were killed left below one identity.

    These are temporary files, plans that no manifest names, and times of use of entries that are gone.
    """
    folder.remove_temporaries(identity)
    for record in folder.records(identity):
        if all(name.endswith(".used") for name in record.files):  # noted while the entry was being removed
            remove_unused(folder, record)
        for plan in record.plans:
            if _is_leftover(folder, record, plan):
                folder.discard_leftover(plan, _leftover_check(folder, record, plan))


def _leftover_check(folder: Folder, record: Record, plan: str) -> Callable[[], bool]:
    return lambda: _is_leftover(folder, record, plan)


def _is_leftover(folder: Folder, record: Record, plan: str) -> bool:
    try:
        return decode(folder.read(record.manifest), record.manifest).plan != plan
    except FileNotFoundError:
        return True
    except RefusedEngineError:  # damaged, or of a newer accel: not for us to say
        return False


__all__ = ["evict", "remove_unused", "sweep"]
