"""Random and mangled command lines: done, or one line on stderr and exit code 2; never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import random
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

from fuzz_files import samples

from sparsifiner import SparsifinerError
from sparsifiner.cli import main

VALUES = (
    "0.1", "0.05,0.1", "1", "0", "-1", "nan", "inf", "1e400", "1e-400", "0.1,,0.2", "518", "32x64", "0x0", "99999",
    "9" * 5000,
    "64,4096", "float32", "bfloat16,float32", "int8", "cpu", "cuda", "cuda:7", "mps", "builtin", "vit_tiny_patch16_224",
    "hf-hub:someone/none", "", " ", ",", "..", ".", "/", "/dev/null", "/proc/self/mem", "\u0000", "é\n\t", "--", "-",
    "--help", "true", "spectral", "per_layer", "training-free,calibrated", "fine-tuned", "sparsifiner,evit", "nonsense",
    "folder", "cifar10-png", "torch/CIFAR10", "hf/x", "val", "2147483648", "18446744073709551616", "a=b", "seed=1",
    "seed=",
    "phases.0.lr=1e-4", "phases.9.lr=1", "data.path=.", "data.path.x=1", "=", "sparsity=[", "model=null", "a" * 9000,
)  # fmt: skip
OPTIONS: dict[str, tuple[str, ...]] = {
    "report": ("--model", "--images", "--img-size", "--keep-rate", "--config", "--output", "--num-images", "--dtype",
               "--device", "--repeats", "--max-seconds", "--max-tokens", "--no-memory", "--json"),
    "benchmark": ("--model", "--img-size", "--tokens", "--keep-rate", "--config", "--batch", "--dtype", "--compile",
                  "--repeats", "--max-seconds", "--max-tokens", "--json"),
    "calibrate": ("--images", "--output", "--model", "--val-images", "--keep-rate", "--keep-rates", "--config",
                  "--img-size", "--num-images", "--start", "--steps", "--learning-rate", "--seed", "--dtype", "--json"),
    "info": ("--json", "--help"),
    "pareto": ("--model", "--data", "--source", "--split", "--train-split", "--methods", "--keep-rate", "--stages",
               "--recipe", "--img-size", "--num-images", "--batch-size", "--workers", "--output", "--download"),
    "train": ("--recipe", "--output", "--cpu"),
    "validate": ("--model", "--data", "--source", "--split", "--img-size", "--keep-rate", "--config", "--limit",
                 "--batch-size", "--workers", "--repeats", "--dtype", "--device", "--output", "--json"),
}  # fmt: skip
FLAGS = ("--no-memory", "--json", "--compile", "--download", "--cpu", "--help")
NEEDED = {
    "calibrate": ("--images", "images", "--output", "out"),
    "pareto": ("--model", "builtin"),
    "train": ("--recipe", "recipe.yaml"),
    "validate": ("--model", "builtin"),
}
WORK = (
    "sparsifiner.report.run.run_report",
    "sparsifiner.models.load_model",
    "sparsifiner.cli.benchmark._build",
    "sparsifiner.evaluation.run_sweep",
    "sparsifiner.evaluation.validate",
    "sparsifiner.training.engine.train",
)
"""Where a command line has been understood and work begins, which here is refused."""


class Understood(SparsifinerError):
    """What work raises instead of being done."""


@lru_cache(maxsize=1)
def places() -> tuple[str, ...]:
    """Files and folders, sound and unsound, as values of options."""
    kept = samples()
    return tuple(str(path) for path in (kept, *sorted(kept.iterdir()), kept / "missing", kept / "flat.json" / "below"))


def draw(rng: random.Random) -> list[str]:
    command = rng.choice(list(OPTIONS))
    words = [command, *(NEEDED.get(command, ()) if rng.random() < 0.7 else ())]
    for option in rng.sample(OPTIONS[command], rng.randint(0, min(4, len(OPTIONS[command])))):
        words.append(option)
        if option not in FLAGS:
            words.append(rng.choice(places()) if rng.random() < 0.25 else rng.choice(VALUES))
    if rng.random() < 0.3:
        words.insert(rng.randrange(len(words) + 1), rng.choice(VALUES))
    for _ in range(rng.choice([0, 0, 1, 2])):
        place = rng.randrange(len(words))
        kind = rng.randrange(4)
        if kind == 0:
            del words[place]
        elif kind == 1:
            words[place : place + 1] = [words[place]] * 2
        elif kind == 2 and words[place]:
            at = rng.randrange(len(words[place]))
            words[place] = (
                words[place][:at] + chr(rng.choice([0, 32, 44, 45, 61, 120, 233, 0x1F600])) + words[place][at + 1 :]
            )
        else:
            words[place : place + 1] = [f"{words[place]}={rng.choice(VALUES)}"]
        if not words:
            break
    return words


@contextlib.contextmanager
def _no_work(folder: str) -> Iterator[None]:
    def understood(*arguments: object, **settings: object) -> None:
        raise Understood("understood")

    before = Path.cwd()
    with contextlib.ExitStack() as stack:
        for name in WORK:
            stack.enter_context(patch(name, understood))
        (Path(folder) / "images").mkdir()
        (Path(folder) / "images" / "a.png").write_bytes((samples() / "photo.png").read_bytes())
        (Path(folder) / "recipe.yaml").write_text((samples() / "recipe.yaml").read_text())
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def run(seed: int) -> str:
    """Run one command line as far as its work.

    Raises:
        AssertionError: if it says more than a line, or leaves anything but 0 or 2 as its exit code.
    """
    words = draw(random.Random(seed))
    done = f"seed {seed}: {[word[:60] for word in words]}"
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, _no_work(folder):
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main(words)
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            raise AssertionError(f"{done}: {type(error).__name__}: {str(error)[:300]}") from error
        left = sorted(path.name for path in Path(folder).iterdir() if path.name not in ("images", "recipe.yaml"))
    said = err.getvalue()
    errors = [line for line in said.splitlines() if not line.startswith(("warning: ", "skipped "))]
    if code == 0:
        assert not errors, f"{done}: done, and yet {said[:300]}"
        return f"seed {seed}: done"
    assert code == 2, f"{done}: exit code {code}: {said[:300]}"
    if not words or words == [""]:
        return f"seed {seed}: help"
    assert errors or "Usage" in out.getvalue(), f"{done}: nothing said"
    assert len([line for line in errors if line.startswith("error: ")]) <= 1, f"{done}: {said[:300]}"
    assert all(line.startswith("error: ") for line in errors) or "loading" in said, f"{done}: {said[:300]}"
    assert len(said) < 1500, f"{done}: {len(said)} characters: {said[:300]}"
    assert not left or "understood" in said, f"{done}: leaves {left}"
    return f"seed {seed}: {'understood' if 'understood' in said else 'refused'}"
