"""Random damage to every file that the library reads: it is read, or refused in one line."""

from __future__ import annotations

import copy
import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from sparsifiner import SparsifinerConfig, SparsifinerError, from_pretrained, save_pretrained, sparsify
from sparsifiner._utils.photos import load_photos, read_photo
from sparsifiner.calibration.state import State
from sparsifiner.evaluation.cell import DENSE, Row
from sparsifiner.evaluation.results import RESULTS, load_rows
from sparsifiner.models import load_model
from sparsifiner.saving import CONFIG_NAME, WEIGHTS_NAME
from sparsifiner.training.checkpoint import CHECKPOINT_NAME, Checkpoint, load_checkpoint, save_checkpoint
from sparsifiner.training.recipe_file import from_dict, load_recipe
from sparsifiner.training.sources import _labels
from sparsifiner.training.student import save_model

ODD = (
    None, True, False, 0, -1, 3, 2**31, 2**63, 2**70, 10**400, 1.5, -0.0, 1e-300, 1e300, "", "x", "0.5", "None",
    "vit_tiny_patch16_224", "\u0000", "é" * 300, [], [0], [1, 2], ["a"], [[]], {}, {"a": 1}, {"name": "pooled"},
    {"": {"": []}},
)  # fmt: skip
SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "in_chans", "n_down", "mlp_ratio")
"""A number here is how much memory a file asks for; a large one is slow, not wrong."""
PHASES = [{"name": "cls", "steps": 2}]
TINY = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=1, num_classes=2)
RECIPE = {
    "model": "builtin", "sparsity": {"preset": "paper"}, "data": {"path": "x", "img_size": 32}, "seed": 3,
    "augment": {"mixup": 0.2, "crop_scale": [0.1, 1]}, "trackers": ["tensorboard"],
    "phases": [{"name": "attn_recon", "epochs": 1.0, "lr": 1e-3},
               {"name": "cls_distill", "steps": 5, "losses": {"ce": 1}}],
}  # fmt: skip


