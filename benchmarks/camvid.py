"""Segmentation with a linear head on frozen features: what sparse attention does to the mIoU, and to the latency.

    python benchmarks/camvid.py CAMVID_FOLDER benchmarks/results/camvid.json

``CAMVID_FOLDER/{train,val}/{images,labels}`` hold street scenes of 480x360 pixels and label images (PNG) of the same
names, 11 classes, 11 for void. The built-in ViT-S/14 sees 672x504 pixels. The head is trained on dense features of
``train``, each patch against the classes of the pixels it covers, and serves all models as it is: only attention
differs. Finished settings are kept in the output file; the head lies beside it. mIoU over all pixels of ``val``,
predictions upsampled to the label image; intervals of the drop by bootstrap over the images, paired.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from sparsifiner import SparsifinerConfig, calibrate, sparsify
from sparsifiner._utils.files import write_atomically
from sparsifiner._utils.photos import preprocess
from sparsifiner.measure.fidelity import final_features
from sparsifiner.measure.latency import compare_latency
from sparsifiner.models import load_model

SIZE, CLASSES, VOID = (504, 672), 11, 11
RATES = (0.25, 0.1, 0.05)
SETTINGS: dict[str, SparsifinerConfig] = {
    **{f"training-free, keep {rate}": SparsifinerConfig(keep_rate=rate) for rate in RATES},
    "local window, keep 0.1": SparsifinerConfig(keep_rate=0.1, predictor="local"),
    "no tail, keep 0.1": SparsifinerConfig(keep_rate=0.1, tail=None),
    **{f"calibrated, keep {rate}": SparsifinerConfig(keep_rate=rate) for rate in RATES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", default="", help="run the settings whose name contains this")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    dense = load_model("builtin", img_size=SIZE)
    transform = preprocess(dense, SIZE)
    head = load_head(arguments.output.with_suffix(".head.pt"), dense, transform, arguments.camvid / "train")
    if "dense" not in results:
        results["dense"] = evaluate(dense, head, transform, arguments.camvid / "val")
        save(arguments.output, results)
    x = transform(Image.open(pairs(arguments.camvid / "val")[0][0]).convert("RGB"))[None]
    for name, config in SETTINGS.items():
        if name in results or arguments.only not in name:
            continue
        sparse = sparsify(dense, config)
        if name.startswith("calibrated"):
            photos = [image for image, _ in pairs(arguments.camvid / "train")[::4]]
            calibrate(sparse, photos, img_size=SIZE, state=arguments.output.with_name(f"{name}.state").absolute())
        found = evaluate(sparse, head, transform, arguments.camvid / "val")
        found["drop"] = drop(results["dense"], found)
        found["latency"] = compare_latency(dense, sparse, x, repeats=21, max_seconds=120).to_dict()
        results[name] = found
        save(arguments.output, results)
    for name, found in results.items():
        speed = f"{found['latency']['speedup']:.2f}x" if "latency" in found else ""
        points = found.get("drop", {"points": 0.0, "interval": [0.0, 0.0]})
        low, high = points["interval"]
        print(f"{name:28} mIoU {found['miou']:.2%}  drop {points['points']:+.2f} [{low:+.2f}, {high:+.2f}]  {speed}")


def pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Pictures and their label images."""
    found = [(image, folder / "labels" / f"{image.stem}.png") for image in sorted((folder / "images").iterdir())]
    if not found:
        raise SystemExit(f"{folder / 'images'} is empty; expected street scenes")
    return found


def features(model: nn.Module, transform: Callable[[Any], Tensor], image: Path) -> Tensor:
    """Final patch features ``[C, rows, columns]`` of one picture."""
    patches = final_features(model, transform(Image.open(image).convert("RGB"))[None])[0][0]
    return patches.T.unflatten(1, (SIZE[0] // 14, SIZE[1] // 14))


def load_head(file: Path, dense: nn.Module, transform: Callable[[Any], Tensor], folder: Path) -> nn.Module:
    """A batch norm and a linear layer, trained on dense features unless ``file`` holds them."""
    width: int = dense.num_features  # type: ignore[assignment]
    head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, CLASSES))
    if file.exists():
        head.load_state_dict(torch.load(file, weights_only=True))
        return head.eval()
    inputs, targets = [], []
    for image, labels in track(pairs(folder), "dense features"):
        inputs.append(features(dense, transform, image).flatten(1).T)
        pixels = torch.from_numpy(numpy.array(Image.open(labels))).long()
        shares = F.one_hot(pixels.clamp(max=CLASSES), CLASSES + 1)[..., :CLASSES].permute(2, 0, 1).float()
        targets.append(F.adaptive_avg_pool2d(shares, (SIZE[0] // 14, SIZE[1] // 14)).flatten(1).T)
    x, y = torch.cat(inputs), torch.cat(targets)
    torch.manual_seed(0)
    epochs, batch = 30, 4096
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in track(range(epochs), "head"):
        for chosen in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            loss = -(y[chosen] * head(x[chosen]).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.save(head.state_dict(), file)
    return head.eval()


def evaluate(model: nn.Module, head: nn.Module, transform: Callable[[Any], Tensor], folder: Path) -> dict[str, Any]:
    """mIoU over ``folder``, and the counts of each image: intersections and unions per class."""
    counts = []
    for image, labels in track(pairs(folder), "evaluating"):
        want = torch.from_numpy(numpy.array(Image.open(labels))).long()
        with torch.no_grad():
            grid = features(model, transform, image)
            logits = head(grid.flatten(1).T).T.unflatten(1, grid.shape[1:])
        got = F.interpolate(logits[None], size=want.shape, mode="bilinear")[0].argmax(0)
        known = want != VOID
        confusion = torch.bincount(want[known] * CLASSES + got[known], minlength=CLASSES**2).view(CLASSES, CLASSES)
        counts.append([confusion.diag().tolist(), (confusion.sum(0) + confusion.sum(1) - confusion.diag()).tolist()])
    return {"miou": miou(torch.tensor(counts)), "images": len(counts), "counts": counts}


def miou(counts: Tensor) -> float:
    """Mean over the classes that occur, from ``[images, 2, classes]``."""
    intersection, union = counts.sum(0).double()
    return float((intersection / union)[union > 0].mean())


def drop(dense: dict[str, Any], sparse: dict[str, Any], draws: int = 2000) -> dict[str, Any]:
    """Points of mIoU lost, with a 95 % interval over images drawn with replacement."""
    before, after = torch.tensor(dense["counts"]), torch.tensor(sparse["counts"])
    generator = torch.Generator().manual_seed(0)
    lost = []
    for _ in range(draws):
        chosen = torch.randint(len(before), (len(before),), generator=generator)
        lost.append(100 * (miou(before[chosen]) - miou(after[chosen])))
    low, high = torch.tensor(lost).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"points": 100 * (dense["miou"] - sparse["miou"]), "interval": [low, high]}


def save(output: Path, results: dict[str, Any]) -> None:
    write_atomically(output, json.dumps(results, indent=None) + "\n")


if __name__ == "__main__":
    main()
