"""Random settings, right and wrong, nested and flat: refused in one line, or a model that runs and comes back."""

from __future__ import annotations

import copy
import json
import random
import warnings
from functools import lru_cache
from typing import Any

import timm
import torch
from fuzz_files import ODD
from torch import nn

from sparsifiner import SparsifinerConfig, SparsifinerError, set_keep_rate, sparsify
from sparsifiner.training.recipe_file import from_dict

RATES = (0.01, 0.1, 0.3, 0.5, 0.999, 1, 1.0, 5e-324, [0.2, 0.6], [0.2], [0.1, 0.2, 0.3])
PAIRS = ([1, 1], [2, 2], [4, 4], [2, 3], [3, 5], [8, 8], [9, 1], [1, 8], [100, 100])
COUNTS = (None, 0, 1, 2, 3, 5, 8, 64, 1000)
NUMBERS = (None, 0, 0.0, 0.02, 0.05, 0.5, 1.0, 2)
GOOD: dict[str, tuple[Any, ...]] = {
    "keep_rate": RATES,
    "query_tile": PAIRS,
    "keep_prefix": (True, False),
    "mode": ("auto", "sparse", "dense"),
    "dense_below": (None, 0, 1, 50, 10**6),
    "backend": ("auto", "reference", "gather", "native"),
    "attention_dtype": ("model", "float32", "bfloat16", "auto"),
    "tail": (None, *PAIRS),
    "preset": ("default", "paper"),
    "predictor": ("pooled", "lowrank", "oracle", "local", "strided", "random"),
}
OF_PREDICTORS: dict[str, dict[str, tuple[Any, ...]]] = {
    "pooled": {"query_pool": PAIRS, "query_refine": (0, 1, 2, 5), "reduction": ("max", "sum"),
               "screen_from": (None, 0, 1, 32, 2048)},
    "lowrank": {"reduce_n_factor": (1, 2, 6, 1000), "n_down": COUNTS, "reduce_c_factor": (1, 2, 5, 16, 1000),
                "scale": ("head_dim", "num_heads", 0.1), "coef_topk": COUNTS, "coef_threshold": NUMBERS,
                "basis_threshold": NUMBERS, "score_threshold": NUMBERS, "share_basis": (True, False),
                "reduction": ("max", "sum"), "attn_recon": (True, False)},
    "random": {"seed": (0, -1, 2**63 - 1, -(2**63))},
}  # fmt: skip
OF_TAIL: dict[str, tuple[Any, ...]] = {"block": PAIRS, "refine": (0, 1, 2, 100), "offset": (True, False)}


@lru_cache(maxsize=1)
def models() -> tuple[nn.Module, ...]:
    """Two layers each: with a class token and registers, without any prefix, with rotary positions, with a bias."""
    small = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    torch.manual_seed(0)
    return tuple(
        timm.create_model(name, **{**small, **more}).eval()
        for name, more in (
            ("vit_tiny_patch16_224", {}),
            ("vit_tiny_patch16_224", {"reg_tokens": 3, "dynamic_img_size": True}),
            ("vit_base_patch16_siglip_224", {}),
            ("eva02_tiny_patch14_224", {}),
            ("beit_base_patch16_224", {}),
        )
    )


def draw(rng: random.Random) -> dict[str, Any]:
    """Some settings; one in three is spoilt."""
    settings = {name: rng.choice(GOOD[name]) for name in rng.sample(list(GOOD), rng.randint(0, 5))}
    name = settings.get("predictor", "lowrank" if settings.get("preset") == "paper" else "pooled")
    own = OF_PREDICTORS.get(name, {})
    own = {key: rng.choice(own[key]) for key in rng.sample(list(own), rng.randint(0, min(3, len(own))))}
    tail = {key: rng.choice(OF_TAIL[key]) for key in rng.sample(list(OF_TAIL), rng.randint(0, 2))}
    if rng.random() < 0.5:  # the flat form of version 0.1.0
        settings.update(own)
        settings.update({f"tail_{key}": value for key, value in tail.items() if key != "block"})
    else:
        if own:
            settings["predictor"] = {"name": name, **own}
        if tail and settings.get("tail", 0) is not None:
            settings["tail"] = tail
    if rng.random() < 0.35:
        place = rng.choice([settings, *(value for value in settings.values() if isinstance(value, dict))])
        key = rng.choice([*place, "x", "seed", "keep_rat", 3, None, "name", "block"])
        place[key] = copy.deepcopy(rng.choice(ODD))
    return copy.deepcopy(settings)


def run(seed: int) -> str:
    """Read random settings, and convert and run a model by them.

    Raises:
        AssertionError: if anything but a refusal in one line, or a model that runs, comes of it.
    """
    rng = random.Random(seed)
    settings = draw(rng)
    model = rng.choice(models())
    done = f"seed {seed}: {settings}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f"seed {seed}: {_use(settings, model, rng)}"
    except SparsifinerError as error:
        said = str(error)
        if not said or "\n" in said or len(said) > 600:
            raise AssertionError(f"{done}: refused as {said[:1000]!r}") from error
        return f"seed {seed}: refused"
    except Exception as error:
        raise AssertionError(f"{done}: {type(error).__name__}: {str(error)[:300]}") from error


def _use(settings: dict[str, Any], model: nn.Module, rng: random.Random) -> str:
    read = rng.choice([SparsifinerConfig.from_settings, SparsifinerConfig.from_dict])
    if read is SparsifinerConfig.from_dict:
        settings.pop("preset", None)
    config = read(settings)
    stored = config.to_dict()
    assert SparsifinerConfig.from_dict(json.loads(json.dumps(stored))) == config, "JSON changes it"
    assert SparsifinerConfig.from_settings(stored) == config, "its own settings change it"
    assert SparsifinerConfig.from_dict(stored) == config, "its own settings change it"
    recipe = from_dict({"phases": [{"name": "cls", "steps": 1}], "sparsity": stored, "model": "x"})
    assert recipe.sparse_config() == config, "a recipe changes it"
    sparse = sparsify(model, config)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rng.randrange(1000)))
    if rng.random() < 0.3:
        sparse.train()
        out = sparse(x)
        out.sum().backward()
    else:
        with torch.inference_mode():
            out = sparse(x)
    assert out.shape == (2, 3), f"shape {tuple(out.shape)}"
    assert out.isfinite().all(), "not finite"
    if rng.random() < 0.3:
        set_keep_rate(sparse, 0.7)
        with torch.inference_mode():
            assert sparse.eval()(x).isfinite().all(), "not finite at another rate"
    return "runs"
