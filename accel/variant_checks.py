"""Whether a new variant's graph computes what it should: compared with the bundle's fp32 engine, or with PyTorch."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from accel.bundle import Bundle
from accel.errors import ParityError
from accel.manifest import ParityResult
from accel.recipe import ParityRecipe
from accel.scheme import Scheme
from accel.variant_targets import CPU, DEFAULT, Plan, Target, default_targets

if TYPE_CHECKING:
    import onnx_ir as ir

    from accel.graph.quantized_nodes import Rounding

_log = logging.getLogger(__name__)
CANONICAL, BASE = "canonical", "fp32"
# Largest error against fp32, relative to the largest value. Rounding alone costs MiniLM and SmolLM2 some 2e-3 in fp16
# and 2e-2 in bf16; a wrong graph costs more than half.
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
ROUNDING = 0.5  # an error above it is no rounding
SAME = 1e-3  # a graph in fp32, against PyTorch in fp32: a token that amplifies 300-fold differs by 1e-4, others by 4e-6
# Integers against PyTorch on the same integers. What is a tie here may fall to the other side there, and an encoder's
# lowering takes biases out of what is rounded: MiniLM differs by 4e-2, models of random numbers by up to 2e-1. A wrong
# graph costs more than half here too.
INTEGERS = 3e-1
FLOAT8 = 3e-1  # against fp32: products of two numbers with three bits behind the point each


def check_precision(bundle: Bundle, scheme: Scheme, target: Target, session: Callable[[int, int], Any]) -> ParityResult:
    """Compares a variant in floats with the fp32 engine.

    Args:
        bundle: Has the engine's graph.
        scheme: The variant's.
        target: Of its graph.
        session: (rows, capacity) -> the session under test.

    Raises:
        ParityError: It differs by more than its precision may.
    """
    from accel.engines import open_session
    from accel.engines.session import SessionOptions

    def reference(rows: int, capacity: int) -> Any:
        options = SessionOptions(capacity=capacity, max_batch=rows)
        return open_session(bundle, engine="ort-cpu", variant=BASE, options=options).session

    try:
        result = compare(bundle, reference, session, {**LIMITS, "fp8": FLOAT8}[scheme.base])
    except ParityError as error:
        raise _in_words(error, bundle, scheme, target) from error
    return dataclasses.replace(result, reference="ort-cpu fp32")


def check_integers(bundle: Bundle, plan: Plan, canonical: ir.Model, preview: Callable[[], Bundle]) -> ParityResult:
    """Compares a variant with integers, in its engine, with what its integers mean, evaluated by PyTorch.

    Rounding the weights, which the quality measures judge, is on both sides; the graph and the kernels are compared.

    Args:
        bundle: The bundle as it stands.
        plan: What the lowering was told.
        canonical: The canonical graph with the quantised weights.
        preview: The bundle with the variant's graph for ``ort-cpu``. Called when the canonical graph has been
            evaluated: while a preview gives files a second name, onnx_ir reads no weights from them.

    Raises:
        ParityError: They differ by more than rounding does.
    """
    from accel.engines import open_session
    from accel.engines.session import SessionOptions

    def session(rows: int, capacity: int) -> Any:
        options = SessionOptions(capacity=capacity, max_batch=rows)
        return open_session(preview(), engine=CPU, variant=plan.scheme.name, options=options).session

    # What a scheme leaves to the kernels, ours round by token and group.
    activations: Rounding = "grouped" if plan.scheme.activations == "none" else plan.scheme.activations
    return _compare_integers(bundle, plan, canonical, session, INTEGERS, activations)


def check_evaluated(
    bundle: Bundle, plan: Plan, canonical: ir.Model, session: Callable[[int, int], Any],
    in_fp32: Callable[[], Callable[[int, int], Any]],
) -> ParityResult:  # fmt: skip
    """The same for a lowered graph that is evaluated in its own precision, see ``evaluated``.

    Where only weights are rounded, both sides hold the same numbers: the limit is twice that of the precision itself.
    Integers can make a model that amplifies roundings more than that at some token, in PyTorch too: then the same
    lowering in fp32 tells whether the graph is right. Keys and values that the precision moved are rounded to other
    integers here and there.

    Args:
        bundle, plan, canonical: See ``check_integers``.
        session: (rows, capacity) -> a session over the lowered graph.
        in_fp32: Makes likewise what gives sessions over the same graph lowered in fp32.

    Raises:
        ParityError: They differ by more than rounding does.
    """
    scheme = plan.scheme
    # Scales are rounded to the type on top of what fp16 rounds, and models of random numbers feel it: 2.7e-2.
    weights_alone = scheme.activations == "none" and scheme.kv_bits is None
    limit = 2 * LIMITS[scheme.gpu_base] if weights_alone else INTEGERS
    try:
        return _compare_integers(bundle, plan, canonical, session, limit, scheme.activations)
    except ParityError as error:
        if not weights_alone or error.value is None or error.value > INTEGERS:
            raise
        # Of all cases: the first one above the limit ended the comparison.
        result = _compare_integers(bundle, plan, canonical, session, INTEGERS, scheme.activations)
        try:
            exact = _compare_integers(bundle, plan, canonical, in_fp32(), SAME, scheme.activations)
        except ParityError as wrong:
            raise error from wrong
    _log.warning(
        "%s: the same graph in fp32 is right (%.0e), but with these integers the model amplifies %s's roundings, up to "
        "%.0e of the largest value at some tokens: another algorithm (gptq, awq) or group may make a steadier one",
        scheme.name, exact.max_rel_error, scheme.gpu_base, result.max_rel_error,
    )  # fmt: skip
    return result


def _compare_integers(
    bundle: Bundle,
    plan: Plan,
    canonical: ir.Model,
    session: Callable[[int, int], Any],
    limit: float,
    activations: Rounding,
) -> ParityResult:
    from accel.graph.evaluation.sessions import GraphEncoder, PackedDecoder
    from accel.graph.evaluation.torch_graph import TorchGraph
    from accel.graph.quantized_cache import spell_cache
    from accel.graph.quantized_nodes import spell_quantized

    spelled, arch, scheme = canonical.clone(), bundle.manifest.arch, plan.scheme
    kinds = [] if scheme.kv_float8 and not scheme.quantized else ["integers"]
    numbers = " and ".join([*kinds, *["8-bit floats"] * scheme.kv_float8])
    spell_quantized(spelled, activations, plan.static_scales)
    if plan.kv is not None:
        spell_cache(spelled, plan.kv)

    def reference(rows: int, capacity: int) -> Any:
        run = TorchGraph(spelled).run
        return PackedDecoder(run, arch, rows, capacity) if arch.kind == "decoder" else GraphEncoder(run)

    try:
        result = compare(bundle, reference, session, limit)
    except ParityError as error:
        what = error.what.replace("The exported graph", f"The {scheme.name} graph")
        what = what.replace("PyTorch", f"PyTorch on the same {numbers}")
        remedy = "Rounding does not cost this much: the graph is wrong. Please report it"
        remedy = error.remedy if error.value is None and error.remedy else remedy
        found = ParityError(what, where=f"{bundle.path}: {error.where}", remedy=remedy)
        found.value = error.value
        raise found from error
    return dataclasses.replace(result, reference=f"PyTorch on the same {numbers}")


def compare(
    bundle: Bundle, reference: Callable[[int, int], Any], session: Callable[[int, int], Any], limit: float
) -> ParityResult:
    """Runs the cases of the export's gate, on random ids, through both sessions.

    Args:
        bundle: The model's.
        reference: (rows, capacity) -> the session whose outputs are right.
        session: Likewise, the one under test.
        limit: Largest error, relative to the largest value.

    Raises:
        ParityError: The limit is exceeded.
    """
    from accel.graph.parity import ROWS, capacity_of, check_parity, make_cases, references_from

    arch = bundle.manifest.arch
    recipe = ParityRecipe(limit=limit, greedy_tokens=0)
    cases = make_cases(arch, recipe, **_ids(bundle))
    capacity = min(capacity_of(cases), arch.max_positions)
    opened = reference(ROWS, capacity)
    try:
        references_from(opened, arch, cases)
    finally:
        opened.close()
    opened = session(ROWS, capacity)
    try:
        return check_parity(opened, arch, cases, recipe)
    finally:
        opened.close()


def evaluated(model: ir.Model, bundle: Bundle, target: Target, dtype: ir.DataType) -> Callable[[int, int], Any]:
    """(rows, capacity) -> a session over a lowered graph that PyTorch evaluates in its own precision."""

    def session(rows: int, capacity: int) -> Any:
        from accel.graph.evaluation.torch_graph import TorchGraph

        cache = next((value.dtype for value in model.graph.inputs if value.name == "past.0.key"), None)
        return target.session(TorchGraph(model).run, bundle.manifest.arch, rows, capacity, cache or dtype)

    return session


def widened(model: ir.Model) -> ir.Model:
    """A model lowered in fp32, in place: where a lowering knows fp16 alone, as for scales of integers, fp32 as well."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    return model


