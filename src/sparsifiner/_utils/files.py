"""Output files that appear whole or not at all, through links and to devices, and checks that they can be written.

A regular file is written beside its place and moved there; where a symbolic link leads to it, the link stays. What is
no regular file (a device, a pipe, ``/dev/stdout``) cannot be moved onto and is written to instead. So is a file that
cannot be replaced: one mounted into a container, or in a folder that takes no new files.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from ..errors import SparsifinerError

_MOST_LINKS = 40
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ENODEV, errno.ESTALE)


def check_writable(folder: str | Path) -> Path:
    """Prove that files can be made in ``folder``, which need not exist yet and is not made; nothing is left behind.

    Raises:
        ValueError: if that fails; one line says why and what to do.
    """
    folder = Path(folder)
    try:
        _try_folder(_real(folder))
    except OSError as error:
        raise SparsifinerError(
            f"the output folder {folder} cannot be written ({error.strerror or error}); name another with --output"
        ) from error
    return folder


def check_file_writable(file: str | Path) -> Path:
    """The same for a single output file, which may be a device, a pipe or a link; it is not opened.

    Raises:
        ValueError: if it cannot be written; one line says why and what to do.
    """
    file = Path(file)
    try:
        place = _Place.of(file)
        if place.descriptor is not None:
            _check_descriptor(place.descriptor)
        elif place.special or (place.exists and os.access(place.path, os.W_OK)):
            if not os.access(place.path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            _try_folder(place.path.parent)
    except OSError as error:
        raise SparsifinerError(
            f"the output file {file} cannot be written ({error.strerror or error}); name another with --output"
        ) from error
    return file


def make_folder_of(file: str | Path) -> None:
    """Make the folder in which ``file`` ends up; where it is a link, that of the file it leads to."""
    make_folder(_follow(Path(file))[0].parent)


def make_folder(folder: str | Path) -> Path:
    """Make ``folder`` and those above it; where it is a link to a folder that is gone, that one.

    Raises:
        OSError: if that fails.
    """
    _real(Path(folder)).mkdir(parents=True, exist_ok=True)
    return Path(folder)


@contextmanager
def replacing(path: Path, *, sole_writer: bool = False) -> Iterator[Path]:
    """A temporary file to write to; its content takes the place of ``path`` when the block ends without an error.

    Args:
        path: the file, or what else is written to. A file keeps its mode and owner.
        sole_writer: no other process writes it at the same time, so what killed ones left beside it is removed.

    Raises:
        OSError: if it cannot be written, naming ``path``; whatever a library in the block makes of a full disk, too.
            What ``path`` held is still there.
    """
    with _named(path):
        place = _Place.of(path)
        temporary = place.make_temporary(sole_writer)
    try:
        with _named(path, temporary):
            yield temporary
            place.fill_from(temporary)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that no reader ever sees half of it; links, devices and pipes as in :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_together(files: Mapping[Path, bytes | str | Callable[[Path], object]]) -> None:
    """Write several files; none takes its place before the content of all is on the disk, and the first does last.

    Args:
        files: content by path, or a function that writes it to the path it is given.
    """
    with ExitStack() as stack:
        temporaries = [stack.enter_context(replacing(path)) for path in files]
        for temporary, (path, content) in zip(temporaries, files.items(), strict=True):
            with _named(path, temporary):
                if callable(content):
                    content(temporary)
                else:
                    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
                _flush_to_disk(temporary)


@dataclass(frozen=True)
class _Place:
    """Target that writing to a path ends up at.

    Args:
        path: with its links followed.
        descriptor: number of the open file of this process that the path names (``/dev/stdout``), or None.
        mode: of what is there, as ``stat`` says it; None if there is nothing.
    """

    path: Path
    descriptor: int | None
    mode: os.stat_result | None

    @classmethod
    def of(cls, path: Path) -> _Place:
        final, descriptor = _follow(path)
        if descriptor is not None:
            return cls(final, descriptor, None)
        try:
            mode = os.stat(final)
        except FileNotFoundError:
            return cls(final, None, None)
        if stat.S_ISDIR(mode.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        return cls(final, None, mode)

    @property
    def exists(self) -> bool:
        return self.mode is not None

    @property
    def special(self) -> bool:
        """True for a target that is there and no regular file."""
        return self.mode is not None and not stat.S_ISREG(self.mode.st_mode)

    def make_temporary(self, sole_writer: bool) -> Path:
        """An empty file: beside the place if it can be moved there, else where the system keeps such files."""
        if self.descriptor is None and not self.special:
            prefix = f".{_short(self.path.name)}-"
            if sole_writer:
                for leftover in self.path.parent.glob(f"{escape(prefix)}????????"):
                    leftover.unlink(missing_ok=True)
            try:
                return _temporary(self.path.parent, prefix)
            except OSError:
                if not (self.exists and os.access(self.path, os.W_OK)):
                    raise
        return _temporary(None, ".sparsifiner-")

    def fill_from(self, temporary: Path) -> None:
        if self.descriptor is None and not self.special and temporary.parent == self.path.parent:
            self._set_mode(temporary)
            _flush_to_disk(temporary)
            try:
                os.replace(temporary, self.path)
            except OSError:  # it is mounted there, or belongs to somebody else in a shared folder
                if not (self.exists and os.access(self.path, os.W_OK)):
                    raise
            else:
                return
        with temporary.open("rb") as content, os.fdopen(self._open(), "wb") as out:
            shutil.copyfileobj(content, out)

    def _open(self) -> int:
        if self.descriptor is None:
            return os.open(self.path, os.O_WRONLY | (0 if self.special else os.O_TRUNC))
        for stream in (sys.stdout, sys.stderr):  # what was printed before comes first
            if stream is not None:
                stream.flush()
        return os.dup(self.descriptor)

    def _set_mode(self, temporary: Path) -> None:
        if self.mode is None:
            os.chmod(temporary, 0o666 & ~_umask())
            return
        with suppress(OSError):
            os.chown(temporary, self.mode.st_uid, self.mode.st_gid)
        os.chmod(temporary, stat.S_IMODE(self.mode.st_mode))


def _follow(path: Path) -> tuple[Path, int | None]:
    """The path behind all links, and the number of the open file of this process that it names, if it does.

    The system's links to open files (``/proc/self/fd/1``) are not followed: what they show is no path for a pipe, and
    for a file one that others may read from already.
    """
    path = Path(os.path.abspath(path)) if str(path) in ("", ".", "..") else path
    for _ in range(_MOST_LINKS):
        parent = Path(os.path.realpath(path.parent))
        path = parent / path.name
        if opened := re.fullmatch(r"/proc/(\d+)(?:/task/\d+)?/fd|/dev/fd", str(parent)):
            own = opened[1] in (None, str(os.getpid())) and path.name.isdigit()
            return path, int(path.name) if own else None
        if not path.is_symlink():
            return path, None
        path = parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _check_descriptor(number: int) -> None:
    import fcntl  # which systems lack that have no such paths either

    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _real(folder: Path) -> Path:
    """``folder`` with its links followed, also those that lead to nothing.

    Raises:
        OSError: for links that lead in a circle.
    """
    real = Path(os.path.realpath(folder))
    for path in (real, *real.parents):
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
    return real


def _try_folder(folder: Path) -> None:
    # Made where the first missing folder would be, and only there: several processes may check at the same time.
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    handle, name = tempfile.mkstemp(dir=existing, prefix=".sparsifiner-")
    os.close(handle)
    os.unlink(name)


def _temporary(folder: Path | None, prefix: str) -> Path:
    handle, name = tempfile.mkstemp(dir=folder, prefix=prefix)
    os.close(handle)
    return Path(name)


def _short(name: str) -> str:
    """``name``, cut so that a longer one fits into a file system's 255 bytes, too."""
    return name.encode()[:200].decode(errors="ignore")


def _flush_to_disk(file: Path) -> None:
    """Wait for the disk, which may say only now that it is full."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """A failed write in the block names ``path``, whatever a library made of it; other errors stay what they are."""
    try:
        yield
    except OSError as error:
        ours = (str(path), str(temporary))
        copied = error.filename2 in ours and error.errno in _DISK_ERRORS  # shutil names the source first
        if error.errno is None or not (error.filename is None or error.filename in ours or copied):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        raise OSError(cause.errno, os.strerror(cause.errno or 0), str(path)) from error


def _disk_error(error: BaseException | None) -> OSError | None:
    """The failed write behind an error that a library has made of it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error
        # safetensors writes in Rust and tells the number in words.
        if (number := re.search(r"\(os error (\d+)\)", str(error))) and int(number[1]) in _DISK_ERRORS:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
