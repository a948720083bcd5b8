"""The error tree: every error says what failed, where, and what to do next."""

from __future__ import annotations


class AccelError(Exception):
    """Base of all errors raised on purpose by accel.

    Args:
        what: What failed, one sentence without a final full stop.
        where: The file, node, layer or argument it failed at.
        remedy: What the user can do next.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        located = f"{self.what} (at {self.where})" if self.where else self.what
        return f"{located}. {self.remedy}" if self.remedy else located


class InputError(AccelError, ValueError):
    """A caller's argument is wrong: rank, dtype, range, emptiness."""


class CapacityError(InputError):
    """A request needs more cache positions or rows than the loaded model holds."""


class RecipeError(AccelError, ValueError):
    """A recipe has an unknown key or a value of the wrong type."""


class DependencyError(AccelError, ImportError):
    """An optional package is missing or clashes; the remedy carries the exact pip command."""


class BundleError(AccelError):
    """A bundle cannot be opened: missing or corrupt files, unsafe paths, unknown schema."""


class ExportError(AccelError):
    """An export failed; nothing half made was left behind."""


class UnsupportedArchitectureError(ExportError):
    """The model's architecture cannot be exported; names the nearest one that can."""


class CheckpointError(ExportError):
    """The source checkpoint is missing, truncated, or disagrees with its config."""


class FusionError(ExportError):
    """A fusion found fewer nodes than the model has layers; names the layer."""


class ParityError(ExportError):
    """The exported graph's numbers differ from the reference by more than allowed.

    Attributes:
        value: The error relative to the reference's largest value; infinity where the graph gives NaN or infinity;
            None where something else differs.
    """

    value: float | None = None


class QualityError(ExportError):
    """A variant lost more quality than it may; nothing of it was written.

    Attributes:
        value: What was measured.
        limit: What was allowed.
    """

    def __init__(
        self, what: str, *, value: float, limit: float, where: str | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.value, self.limit = value, limit


class StorageError(AccelError, OSError):
    """Writing failed: disk full, no permission, read-only."""


class EngineStoreError(AccelError):
    """The engine store cannot serve or keep an engine: out of reach, locked too long, wrong keys."""


class RefusedEngineError(EngineStoreError):
    """An entry of the engine store is truncated, altered, unsigned or signed by another key; it is never served."""


class EngineError(AccelError):
    """An engine failed while running."""


class UncoveredError(EngineError):
    """A run beyond the shapes that the engine was built for. The engine is sound and stays in use for other runs."""


class EngineBrokenError(EngineError):
    """The engine itself is lost: a device error, a device that went away, a context that cannot run any more.

    A sequence's own failure is a plain EngineError. After this one nothing runs on the engine again;
    the runtime goes on with the next engine.
    """


class EngineUnavailableError(EngineError):
    """No engine (or not the one asked for) can run this bundle here; lists the reasons."""


class EngineBuildError(AccelError):
    """An engine could not be built; names the node, the layer or the setting it failed at."""


class EngineProofError(EngineBuildError):
    """The parsed network does not compute what the graph says, and cannot be repaired."""
