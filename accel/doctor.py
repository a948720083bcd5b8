"""``accel doctor``: what this machine can run and what is missing, as tables."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

import accel_cpu

from accel.capabilities import Capabilities, Package

if TYPE_CHECKING:
    from rich.table import Table


def print_report(found: Capabilities, file: IO[str] | None = None) -> None:
    """Prints the machine, the engines, the optional packages, and every pip command that would add something."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(file=file, soft_wrap=True)
    console.print(_machine_table(found))
    console.print(_engine_table(found))
    console.print(_package_table(found.packages))
    for warning in found.warnings:
        console.print(f"[bold red]Clash:[/] {escape(warning)}")
    commands = missing_commands(found)
    if commands:
        console.print("[bold]To add what is missing:[/]")
    for purpose, command in commands:
        console.print(f"  {escape(command)}  [dim]# {escape(purpose)}[/]", highlight=False)


def missing_commands(found: Capabilities) -> list[tuple[str, str]]:
    """What would be added, and the pip command that does it; one entry for each command."""
    wanted: dict[str, list[str]] = {}
    for engine in found.engines:
        if engine.install is not None:
            wanted.setdefault(engine.install, []).append(f"engine {engine.name}")
    for package in found.packages:
        if package.install is not None:
            wanted.setdefault(package.install, []).append(package.purpose)
    return [(", ".join(dict.fromkeys(purposes)), command) for command, purposes in wanted.items()]


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", title_style="bold", show_header=bool(columns))
    return table


def _machine_table(found: Capabilities) -> Table:
    table = _table(f"accel {found.accel}")
    cpu, memory, onnxruntime = found.cpu, found.memory, found.onnxruntime
    table.add_row("Python", f"{found.python} on {found.platform}")
    table.add_row("CPU", f"{cpu.model}, {cpu.cores} of {cpu.logical} cores may be used")
    table.add_row("Instruction sets", " ".join(cpu.isa) or "unknown")
    limit = f", limited to {_gib(memory.limit)}" if memory.limit is not None else ""
    table.add_row("Memory", f"{_gib(memory.available)} available of {_gib(memory.total)}{limit}")
    for gpu in found.gpus:
        sm, size = gpu.compute_capability, _gib(gpu.memory_mib << 20)
        table.add_row("GPU", f"{gpu.name}, {size}, compute capability {sm}, driver {gpu.driver}")
    if not found.gpus:
        table.add_row("GPU", "no NVIDIA GPU or driver")
    if onnxruntime.version is not None:
        ragged = "yes" if onnxruntime.query_seqlens else "no"
        providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.providers)
        table.add_row("ONNX Runtime", f"{onnxruntime.version}; providers {providers}; ragged attention {ragged}")
    reason = accel_cpu.unavailable_reason()
    operators = f"compiled, run on {accel_cpu.instruction_set()}" if reason is None else f"none: {reason}"
    table.add_row("Integers on the CPU", operators)
    return table


def _engine_table(found: Capabilities) -> Table:
    from rich.markup import escape

    table = _table("Engines", "engine", "runs here", "why")
    for engine in found.engines:
        table.add_row(engine.name, "[green]yes[/]" if engine.available else "[red]no[/]", escape(engine.reason))
    return table


def _package_table(packages: tuple[Package, ...]) -> Table:
    table = _table("Optional packages", "package", "version", "for")
    for package in packages:
        table.add_row(package.name, package.version or "[dim]absent[/]", package.purpose)
    return table


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


__all__ = ["missing_commands", "print_report"]
