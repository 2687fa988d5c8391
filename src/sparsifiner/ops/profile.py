"""What attention takes on this machine, as it was measured once: the file that the choice of dense or sparse reads.

``sparsifiner benchmark --save-profile`` measures and writes it. A forward pass reads no clock: the file is read once in
a process, so a model's outputs are the same until the profile is measured again.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .._utils.files import write_atomically
from .._utils.processor import processor_name
from . import cpu

VARIABLE = "SPARSIFINER_PROFILE"
"""Environment variable: another file than the one in the user's cache, or ``off``."""

FORMAT = 1


@dataclass(frozen=True)
class Costs:
    """Time of dense attention and of the parts of a sparse layer, per unit of work; seconds, or any other unit.

    Args:
        attend: of a multiply-add of the sparse operator.
        score: of a multiply-add of the prediction, selection included.
        element: of an element of q: pooling, grouping of queries, log-counts.
        regroup: of a multiply-add of regrouping the tail's patches.
        call: of everything in a sparse layer that does not depend on the size.
        dense: of a multiply-add of dense ``scaled_dot_product_attention``.
        dense_call: of everything in dense attention that does not depend on the size.
    """

    attend: float
    score: float
    element: float
    regroup: float
    call: float
    dense: float = 1.0
    dense_call: float = 0.0


@dataclass(frozen=True)
class Profile:
    """What was measured on one device in one dtype.

    Args:
        backend: the backend whose kernels were measured.
        costs: one for each number of images that was measured. The choice is sparse only where it is by all of them, so
            that it need not know how many images there are.
        margin: sparse where the predicted share of dense time is below.
        points: what was measured, plain JSON values: settings, tokens, images, seconds dense and sparse.
    """

    backend: str
    costs: tuple[Costs, ...]
    margin: float
    points: list[dict[str, Any]]


def profile_path() -> Path | None:
    """The file of profiles; None where the environment turns profiles off."""
    given = os.environ.get(VARIABLE)
    if given and given.lower() == "off":
        return None
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "sparsifiner" / "profile.json"


def device_key(device: torch.device) -> str:
    """What a profile holds for: the device, how it is used, and the versions of what computes on it."""
    if device.type == "cuda":
        name, used = torch.cuda.get_device_name(device), f"triton {_version('triton')}"
    else:
        name, used = processor_name(), f"{cpu.level()}, {torch.get_num_threads()} threads"
    return f"{name}, {used}, torch {torch.__version__}, sparsifiner {_version('sparsifiner')}"


def find_profile(device_type: str, device_index: int | None, dtype: torch.dtype) -> Profile | None:
    """The profile of a device in a dtype, or None where there is none, or it belongs to another machine or version."""
    path = profile_path()
    if path is None or device_type not in ("cpu", "cuda"):
        return None
    device = torch.device(device_type) if device_index is None else torch.device(device_type, device_index)
    return _read(path).get((device_key(device), str(dtype).removeprefix("torch.")))


# torch.compiler.assume_constant_result, which does no more, but imports the whole of torch._dynamo for it.
find_profile._dynamo_marked_constant = True  # type: ignore[attr-defined]


def save_profiles(device: torch.device, profiles: dict[str, Profile]) -> Path:
    """Write the profiles of one device, by dtype; those of other devices stay.

    Returns:
        The file.

    Raises:
        OSError: if it cannot be written; the old file stays then.
    """
    path = profile_path()
    assert path is not None
    devices = _devices(path)
    devices[device_key(device)] = {name: asdict(profile) for name, profile in profiles.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"format": FORMAT, "devices": devices}, indent=1) + "\n")
    _read.cache_clear()
    return path


@functools.cache
def _read(path: Path) -> dict[tuple[str, str], Profile]:
    found = {}
    for device, dtypes in _devices(path).items():
        for dtype, values in dtypes.items():
            try:
                costs = tuple(Costs(**item) for item in values["costs"])
                found[device, dtype] = Profile(values["backend"], costs, float(values["margin"]), values["points"])
            except (TypeError, KeyError, ValueError):
                continue  # of another version: as if it were not there
    return found


def _devices(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where it is missing, damaged or of another format, since it can be made again."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    fits = isinstance(values, dict) and values.get("format") == FORMAT and isinstance(values.get("devices"), dict)
    return {name: item for name, item in values["devices"].items() if isinstance(item, dict)} if fits else {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
