"""A disk that gets full: every writer names the file in an OSError and leaves what was there; commands say one line."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from writers import WRITERS

import sparsifiner
from sparsifiner._utils.files import replacing, write_atomically, write_together
from sparsifiner.calibration.state import State
from sparsifiner.cli import main
from sparsifiner.evaluation import pareto, results
from sparsifiner.training import engine


class Disk:
    """A small one of its own; :meth:`fill` leaves no room on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        with (self.folder / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    def empty(self) -> None:
        (self.folder / "ballast").unlink()

    def files(self) -> dict[str, bytes]:
        """Content by path, without the ballast."""
        paths = (path for path in self.folder.rglob("*") if path.is_file() and path.name != "ballast")
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}


class Limit(Disk):
    """The same by a limit on the size of files, which needs no rights; it holds for all files of this process."""

    def fill(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, self.before[1]))

    def empty(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    yield Disk(tmp_path / "disk")
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


@pytest.fixture(params=["disk", "limit"])
def any_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    if request.param == "limit":
        (tmp_path / "limited").mkdir()
        return Limit(tmp_path / "limited")
    return request.getfixturevalue("disk")


FULL = r"\[Errno \d+\] (No space left on device|File too large): '.*'"


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_names_its_file_and_keeps_what_was_there(writer, any_disk, capsys):
    write, names = WRITERS[writer]
    out = any_disk.folder / "out"
    out.mkdir()
    for before in ({}, None):  # nothing there yet, and an earlier result
        if before is None:
            write(out)
            before = any_disk.files()
            assert len(before) == len(names)
        any_disk.fill()
        try:
            with pytest.raises(OSError, match=FULL) as full:
                write(out)
        finally:
            any_disk.empty()
        assert Path(full.value.filename).parent == out
        assert Path(full.value.filename).name in names
        assert any_disk.files() == before
    write(out)  # with room again, it works


def test_what_libraries_make_of_it(any_disk, capsys):
    """Rust tells the number in words, torch hides the error behind another; a caller sees neither."""

    def in_rust(path: Path) -> None:
        save_file({"x": torch.zeros(50_000)}, path)

    def in_torch(path: Path) -> None:
        with path.open("wb") as file:
            torch.save({"x": torch.zeros(50_000)}, file)

    path = any_disk.folder / "file"
    any_disk.fill()
    try:
        for write in (in_rust, in_torch):
            with pytest.raises(OSError, match=FULL) as full, replacing(path) as temporary:
                write(temporary)
            assert full.value.filename == str(path)
    finally:
        any_disk.empty()
    assert any_disk.files() == {}


def test_the_file_that_did_not_fit_is_the_one_named(disk):
    names = [disk.folder / name for name in ("first", "second", "third")]
    disk.fill()
    disk.empty()
    room = os.statvfs(disk.folder).f_bavail * os.statvfs(disk.folder).f_bsize
    for number, large in enumerate(names):
        with pytest.raises(OSError, match="No space") as full:
            write_together({name: b"x" * (room + 1 if name == large else 10) for name in names})
        assert full.value.filename == str(large), number
    assert disk.files() == {}


def test_errors_that_are_no_failed_write_stay_what_they_are(tmp_path):
    for error in (ValueError("(os error 2) in a text"), RuntimeError("x"), FileNotFoundError(2, "no", "other file")):
        with pytest.raises(type(error)) as kept, replacing(tmp_path / "file"):
            raise error
        assert kept.value is error
    assert list(tmp_path.iterdir()) == []

    def handle_one_and_raise_another() -> None:
        try:
            raise FileNotFoundError(2, "no", "handled before")
        except FileNotFoundError:
            raise KeyError("x") from None

    with pytest.raises(KeyError), replacing(tmp_path / "file"):
        handle_one_and_raise_another()


@pytest.fixture
def cli(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        torch.manual_seed(0)  # as in a process of its own
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return stop.value.code, *capsys.readouterr()

    return call


def error_of(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error: ") or "rror" in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: cannot write ")
    assert "No space left on device" in lines[0]
    return lines[0]


def filling(disk: Disk, function, at: int = 1):
    """``function``, before whose ``at``-th call the disk gets full."""
    calls = 0

    def wrapped(*arguments, **settings):
        nonlocal calls
        calls += 1
        if calls == at:
            disk.fill()
        return function(*arguments, **settings)

    return wrapped


def test_calibrate_goes_on_from_its_state(disk, cli, classifier, folder_of_images, monkeypatch, tmp_path):
    (tmp_path / "c.yaml").write_text("predictor: lowrank\nn_down: 4\ndense_below: 0\n")
    command = [
        "calibrate", "--model", classifier, "--images", folder_of_images / "train", "--num-images", 3, "--steps", 2,
        "--config", tmp_path / "c.yaml", "--output", disk.folder / "out",
    ]  # fmt: skip
    disk.fill()
    code, _, err = cli(*command)  # not even the first state fits
    assert code == 2
    assert "calibration-state.safetensors" in error_of(err)
    assert "continues" not in err
    disk.empty()
    with monkeypatch.context() as patch:
        patch.setattr(sparsifiner, "save_pretrained", filling(disk, sparsifiner.save_pretrained))
        code, _, err = cli(*command)
    assert code == 2
    line = error_of(err)
    assert "holds what is done; the same command continues from it" in line
    assert list(disk.files()) == ["out/calibration-state.safetensors"]
    disk.empty()
    monkeypatch.setattr(State, "save", None)  # all is done already
    code, _, err = cli(*command)
    assert code == 0, err
    assert sorted(disk.files()) == ["out/calibration.json", "out/model.safetensors", "out/sparsifiner.json"]


def test_train_goes_on_from_its_checkpoint(disk, cli, recipe, monkeypatch, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe().to_dict()))
    command = ["train", "--recipe", tmp_path / "recipe.yaml", "--cpu", "--output", disk.folder / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", filling(disk, engine.save_checkpoint, at=2))
        code, _, err = cli(*command)
    assert code == 2
    assert error_of(err).endswith("the same command goes on from the last checkpoint")
    kept = disk.files()
    assert sorted(kept) == ["out/checkpoint.pt", "out/history.json"]
    disk.empty()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_model", filling(disk, engine.save_model, at=2))
        code, _, err = cli(*command)
    assert code == 2
    assert "out/ema" in error_of(err)
    assert "resuming" in err
    disk.empty()
    code, _, err = cli(*command)
    assert code == 0, err
    assert {"out/model/model.safetensors", "out/ema/sparsifiner.json", "out/result.json"} <= disk.files().keys()


def test_a_sweep_keeps_its_rows(disk, cli, classifier, folder_of_images, monkeypatch):
    command = [
        "pareto", "--model", classifier, "--data", folder_of_images, "--methods", "local", "--keep-rate", 0.5,
        "--repeats", 0, "--workers", 0, "--num-images", 4, "--output", disk.folder / "out",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(pareto, "save_rows", filling(disk, results.save_rows, at=2))
        code, _, err = cli(*command)
    assert code == 2
    assert error_of(err).endswith("the same command goes on from here")
    assert sorted(disk.files()) == ["out/pareto.csv", "out/pareto.json"]
    assert len(json.loads(disk.files()["out/pareto.json"])["rows"]) == 1
    disk.empty()
    code, _, err = cli(*command)
    assert code == 0, err
    assert len(json.loads(disk.files()["out/pareto.json"])["rows"]) == 2


def test_report_and_validate_leave_earlier_results(disk, cli, classifier, folder_of_images, monkeypatch):
    out = disk.folder / "out"
    commands = [
        ["report", "--model", classifier, "--images", folder_of_images / "val", "--num-images", 1, "--repeats", 0,
         "--no-memory", "--output", out],
        ["validate", "--model", classifier, "--data", folder_of_images, "--repeats", 0, "--workers", 0, "--limit", 2,
         "--output", out / "validation.json"],
    ]  # fmt: skip
    for command in commands:
        code, _, err = cli(*command)
        assert code == 0, err
    before = disk.files()
    disk.fill()
    for command in commands:
        code, _, err = cli(*command)
        assert code == 2
        assert str(out) in error_of(err)
    assert disk.files() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"], ["--version"], ["report", "--help"]])
def test_standard_output_on_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sparsifiner", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == "error: cannot write No space left on device; make room there, or name another place\n"
    assert done.returncode == 2


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m sparsifiner info --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 where all of it was written before


def test_a_background_thread_that_cannot_write_stays_silent(capsys):
    import threading

    from sparsifiner.cli.main import _thread_failed

    def fail(error: Exception) -> None:
        raise error

    before, threading.excepthook = threading.excepthook, _thread_failed
    try:
        for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a defect")):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
    finally:
        threading.excepthook = before
    err = capsys.readouterr().err
    assert "No space" not in err
    assert "a defect" in err


def test_a_short_write_leaves_nothing(disk):
    """The first half fits."""
    room = os.statvfs(disk.folder).f_bavail * os.statvfs(disk.folder).f_bsize
    write_atomically(disk.folder / "file", b"old")
    with pytest.raises(OSError, match="No space"):
        write_atomically(disk.folder / "file", b"x" * (room + 1))
    assert disk.files() == {"file": b"old"}
