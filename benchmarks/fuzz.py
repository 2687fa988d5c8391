"""Random use of the library for as long as you like: the operator, settings, command lines, files and model surgery.

    python benchmarks/fuzz.py fuzz.json --seconds 3600
    python benchmarks/fuzz.py fuzz.json --only settings --seed 4711 --seconds 60

Each case follows from its seed; ``tests/fuzz_<name>.py`` has what is drawn and what must hold, ``tests/test_fuzz.py`` a
short form. The file says how many cases of each were tried and what was found, with the seeds. The exit code is 1 if
something was.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sparsifiner import __version__
from sparsifiner._utils.files import write_atomically

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

NAMES = ("operator", "settings", "commands", "files", "surgery")
WRITE_SECONDS = 30
MOST_EXAMPLES = 5
"""Seeds kept of one finding."""


def fuzz(names: list[str], seconds: float, seed: int, output: Path) -> dict[str, Any]:
    """Run the fuzzers of those names in turn, each for an equal share of ``seconds``, and write what was found."""
    runs = {name: importlib.import_module(f"fuzz_{name}").run for name in names}
    spent, tried = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in names}
    found: dict[str, dict[str, Any]] = {}
    slowest: dict[str, tuple[float, int]] = dict.fromkeys(names, (0.0, seed))
    start = written = time.monotonic()

    def result() -> dict[str, Any]:
        return {
            "sparsifiner": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seed": seed,
            "seconds": round(time.monotonic() - start, 1),
            "tried": tried,
            "outcomes": {name: dict(counts.most_common(8)) for name, counts in outcomes.items()},
            "slowest": {name: {"seconds": round(value[0], 2), "seed": value[1]} for name, value in slowest.items()},
            "found": list(found.values()),
        }

    while time.monotonic() - start < seconds:
        name = min(names, key=spent.__getitem__)
        number, before = seed + tried[name], time.monotonic()
        try:
            said = runs[name](number)
            outcomes[name][str(said).partition(": ")[2].split(" ")[0] if said else "passed"] += 1
        except AssertionError as error:
            outcomes[name]["found"] += 1
            cause = error.__cause__ or error
            last = traceback.extract_tb(cause.__traceback__)[-1]
            place = f"{Path(last.filename).name}, line {last.lineno}"
            entry = found.setdefault(
                f"{name} {place} {type(cause).__name__}",
                {"fuzzer": name, "place": place, "message": str(error)[:2000], "count": 0, "seeds": []},
            )
            entry["count"] += 1
            entry["seeds"] = [*entry["seeds"], number][:MOST_EXAMPLES]
        took = time.monotonic() - before
        spent[name] += took
        tried[name] += 1
        slowest[name] = max(slowest[name], (took, number))
        if time.monotonic() - written > WRITE_SECONDS:
            write_atomically(output, json.dumps(result(), indent=1) + "\n")
            written = time.monotonic()
    write_atomically(output, json.dumps(result(), indent=1) + "\n")
    return result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="JSON file for what was tried and found")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long, all fuzzers together")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next have the next")
    parser.add_argument("--only", choices=NAMES, action="append", help="this fuzzer; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = fuzz(arguments.only or list(NAMES), arguments.seconds, arguments.seed, arguments.output)
    for name, tried in result["tried"].items():
        print(f"{name}: {tried} cases, {result['outcomes'][name]}")
    for entry in result["found"]:
        print(f"found {entry['count']} times ({entry['place']}): {entry['message'][:500]}")
    return 1 if result["found"] else 0


if __name__ == "__main__":
    sys.exit(main())
