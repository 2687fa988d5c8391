"""Modules that are imported as soon as another package is, so that it knows what they register with it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


def import_after(package: str, *modules: str, by_others: bool = False) -> None:
    """Import ``modules`` when ``package`` has been imported: now, if that has happened, and else right after it.

    It costs nothing where the package is never imported.

    Args:
        package: full name of a package or module.
        modules: full names; they may import the package themselves, and nothing of this library that imports it.
        by_others: not where a module of this library imports the package. ``modules`` may then need what they like of
            the library, which would be half there otherwise, and is left to import them where it needs them.
    """
    if package in sys.modules:
        _import_all(modules)
    else:
        sys.meta_path.insert(0, _Finder(package, modules, by_others))


class _Finder:
    """Lets the other finders find ``package``, once, and imports ``modules`` after it has been executed."""

    def __init__(self, package: str, modules: tuple[str, ...], by_others: bool) -> None:
        self.package, self.modules, self.by_others = package, modules, by_others

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.package:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None and hasattr(loader, "exec_module"):
            execute = loader.exec_module

            def execute_and_import(module: ModuleType) -> None:
                loader.exec_module = execute
                execute(module)
                if not (self.by_others and _importing_ourselves()):
                    _import_all(self.modules)

            loader.exec_module = execute_and_import
        return spec


def _importing_ourselves() -> bool:
    """Whether a module of this library, besides the root, is being imported."""
    root = __name__.partition(".")[0]
    ours = (module for name, module in list(sys.modules.items()) if name.startswith(f"{root}."))
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in ours)


def _import_all(modules: tuple[str, ...]) -> None:
    for module in modules:
        if module not in sys.modules:  # another thread that is at it must not be waited for: it waits for the package
            import_module(module)