def opened(bundle: Bundle, scheme: Scheme, target: Target) -> Callable[[int, int], Any]:
    """(rows, capacity) -> a session of the target's own engine over a bundle that has the variant."""

    def session(rows: int, capacity: int) -> Any:
        from accel.engines import open_session
        from accel.engines.session import SessionOptions

        options = SessionOptions(capacity=capacity, max_batch=rows)
        return open_session(bundle, engine=target.name, variant=scheme.name, options=options).session

    return session


def quantize_command(bundle: Bundle, variant: str, target: str) -> str:
    """The command that adds a variant's graph for a target."""
    unsaid = target == DEFAULT and target in default_targets(bundle.manifest.arch, variant)
    return f"accel quantize {bundle.path} --variant {variant}" + ("" if unsaid else f" --target {target}")


def _in_words(error: ParityError, bundle: Bundle, scheme: Scheme, target: Target) -> ParityError:
    """The error as this comparison's: what differs from what, in which bundle, and what helps."""
    what = error.what.replace("The exported graph", f"The {scheme.name} graph").replace("PyTorch", "the fp32 engine")
    remedy = error.remedy if error.value is None else _remedy(error.value, bundle, scheme, target)
    return ParityError(what, where=f"{bundle.path}: {error.where}", remedy=remedy)


