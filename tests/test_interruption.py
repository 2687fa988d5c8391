"""Ctrl-C at any moment: one line, exit code 130, no traceback, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LINE = "interrupted; no half-written file was left"
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests themselves may run where it is ignored
sys.argv = ["sparsifiner", *sys.argv[1:]]
from sparsifiner.cli import main
{before}
module = sys.modules["sparsifiner.cli.main"]
first = module._silence_retries
def told():  # what main does first, once it handles the signal
    print("started", file=sys.stderr, flush=True)
    first()
module._silence_retries = told
main()
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as terminals send them are POSIX's")


def interrupt(
    arguments: list[str], delay: float | None, *, folder: Path, before: str = "", times: int = 1
) -> tuple[int, str]:
    """Start a command, interrupt it ``delay`` seconds after; its exit code and what it said after that.

    With None it interrupts itself.
    """
    with subprocess.Popen(
        [sys.executable, "-c", START.format(before=before), *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline() == "started\n"
        time.sleep(delay or 0)
        for _ in range(0 if delay is None else times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        said = process.stderr.read()
        return process.wait(60), said


def check(result: tuple[int, str]) -> None:
    code, said = result
    lines = [line for line in said.splitlines() if line.strip()]
    assert lines[-1:] == [LINE], said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert "error:" not in said
    assert code == 130


REPORT = ["report", "--output", "out", "--img-size", "504", "--num-images", "2"]


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.3, 0.8, 1.6, 2.5, 4.0])
def test_a_report_is_interrupted_while_it_starts_and_works(delay, tmp_path):
    """Argument parsing, imports, loading, the first forward passes: wherever that finds it on this machine."""
    check(interrupt(REPORT, delay, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_impatience_changes_nothing(tmp_path):
    check(interrupt(REPORT, 1.0, folder=tmp_path, times=4))
    assert list(tmp_path.iterdir()) == []


SWALLOWED = """
import signal, sparsifiner.report.run
class Clumsy:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000): pass
def run_report(*arguments):
    {how}
    for _ in range(10**9): pass
sparsifiner.report.run.run_report = run_report
"""


@pytest.mark.parametrize(
    "how",
    [
        "Clumsy()",
        "try: signal.raise_signal(signal.SIGINT)\n    except BaseException: raise ImportError('x') from None",
        "try: signal.raise_signal(signal.SIGINT)\n    except BaseException: raise SystemExit(3)",
    ],
    ids=["ignored in a destructor", "made an error", "made an exit"],
)  # fmt: skip
def test_interruptions_that_other_libraries_lose_or_change(how, tmp_path):
    check(interrupt(["report", "--output", "out"], None, folder=tmp_path, before=SWALLOWED.format(how=how)))
    assert list(tmp_path.iterdir()) == []


def test_a_program_with_a_handler_of_its_own_keeps_it(capsys):
    from sparsifiner.cli import main

    def own(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGINT, own)
    try:
        with pytest.raises(SystemExit):
            main(["--version"])
        assert signal.getsignal(signal.SIGINT) is own
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(SystemExit):
            main(["--version"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
