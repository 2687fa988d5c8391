"""Two processes over gloo, started by ``torchrun``, against one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from sparsifiner.models import load_model
from sparsifiner.training import load_recipe, train
from sparsifiner.training.data import TrainBatches

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


def run_by_two(*command):
    # accelerate's own launcher starts one process only on a CPU; it takes the environment of torch's.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


def train_by_two(recipe, output):
    """Each takes half of the recipe's batch of eight."""
    command = f"-m sparsifiner train --recipe {recipe} --cpu --output {output} batch_size=4"
    return run_by_two(*command.split())


def test_two_processes_take_the_same_step_as_one(folder_of_images, tmp_path):
    """With plain gradient descent the change of the weights is the gradient, but for a factor."""
    recipe = {
        "model": "vit_tiny_patch16_224",
        "pretrained": False,
        "model_args": TINY,
        "sparsity": {"preset": "paper", "keep_rate": 0.3},
        "data": {"path": str(folder_of_images), "img_size": 32, "workers": 0, "val_limit": 7},
        "batch_size": 8,
        "accumulation": 2,
        "optimizer": "sgd",
        "weight_decay": 0.0,
        "augment": {"mixup": 0, "cutmix": 0},
        "phases": [{"name": "joint", "steps": 1, "lr": 0.1, "train": "all", "losses": {"ce": 1.0, "attn_recon": 0.1}}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = train_by_two(path, tmp_path / "two")
    assert torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["world"] == 2
    one = train(load_recipe(path), tmp_path / "one", cpu=True)
    assert done.stdout.count("written:") == 1, done.stdout  # the second process is silent
    start = train(load_recipe(path, ["phases.0.lr=1e-12", "phases.0.warmup_lr=0"]), tmp_path / "start", cpu=True)
    a, b, c = (load_model(str(tmp_path / name / "model")).state_dict() for name in ("one", "two", "start"))
    for name in a:
        step = (a[name] - c[name]).abs().max()
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-5 * float(step) + 1e-6), name
    assert sum(float((a[name] - c[name]).abs().max()) > 1e-4 for name in a) > len(a) / 2
    assert f"{one.accuracy['model'].to_dict()['top1']:.2%}" in done.stdout
    assert start.accuracy["model"].images == 7


def test_processes_that_find_different_checkpoints_do_not_go_on(folder_of_images, tmp_path):
    """As on nodes whose disks are their own: only the first has written anything."""
    recipe = {
        "model": "vit_tiny_patch16_224",
        "pretrained": False,
        "model_args": TINY,
        "data": {"path": str(folder_of_images), "img_size": 32, "workers": 0},
        "sparsity": {"preset": "paper", "keep_rate": 0.5},
        "batch_size": 4,
        "phases": [{"name": "cls", "steps": 1}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    script = tmp_path / "node.py"
    script.write_text(
        "import os, sys\n"
        "from sparsifiner.training import load_recipe, train\n"
        "try:\n"
        "    train(load_recipe(sys.argv[1]), sys.argv[2] + os.environ['RANK'], cpu=True)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    first, again = (run_by_two(script, tmp_path / "recipe.yaml", tmp_path / "disk") for _ in range(2))
    assert first.stdout == ""
    assert (tmp_path / "disk0" / "checkpoint.pt").exists()
    assert not (tmp_path / "disk1" / "checkpoint.pt").exists()
    assert again.stdout.count("the output folder must be one that all nodes share") == 2, again.stderr


def test_two_processes_share_batchnorm_statistics_and_what_is_broken(folder_of_images, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(folder_of_images, root)
    for name in ("class0/0.png", "class0/1.png"):  # the first image of either process
        (root / "val" / name).write_bytes(b"no picture")
    second = TrainBatches(24, 4, 3, 1, start=0, seed=(0, 0), rank=1, world=2)
    number = next(iter(second))[0][1]  # of the first image that the second process alone meets
    (root / "train" / f"class{number // 8}" / f"{number % 8}.png").write_bytes(b"no picture")
    recipe = {
        "model": "lvvit_s",
        "pretrained": False,
        "model_args": TINY,
        "sparsity": None,
        "data": {"path": str(root), "img_size": 32, "workers": 0},
        "batch_size": 8,
        "ema_decay": 0.5,
        "augment": {"mixup": 0, "cutmix": 0},
        "phases": [{"name": "cls", "steps": 1}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    train_by_two(path, tmp_path / "two")
    result = train(load_recipe(path), tmp_path / "one", cpu=True)
    for name in ("model", "ema"):
        one, two = (load_model(str(tmp_path / run / name)).state_dict() for run in ("one", "two"))
        # The mean of the halves' means is that of all; only of the first layer, the others see what it normalised.
        mean = next(key for key in one if key.endswith("bn1.running_mean"))
        assert one[mean].abs().max() > 1e-3
        assert torch.allclose(one[mean], two[mean], rtol=1e-4, atol=1e-6)
    written = json.loads((tmp_path / "two" / "result.json").read_text())
    assert written["val_broken"].keys() == {"class0/0.png", "class0/1.png"}
    assert written["accuracy"]["model"]["broken"] == 2
    saved = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)  # what the second met is in it as well
    assert len(result.broken) == 1
    assert saved["broken"].keys() == written["broken"].keys() == result.broken.keys()


DATA_PARALLEL = """
import timm, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from sparsifiner import SparsifinerConfig, sparsify
from sparsifiner.config import TailConfig
dist.init_process_group("gloo")
for config in (SparsifinerConfig(predictor="lowrank", tail=TailConfig(offset=True)), SparsifinerConfig.paper()):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=24, depth=1, num_heads=2)
    model = sparsify(model, config).train()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    print("trained", flush=True)
"""


def test_plain_data_parallel_training_misses_no_gradient(tmp_path):
    """Weights of a predictor learn in the reconstruction phase only; elsewhere they ask for no gradient."""
    script = tmp_path / "train.py"
    script.write_text(DATA_PARALLEL)
    assert run_by_two(str(script)).stdout.count("trained") == 4
