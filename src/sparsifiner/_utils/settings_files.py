"""Files of named settings: configurations and recipes, the user's or those that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SparsifinerError
from .checks import choose
from .messages import one_line, shown
from .reading import parse_json, read_text
from .yaml12 import load_yaml


def read_settings(path: str | Path, what: str, example: str) -> dict[str, Any]:
    """The settings in a YAML file, or a JSON file if it is called so.

    Args:
        path: the file.
        what: it is, for messages: ``configuration``, ``recipe``.
        example: a setting that it might hold.

    Raises:
        SparsifinerError: in one line, if it cannot be read or holds something else.
    """
    path = Path(path)
    try:
        text = read_text(path)
        settings = parse_json(text) if path.suffix == ".json" else load_yaml(text)
    except OSError as error:
        raise SparsifinerError(f"cannot read the {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise SparsifinerError(f"{path} is not valid YAML or JSON: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise SparsifinerError(f"{path} must hold named settings such as '{example}', got {shown(settings)}")
    return settings


def read_configuration(path: str | Path) -> dict[str, Any]:
    """:func:`read_settings` of a sparse model's configuration."""
    return read_settings(path, "configuration", "keep_rate: 0.1")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """:func:`read_settings` of a training recipe, which may be one of :func:`bundled_recipes`."""
    return read_settings(locate_recipe(path), "recipe", "model: builtin")


def bundled_recipes() -> dict[str, Path]:
    """Recipes that ship with the package: name and file of each, sorted by name."""
    folder = Path(__file__).parents[1] / "data" / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def locate_recipe(path: str | Path) -> Path:
    """The file of a recipe; a bare name without suffix means a bundled one, unless a file is called so.

    Raises:
        SparsifinerError: if no recipe of that name ships with the package.
    """
    path = Path(path)
    if path.suffix or path.name != str(path) or path.is_file():
        return path
    bundled = bundled_recipes()
    choose("recipe", path.name, tuple(bundled))
    return bundled[path.name]