@lru_cache(maxsize=1)
def samples() -> Path:
    """One sound file of each kind, made once."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-files-"))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    save_model(model, folder / "timm")
    for name, config in (("pooled", SparsifinerConfig(query_tile=(2, 2))), ("paper", SparsifinerConfig.paper())):
        save_pretrained(sparsify(model, config), folder / name)
    for name, config in (("flat.json", {"keep_rate": [0.1], "tail_refine": 1, "dense_below": 5}),
                         ("nested.json", SparsifinerConfig.paper().to_dict())):  # fmt: skip
        (folder / name).write_text(json.dumps(config))
    (folder / "nested.yaml").write_text("preset: paper\nkeep_rate: [5e-1, 0.25]\npredictor:\n  n_down: 3\ntail: null\n")
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE, indent=1))
    (folder / "labels.json").write_text(json.dumps([0, 3, 9]))
    row = Row(DENSE, [True, False, True], [1], 5, 5, 9, 1.0, 1.0, 0.0, "", "a", {"model": "a"})
    (folder / RESULTS).write_text(json.dumps({"seed": 0, "rows": [row.to_dict()]}))
    save_checkpoint(Checkpoint(from_dict({"phases": PHASES}).to_dict(), 0, 1, model.state_dict(), images=3), folder)
    metadata = {"done": json.dumps({"reconstruction": 3}), "identity": "me"}
    save_file({"a": torch.ones(3)}, folder / "state.safetensors", metadata=metadata)
    photo = next((Path(timm.__file__).parents[1] / "sparsifiner" / "data" / "photos").glob("*.jpg"), None)
    from PIL import Image

    image = Image.effect_noise((40, 30), 90).convert("RGB") if photo is None else Image.open(photo).resize((40, 30))
    for suffix in ("jpg", "png", "webp", "bmp", "tif"):
        image.save(folder / f"photo.{suffix}")
    return folder


def _recipe(path: Path) -> object:
    return load_recipe(path)


def _checkpoint(path: Path) -> object:
    return load_checkpoint(path.parent, from_dict({"phases": PHASES}), 1, 3, None)


READERS: dict[str, Callable[[Path], object]] = {
    f"pooled/{CONFIG_NAME}": lambda path: from_pretrained(path.parent),
    f"paper/{CONFIG_NAME}": lambda path: load_model(str(path.parent)),
    f"pooled/{WEIGHTS_NAME}": lambda path: from_pretrained(path.parent),
    "timm/config.json": lambda path: load_model(str(path.parent)),
    "timm/model.safetensors": lambda path: load_model(str(path.parent)),
    "flat.json": SparsifinerConfig.from_file,
    "nested.json": SparsifinerConfig.from_file,
    "nested.yaml": SparsifinerConfig.from_file,
    "recipe.json": _recipe,
    "recipe.yaml": _recipe,
    "labels.json": _labels,
    RESULTS: lambda path: load_rows(path.parent, {"seed": 0}),
    CHECKPOINT_NAME: _checkpoint,
    "state.safetensors": lambda path: State(path, "me"),
    **{f"photo.{suffix}": read_photo for suffix in ("jpg", "png", "webp", "bmp", "tif")},
    "photo.png ": lambda path: load_photos(path.parent),
}
"""Of each kind of file: what reads it."""


def damage_values(text: str, draw: random.Random) -> str:
    """A JSON text with one to three of its values replaced, removed, named twice or buried."""
    value = json.loads(text)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(value))
        if not places:
            break
        place, key = draw.choice(places)
        kind = draw.random()
        if kind < 0.15:
            del place[key]
        elif kind < 0.25 and isinstance(place, dict):
            place[draw.choice(["x", "", "name", "seed", "keep_rate", "tail", "predictor"])] = copy.deepcopy(
                draw.choice(ODD)
            )
        elif kind < 0.3:
            place[key] = _buried(draw.choice([3, 63, 64, 70]))
        else:
            odd = copy.deepcopy(draw.choice(ODD))
            if key in SIZES and isinstance(odd, int) and odd > 64:
                odd = 64
            place[key] = odd
    found = json.dumps(value)
    if draw.random() < 0.1 and found.startswith("{") and len(found) > 2:
        name = draw.choice(list(value))
        found = "{" + f"{json.dumps(name)}: 1, " + found[1:]
    return found


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _buried(levels: int) -> Any:
    value: Any = 0
    for number in range(levels):
        value = [value] if number % 2 else {"a": value}
    return value


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """Content cut off, overwritten, repeated, emptied, or preceded by something else."""
    kind, place = draw.randrange(7), draw.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    if kind == 2:
        return content[:place] + bytes(draw.randrange(256) for _ in range(draw.randint(1, 40))) + content[place:]
    if kind == 3:
        return draw.choice([b"", b"\x00" * 100, b"\xff" * 9, b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 5000])
    if kind == 4:
        return draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b" ", b"\n---\n", b"&a [*a]\n"]) + content
    if kind == 5:
        start = draw.randrange(len(content) + 1)
        return content[: max(start, place)] + content[min(start, place) :]
    return content[:place].replace(b":", b"", 1) + content[place:]


def run(seed: int) -> str:
    """Damage one file and read it; says what was done.

    Raises:
        AssertionError: if anything but one line comes of it.
    """
    draw = random.Random(seed)
    name = draw.choice(list(READERS))
    file = name.strip()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / file
        if "/" in file:
            shutil.copytree(samples() / Path(file).parent, target.parent)
        else:
            shutil.copy(samples() / file, target)
        by_value = target.suffix == ".json" or (target.suffix == ".yaml" and draw.random() < 0.5)
        if by_value and draw.random() < 0.7 and file != "nested.yaml":
            target.write_text(damage_values(target.read_text(), draw))
        else:
            target.write_bytes(damage_bytes(target.read_bytes(), draw))
        done = f"seed {seed}: {name}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                READERS[name](target)
            return f"{done}: read"
        except (SparsifinerError, OSError) as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{done}: {type(error).__name__}: {str(error)[:300]}") from error
        assert said, f"{done}: nothing said"
        assert "\n" not in said, f"{done}: several lines: {said}"
        assert len(said) < 2000 + len(folder), f"{done}: {len(said)} characters: {said[:300]}"
        return f"{done}: refused"
