"""Output folders that are checked before long work, and files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from ..errors import SparsifinerError


def check_writable(folder: str | Path) -> Path:
    """Prove that files can be made in ``folder``, which need not exist yet and is not made; nothing is left behind.

    Raises:
        ValueError: if that fails; one line says why and what to do.
    """
    folder = Path(folder)
    try:
        # Made where the first missing folder would be, and only there: several processes may check at the same time.
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        handle, name = tempfile.mkstemp(dir=existing, prefix=".sparsifiner-")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise SparsifinerError(
            f"the output folder {folder} cannot be written ({error.strerror or error}); name another with --output"
        ) from error
    return folder


@contextmanager
def replacing(path: Path, *, sole_writer: bool = False) -> Iterator[Path]:
    """A file beside ``path`` to write to; it takes the place of ``path`` when the block ends without an error.

    Args:
        path: the file.
        sole_writer: no other process writes it at the same time, so what killed ones left beside it is removed.
    """
    if sole_writer:
        for leftover in path.parent.glob(f".{escape(path.name)}-????????"):
            leftover.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file beside its place and move it there, so that no reader ever sees half of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
