"""Export recipes: YAML or a mapping becomes a frozen ``Recipe``; an unknown key is an error."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from accel.errors import RecipeError
from accel.schema import from_dict, suggest, to_dict
from accel.spec import ProfileRanges, Task


@dataclass(frozen=True)
class ParityRecipe:
    """The gate that an export must pass.

    Attributes:
        enabled: Compare with PyTorch at all. Off only for exports that are checked elsewhere.
        limit: Largest ``max|a - b| / max|b|`` against eager PyTorch.
        cases: Random inputs compared.
        greedy_tokens: Decoders: greedy tokens compared; 0: none.
        seed: Of the random inputs.
    """

    enabled: bool = True
    limit: float = 1e-4
    cases: int = 3
    greedy_tokens: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """How a model is exported.

    Attributes:
        task: None: read from the architecture's class name.
        max_positions: Longest sequence; None: what the model's position scheme covers.
        parity: The parity gate.
        profiles: Named ranges that TensorRT engines of the bundle are built for; none: the usual ones.
    """

    task: Task | None = None
    max_positions: int | None = None
    parity: ParityRecipe = field(default_factory=ParityRecipe)
    profiles: dict[str, ProfileRanges] = field(default_factory=dict)


def load_recipe(source: Recipe | Mapping[str, Any] | str | Path | None, default: str = "encoder") -> Recipe:
    """Makes the recipe of one export.

    Args:
        source: None: the packaged recipe ``default``. A name without a suffix: a packaged recipe.
            A path that ends in .yaml or .yml, or a mapping: laid over the packaged recipe ``default``, so that it
            holds only what differs. A ``Recipe``: taken as it is.
        default: ``encoder`` or ``decoder``, after the model's kind.

    Raises:
        RecipeError: Unknown name, key, or value; not YAML.
    """
    if isinstance(source, Recipe):
        return _checked(source, "the given Recipe")
    if source is None:
        source = default
    if isinstance(source, Mapping):
        data, where = dict(source), "the given mapping"
    elif Path(source).suffix in (".yaml", ".yml"):
        data, where = read_yaml(Path(source)), str(source)
    else:
        return _packaged(str(source))
    merged = _merge(to_dict(_packaged(default)), data)
    return _checked(from_dict(Recipe, merged, where, error=RecipeError), where)


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The keys of a packaged recipe (by name) or of a YAML file, to be changed and given to ``load_recipe``.

    Raises:
        RecipeError: as ``load_recipe``.
    """
    if Path(source).suffix in (".yaml", ".yml"):
        return read_yaml(Path(source))
    return dict(to_dict(_packaged(str(source))))


def recipe_names() -> tuple[str, ...]:
    """Names of the packaged recipes."""
    return tuple(sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(".yaml")))


def _folder() -> Traversable:
    try:
        return resources.files("accel.export_configs")
    except ModuleNotFoundError:  # run from the source tree, not installed
        return Path(__file__).parents[1] / "export_configs"


def _packaged(name: str) -> Recipe:
    if name not in recipe_names():
        what = f"There is no recipe {name!r}"
        remedy = f"A recipe of your own is a path that ends in .yaml. {suggest(name, list(recipe_names()))}"
        raise RecipeError(what, where="recipe", remedy=remedy)
    where = f"recipe {name}"
    return _checked(from_dict(Recipe, read_yaml(_folder() / f"{name}.yaml"), where, error=RecipeError), where)


def read_yaml(path: Traversable, kind: str = "recipe") -> dict[str, Any]:
    """The keys of a YAML file; an empty one has none.

    Args:
        kind: What the file is, for the error.

    Raises:
        RecipeError: It cannot be read, is no YAML, no mapping, or has a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, which YAML forbids and PyYAML ignores."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise RecipeError(f"Key {key!r} stands twice", where=str(path), remedy="Remove one of them")
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(path.read_bytes(), Loader=Loader)
    except OSError as error:
        raise RecipeError(
            f"Cannot read the {kind}: {error.strerror}", where=str(path), remedy="Check its path"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"The {kind} is not YAML: {error}", where=str(path), remedy="Correct it") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(f"The {kind} is not a mapping of keys", where=str(path), remedy="Write lines 'key: value'")
    return data


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _checked(recipe: Recipe, where: str) -> Recipe:
    parity, positions = recipe.parity, recipe.max_positions
    checks = {
        f"max_positions must be at least 1, not {positions}": positions is None or positions >= 1,
        f"parity.limit must be above 0, not {parity.limit}": parity.limit > 0,
        f"parity.cases must be at least 1, not {parity.cases}": parity.cases >= 1,
        f"parity.greedy_tokens must be at least 0, not {parity.greedy_tokens}": parity.greedy_tokens >= 0,
        f"parity.seed must be at least 0, not {parity.seed}": parity.seed >= 0,
    }
    for name, profile in recipe.profiles.items():
        for axis, values in (("batch", profile.batch), ("sequence", profile.sequence)):
            said = f"must be 1 <= min <= opt <= max, not {values.min}, {values.opt}, {values.max}"
            checks[f"profiles.{name}.{axis} {said}"] = 1 <= values.min <= values.opt <= values.max
    for what, holds in checks.items():
        if not holds:
            raise RecipeError(what, where=where, remedy="Correct the value")
    return recipe


__all__ = ["ParityRecipe", "Recipe", "load_recipe", "read_recipe", "read_yaml", "recipe_names"]
