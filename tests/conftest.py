"""Models and inputs that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

# What a developer's machine was measured to do must not decide what the tests see.
os.environ["SPARSIFINER_PROFILE"] = "off"
if not torch.cuda.is_available():
    # Triton interprets its kernels on the CPU, if this is said before it is imported anywhere.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import timm

if TYPE_CHECKING:
    from sparsifiner.evaluation import Sweep
    from sparsifiner.training.recipe import TrainConfig


TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def lively(model: nn.Module) -> nn.Module:
    """Random weights large enough that attention shows in the output (LayerScale starts at 1e-5)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


@pytest.fixture
def tiny_vit() -> Callable[..., nn.Module]:
    """A two-layer ViT on 8x8 patches of 4 pixels; keyword arguments go to timm."""

    def make(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
        settings = dict(img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=7)
        return lively(timm.create_model(name, **{**settings, **changes}))

    return make


@pytest.fixture
def images() -> Callable[..., Tensor]:
    def make(*size: int) -> Tensor:
        return torch.randn(*size, generator=torch.Generator().manual_seed(1))

    return make


@pytest.fixture(scope="session")
def folder_of_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``val`` with three classes of eight 40x40 pictures each; a class has a colour."""
    import numpy
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    random = numpy.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(3):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            for picture in range(8):
                pixels = random.integers(0, 128, (40, 40, 3), dtype="uint8")
                pixels[..., number] += 127
                Image.fromarray(pixels).save(folder / f"{picture}.png")
    return root


def with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much of their time to them on a busy machine."""
    yield from with_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Also where each process of the tests has one core."""
    yield from with_threads(2)


@pytest.fixture
def recipe(folder_of_images: Path) -> Callable[..., TrainConfig]:
    """A recipe of every random ingredient: 24 images, three optimiser steps an epoch."""

    from sparsifiner.training.recipe_file import from_dict

    def make(**changes: Any) -> TrainConfig:
        return from_dict(
            {
                "model": "vit_tiny_patch16_224",
                "pretrained": False,
                "model_args": {**TINY, "drop_path_rate": 0.2, "proj_drop_rate": 0.1},
                "sparsity": {"preset": "paper", "keep_rate": 0.3},
                "data": {"path": str(folder_of_images), "img_size": 32, "workers": 0, "val_limit": 6},
                "batch_size": 4,
                "accumulation": 2,
                "ema_decay": 0.9,
                "log_every": 1,
                "checkpoint_every": 2,
                "eval_every": 0,
                "clip_grad": 1.0,
                "phases": [
                    {"name": "attn_recon", "steps": 2, "lr": 1e-3},
                    {"name": "joint", "epochs": 1.5, "lr": 1e-3, "warmup": 0.5},
                ],
                **changes,
            }
        )

    return make


@pytest.fixture(scope="session")
def classifier(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that has learned the three colours."""
    from sweep_recipes import TINY

    from sparsifiner.training import train
    from sparsifiner.training.recipe_file import from_dict

    recipe = from_dict(
        {
            "model": "vit_tiny_patch16_224", "pretrained": False, "model_args": TINY, "sparsity": None,
            "data": {"path": str(folder_of_images), "img_size": 32, "workers": 0, "val_split": None},
            "augment": {"auto_augment": None, "mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0, "color_jitter": 0.0},
            "batch_size": 8, "phases": [{"name": "cls", "steps": 12, "lr": 3e-3}],
        }
    )  # fmt: skip
    torch.manual_seed(0)
    return train(recipe, tmp_path_factory.mktemp("classifier"), cpu=True).model


@pytest.fixture
def sweep(classifier: Path, folder_of_images: Path) -> Callable[..., Sweep]:
    """A small sweep over that model; keyword arguments change it."""
    from sparsifiner.evaluation import Sweep
    from sparsifiner.training import DataConfig

    def make(**changes: Any) -> Sweep:
        settings: dict[str, Any] = dict(
            model=str(classifier),
            data=DataConfig(path=str(folder_of_images), img_size=32, workers=0),
            methods=("sparsifiner", "evit"),
            keep_rates=(0.25, 1.0),
            batch_size=4,
            repeats=0,
            calibration_images=3,
            calibration_steps=5,
        )
        return Sweep(**{**settings, **changes})

    return make


def weights(folder: Path, name: str = "model") -> dict[str, Tensor]:
    from sparsifiner.models import load_model

    return load_model(str(folder / name)).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
