"""The formats that models can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from .._utils.checks import choose
from ..errors import SparsifinerError

Run = Callable[[Tensor], list[Tensor]]
"""An exported model in its runtime: a batch of images to its outputs."""


@dataclass(frozen=True)
class Exporter:
    """How models get to a format.

    Args:
        name: what callers write, ``to="name"``.
        title: what messages call it.
        suffixes: of files in this format, the usual one first.
        needs: packages without which it does not work.
        write: called as ``write(model, x, path, any_batch)``; writes the file, and the ones that belong to it, for
            batches like ``x`` or with ``any_batch`` of any size.
        load: called with the path; the model in its runtime.
        standard_operators: the graph holds standard operators only, computes in float32, and is compared with
            PyTorch's own arithmetic; otherwise it calls the library's operations.
        companions: files that belong to the one at a path.
        note: what users have to know, in one line.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, Path, bool], object]
    load: Callable[[Path], Run]
    standard_operators: bool = True
    companions: Callable[[Path], Sequence[Path]] = lambda path: ()
    note: str = ""

    def check_installed(self) -> None:
        """Refuse if a package is missing.

        Raises:
            SparsifinerError: in one line that says what to install.
        """
        missing = [package for package in self.needs if find_spec(package) is None]
        if missing:
            raise SparsifinerError(
                f"{self.title} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
                f"installed: pip install 'sparsifiner[export]'"
            )


EXPORTERS: dict[str, Exporter] = {}


def register_exporter(exporter: Exporter) -> None:
    """Add a format."""
    EXPORTERS[exporter.name] = exporter


def exporter_for(path: Path, to: str | None) -> Exporter:
    """The format named ``to``, or if None the one that the suffix of ``path`` says.

    Raises:
        SparsifinerError: if there is none.
    """
    if to is not None:
        choose("format", to, tuple(EXPORTERS))
        found = EXPORTERS[to]
        if path.suffix not in found.suffixes:
            raise SparsifinerError(f"{path} should end in {found.suffixes[0]}, as files of {found.title} do")
        return found
    for exporter in EXPORTERS.values():
        if path.suffix in exporter.suffixes:
            return exporter
    known = ", ".join(f"{exporter.suffixes[0]} ({name})" for name, exporter in EXPORTERS.items())
    raise SparsifinerError(f"the suffix of {path} names no format; choose from {known}, or name one with to=")
