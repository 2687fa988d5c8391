"""Whatever an output path is: files are replaced whole, links stay, devices and pipes are written to."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from writers import WRITERS

from sparsifiner._utils import files
from sparsifiner._utils.files import (
    check_file_writable,
    check_writable,
    make_folder,
    make_folder_of,
    replacing,
    write_atomically,
)
from sparsifiner.calibration.state import State
from sparsifiner.cli import main


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def read_pipe(path: Path) -> tuple[threading.Thread, list[bytes]]:
    """Someone who reads a named pipe to its end."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, found


@pytest.mark.parametrize("links", [0, 1, 3])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_a_file_is_replaced_behind_its_links(tmp_path, links, relative, exists):
    target = tmp_path / "real" / "file"
    target.parent.mkdir()
    if exists:
        target.write_text("old, and longer than new")
        target.chmod(0o640)
    path = target
    for number in range(links):
        link = tmp_path / f"link{number}"
        link.symlink_to(os.path.relpath(path, tmp_path) if relative else path)
        path = link
    before = os.stat(target).st_ino if exists else None
    opened = target.open() if exists else None
    check_file_writable(path)
    write_atomically(path, "new")
    assert target.read_text() == path.read_text() == "new"
    assert path.is_symlink() == bool(links)
    assert not target.is_symlink()
    assert os.stat(target).st_ino != before  # replaced, not written into
    if opened is not None:
        assert opened.read() == "old, and longer than new"  # a reader has the whole old one
        opened.close()
    assert stat.S_IMODE(os.stat(target).st_mode) == (0o640 if exists else 0o666 & ~files._umask())
    assert left_over(tmp_path) == []


def test_a_link_into_a_linked_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "link").symlink_to("folder/../real/file")
    write_atomically(tmp_path / "link", "new")
    write_atomically(tmp_path / "folder" / "other", "new")
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["file", "other"]


def test_links_in_a_circle_and_folders_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for path, number in ((tmp_path / "a", errno.ELOOP), (tmp_path, errno.EISDIR)):
        with pytest.raises(OSError, match=os.strerror(number)) as refused:
            write_atomically(path, "new")
        assert refused.value.filename == str(path)
        with pytest.raises(ValueError, match="output file .* cannot be written"):
            check_file_writable(path)
    with pytest.raises(ValueError, match="output folder .* cannot be written"):
        check_writable(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_behind_a_link_that_leads_nowhere_is_made(tmp_path):
    (tmp_path / "out").symlink_to("disk/out")
    check_writable(tmp_path / "out")
    assert not (tmp_path / "disk").exists()
    make_folder(tmp_path / "out" / "runs")
    assert (tmp_path / "disk" / "out" / "runs").is_dir()
    assert (tmp_path / "out").is_symlink()
    (tmp_path / "file").symlink_to("other/file")
    check_file_writable(tmp_path / "file")
    make_folder_of(tmp_path / "file")
    write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "other" / "file").read_text() == "new"


@pytest.mark.parametrize("linked", [True, False])
def test_a_pipe_is_written_to(tmp_path, linked):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = tmp_path / "link" if linked else pipe
    if linked:
        path.symlink_to(pipe)
    check_file_writable(path)  # does not open it: the reader would see an empty file
    thread, found = read_pipe(pipe)
    content = b"0123456789" * 100_000  # more than a pipe holds
    write_atomically(path, content)
    thread.join(timeout=30)
    assert found == [content]
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode)
    assert left_over(tmp_path) == []


def test_a_reader_that_leaves_is_an_error_that_names_the_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def leave() -> None:
        with pipe.open("rb") as file:
            file.read(10)

    threading.Thread(target=leave, daemon=True).start()
    with pytest.raises(BrokenPipeError):
        write_atomically(pipe, b"x" * 10_000_000)


@pytest.mark.parametrize("linked", [True, False])
def test_a_device_stays_a_device(tmp_path, linked):
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        with device.open("wb") as opened:
            opened.write(b"x")
    except OSError:
        pytest.skip("this user may not make devices")
    path = tmp_path / "link" if linked else device
    if linked:
        path.symlink_to("null")
    check_file_writable(path)
    write_atomically(path, "gone")
    with replacing(path, sole_writer=True) as temporary:
        temporary.write_text("gone")
    assert stat.S_ISCHR(os.lstat(device).st_mode)
    assert sorted(left.name for left in tmp_path.iterdir()) == (["link", "null"] if linked else ["null"])


def test_a_terminal_is_written_to():
    ours, theirs = os.openpty()
    try:
        write_atomically(Path(os.ttyname(theirs)), "hello")
        assert os.read(ours, 100) == b"hello"
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_device_that_is_full_says_so():
    with pytest.raises(OSError, match="No space left") as full:
        write_atomically(Path("/dev/full"), "x")
    assert full.value.errno == errno.ENOSPC
    assert full.value.filename == "/dev/full"
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_socket_cannot_be_written(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="socket"):
            write_atomically(tmp_path / "socket", "x")
        assert stat.S_ISSOCK(os.lstat(tmp_path / "socket").st_mode)