def _remedy(value: float, bundle: Bundle, scheme: Scheme, target: Target) -> str:
    if scheme.base == "fp16" and math.isinf(value):
        return "Values overflow fp16: take bf16, whose range is fp32's, or fp32"
    if scheme.base == BASE or value > ROUNDING:
        return "Rounding does not cost this much: the graph is wrong. Export the bundle again with this accel"
    finer = f"fp32, or bf16 (rounds more, limit {LIMITS['bf16']:g})" if scheme.base == "fp16" else "fp32"
    anyway = f"{quantize_command(bundle, scheme.name, target.name)} --no-parity"
    return f"Take {finer}; or, if this much is well for you: {anyway}"


def _ids(bundle: Bundle) -> dict[str, int]:
    """The padding id, and how many token types the graph takes."""
    config = bundle.read_json("config.json") if bundle.has("config.json") else {}
    inputs = {spec.name for spec in bundle.graph(BASE, CANONICAL).inputs}
    types = int(config.get("type_vocab_size") or 0) if "token_type_ids" in inputs else 0
    return {"pad_id": int(config.get("pad_token_id") or 0), "token_types": types}


__all__ = [
    "BASE",
    "CANONICAL",
    "LIMITS",
    "ROUNDING",
    "check_evaluated",
    "check_integers",
    "check_precision",
    "compare",
    "evaluated",
    "opened",
    "quantize_command",
    "widened",
]
