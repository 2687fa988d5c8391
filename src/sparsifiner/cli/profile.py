"""``sparsifiner benchmark --save-profile``: attention measured once on this machine, for ``mode="auto"``."""

from __future__ import annotations

import json as jsonlib
from typing import TYPE_CHECKING

from ..errors import SparsifinerError

if TYPE_CHECKING:
    import torch

    from ..ops.profile import Profile


def save_profile(device: torch.device, *, max_seconds: float, json: bool) -> None:
    """Measure the profile of ``device``, write it, and say from how many tokens sparse pays."""
    from rich.console import Console

    from .._utils.progress import progress_on
    from ..measure.profile import measure_profiles
    from ..ops.profile import VARIABLE, device_key, profile_path, save_profiles
    from .console import output_console, say

    if profile_path() is None:
        raise SparsifinerError(f"{VARIABLE}=off turns profiles off; unset it, or set it to the file to write")
    with progress_on(Console(stderr=True)) as notify:
        profiles = measure_profiles(
            device, max_seconds=max_seconds, progress=lambda done, total: notify("attention layers", done, total)
        )
    path = save_profiles(device, profiles)
    pays = {name: pays_from(profile) for name, profile in profiles.items()}
    if json:
        print(jsonlib.dumps({"file": str(path), "device": device_key(device), "pays_from_tokens": pays}, indent=2))
        return
    stdout = output_console()
    say(stdout, device_key(device))
    for name, tokens in pays.items():
        say(stdout, f"{name}, keep 0.1: " + (f"sparse from {tokens} tokens on" if tokens else "dense at every size"))
    say(stdout, f"{path}: models with mode=auto decide by it from now on; delete it, or set {VARIABLE}=off, to undo")


def pays_from(profile: Profile) -> int | None:
    """The smallest square grid's tokens from which a default layer at keep 0.1 runs sparse; None up to 128 x 128."""
    from ..attention import build_predictor
    from ..attention.cost import predicted_share
    from ..config import SparsifinerConfig
    from ..geometry.tiling import Tiling

    config, first = SparsifinerConfig(keep_rate=0.1), None
    for side in range(128, 7, -4):
        tiling = Tiling((side, side), config.query_tile, 1)
        predictor = build_predictor(config, num_heads=6, head_dim=64, grid=(side, side), num_prefix_tokens=1)
        macs = predictor.score_macs(6, 64, tiling)
        if max(predicted_share(config, costs, 6, 64, tiling, macs) for costs in profile.costs) >= profile.margin:
            break
        first = tiling.num_tokens
    return first
