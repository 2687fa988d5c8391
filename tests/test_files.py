"""Checks of output folders before long work, and what killed runs leave in them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from sparsifiner._utils.files import check_writable, replacing
from sparsifiner.calibration.state import State
from sparsifiner.training.checkpoint import Checkpoint, save_checkpoint


def test_several_processes_may_check_one_missing_folder_at_once(tmp_path):
    """``torchrun`` starts them together; each took the other's folder away once, in one of many runs."""
    folder = tmp_path / "runs" / "first"

    def check(_: int) -> None:
        for _ in range(200):
            check_writable(folder)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(8)))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_as_it_was(tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    assert check_writable(str(tmp_path)) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_relative_folder_is_checked_where_it_would_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(check_writable("runs/first")) == "runs/first"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(.*\); name another with --output") as raised:
        check_writable(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_what_killed_runs_left_is_removed_by_the_next_save(tmp_path):
    """A kill leaves half a checkpoint, hundreds of megabytes; those of other files may belong to someone at work."""
    for name in (".checkpoint.pt-abcd1234", ".state-abcd1234", ".model.safetensors-abcd1234", ".state-of-abcd1234"):
        (tmp_path / name).write_bytes(b"half")
    save_checkpoint(Checkpoint(recipe={}, phase=0, update=1, student={}), tmp_path)
    State(tmp_path / "state", "test").save()
    kept = [".model.safetensors-abcd1234", ".state-of-abcd1234", "checkpoint.pt", "state"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    with replacing(tmp_path / "shared") as mine, replacing(tmp_path / "shared") as other:
        mine.write_text("mine")
        other.write_text("other")
    assert (tmp_path / "shared").read_text() == "mine"
