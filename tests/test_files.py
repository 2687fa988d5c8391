"""Checks of output folders before long work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from sparsifiner.files import check_writable


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