PRINTS = """
import sys
from pathlib import Path
from sparsifiner._utils.files import check_file_writable, write_atomically
path = Path(sys.argv[1])
check_file_writable(path)
print("before")
write_atomically(path, "written\\n")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to_file", [True, False])
def test_standard_output_is_written_in_its_turn(tmp_path, name, to_file):
    """Also where it goes to a file, which must not be replaced: what is printed later would land in the old one."""
    if not os.path.exists("/dev/stdout"):
        pytest.skip("no /dev/stdout here")
    if name == "link":
        (tmp_path / "link").symlink_to("/dev/stdout")
        name = str(tmp_path / "link")
    command = [sys.executable, "-c", PRINTS, name]
    if to_file:
        with (tmp_path / "printed").open("wb") as out:
            subprocess.run(command, stdout=out, check=True)
        printed = (tmp_path / "printed").read_text()
    else:
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert printed == "before\nwritten\nafter\n"


def test_an_open_file_for_reading_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with (tmp_path / "file").open() as opened, pytest.raises(ValueError, match="Permission denied"):
        check_file_writable(f"/dev/fd/{opened.fileno()}")
    with pytest.raises(ValueError, match="cannot be written"):
        check_file_writable("/dev/fd/987")


def test_a_file_that_cannot_be_replaced_is_written_into(tmp_path, monkeypatch):
    """One mounted into a container is busy; in a folder of somebody else's no file can be made."""
    mkstemp = files.tempfile.mkstemp
    for number in (errno.EBUSY, errno.EACCES):
        path = tmp_path / f"file{number}"
        path.write_text("old, and longer than new")

        def refuse(*arguments: object, number: int = number, **settings: object) -> None:
            if settings.get("dir") is not None or number == errno.EBUSY:
                raise OSError(number, os.strerror(number))
            return mkstemp(*arguments, **settings)

        with monkeypatch.context() as patch:
            if number == errno.EBUSY:
                patch.setattr(files.os, "replace", refuse)
            else:
                patch.setattr(files.tempfile, "mkstemp", refuse)
            check_file_writable(path)
            write_atomically(path, "new")
            with pytest.raises(OSError, match=os.strerror(number)) as refused:
                write_atomically(tmp_path / "none", "new")
            assert refused.value.filename == str(tmp_path / "none")
        assert path.read_text() == "new"
    assert left_over(tmp_path) == []


def test_a_file_mounted_into_a_container_is_written_into(tmp_path):
    for name in ("real", "mounted"):
        (tmp_path / name).write_text("old")
    real, mounted = tmp_path / "real", tmp_path / "mounted"
    script = f"mount --bind {real} {mounted} && exec {sys.executable} -c '{PRINTS}' {mounted}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("this user may not mount")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "real").read_text() == "written\n"
    assert (tmp_path / "mounted").read_text() == "old"


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, "n" * 240])
def test_the_longest_names_can_be_written(tmp_path, name):
    write_atomically(tmp_path / name, "new")
    with replacing(tmp_path / name, sole_writer=True) as temporary:
        temporary.write_text("newer")
    assert (tmp_path / name).read_text() == "newer"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_goes_through_links_that_lead_nowhere_yet_and_twice(writer, tmp_path):
    write, names = WRITERS[writer]
    (tmp_path / "out").mkdir()
    (tmp_path / "disk").mkdir()
    for name in names:
        (tmp_path / "out" / name).symlink_to(f"../disk/{name}")
    for _ in range(2):
        write(tmp_path / "out")
    assert all((tmp_path / "out" / name).is_symlink() for name in names)
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == sorted(names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_writes_to_pipes(writer, tmp_path):
    write, names = WRITERS[writer]
    readers = []
    for name in names:
        os.mkfifo(tmp_path / name)
        if writer != "calibration state":  # which reads what is there first
            readers.append(read_pipe(tmp_path / name))
    if writer == "calibration state":
        state = State(None, "test")
        state.path = tmp_path / "state"
        readers.append(read_pipe(tmp_path / "state"))
        state.save()
    else:
        write(tmp_path)
    for thread, found in readers:
        thread.join(timeout=30)
        assert len(found[0]) > 10
    assert all(stat.S_ISFIFO(os.lstat(tmp_path / name).st_mode) for name in names)


def test_validate_writes_its_output_to_what_it_is_given(tmp_path, classifier, folder_of_images, capsys):
    """``--output /dev/null`` as root, which is usual in containers, once made a file of the device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("new/target.json")
    arguments = [
        "validate", "--model", str(classifier), "--data", str(folder_of_images), "--repeats", "0", "--workers", "0",
        "--limit", "2",
    ]  # fmt: skip
    thread, found = read_pipe(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--output", str(tmp_path / name)])
        assert stop.value.code == 0, capsys.readouterr().err
    thread.join(timeout=30)
    assert json.loads(found[0])["rows"]
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)
    assert json.loads((tmp_path / "new" / "target.json").read_text())["rows"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "is a directory" in capsys.readouterr().err.lower()
