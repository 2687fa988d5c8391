"""Find the fastest form of a model within a bound of fidelity, in limited time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import flag, number
from .._utils.files import check_writable, make_folder
from .._utils.messages import LOGGER
from .._utils.photos import Photos, load_photos, preprocess
from .._utils.progress import Progress
from ..convert import is_sparse
from ..errors import SparsifinerError
from ..saving import is_converted
from .bound import Bound
from .images import split_images
from .result import Tuned
from .run import Run


def tune(
    model: nn.Module,
    images: str | Path | Photos | Tensor,
    *,
    min_cosine: float | None = 0.99,
    max_relative_l2: float | None = None,
    max_seconds: float = 600.0,
    batch_size: int = 1,
    num_images: int = 16,
    storage: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    name: str = "",
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Tuned:
    """Find the fastest form of a dense model on this machine whose final features stay within a bound of its own.

    Settings of sparse attention, the precision of attention, of linear layers and of activations, and compilation are
    searched together. Cheap trials come first: the error of uncompiled sparse models on a few images, and their time
    predicted from measured parts (one attention layer; the first two blocks in each precision). The most promising are
    compiled whole and measured; the images that decide whether they are within the bound are not those of the trials.
    The result is measured in turn with the dense model in float32, with the dense model in the same precision and
    compilation, and with OpenVINO's where ``openvino`` is installed.

    Args:
        model: a dense timm model on the CPU. It is copied.
        images: a folder of photographs, or images as the model takes them, ``[n, 3, H, W]`` with n at least 2; their
            size is the one to tune for. Every second one judges.
        min_cosine: least mean cosine of patch features to the dense model's; None for no such bound.
        max_relative_l2: largest mean relative L2; None for no such bound.
        max_seconds: of the whole search. Compilations that would end later are not started or are stopped.
        batch_size: images at once.
        num_images: of a folder, at most.
        storage: folder in which finished trials are kept (``tuning.journal``), None for none.
        resume: go on with the trials in ``storage``.
        seed: of the sampler.
        name: of the model, for the report.
        progress: told what is being done.
        say: called with a line of text about every whole model; the logger ``sparsifiner`` if None.

    Returns:
        The model, its settings, the trials and a report of everything measured. Where nothing is faster within the
        bound, the model as it was given, and the report says so.

    Raises:
        SparsifinerError: if the model is not dense, the images or a setting do not fit, or optuna is missing.
        KeyboardInterrupt: if it is interrupted before a whole model was measured; afterwards the best one so far is
            the result.
    """
    bound = Bound(min_cosine, max_relative_l2)
    number("max_seconds", max_seconds, least=1)
    number("batch_size", batch_size, least=1, integer=True)
    number("num_images", num_images, least=2, integer=True)
    flag("resume", resume)
    if not isinstance(model, nn.Module) or not hasattr(model, "forward_features"):
        raise SparsifinerError(f"tune takes a timm Vision Transformer, got {type(model).__name__}")
    if is_sparse(model) or is_converted(model):
        raise SparsifinerError("tune takes a dense model and makes it sparse itself; give the one before sparsify()")
    if resume and storage is None:
        raise SparsifinerError("resume needs the storage of the search to go on with")
    folder = None if storage is None else make_folder(check_writable(storage))
    x, names, skipped = _load(model, images, num_images)
    _check_model(model, x)
    tuning, judging = split_images(x, names)
    run = Run(
        model, tuning, judging, bound, max_seconds=float(max_seconds), batch=batch_size, folder=folder, resume=resume,
        seed=seed, name=name or type(model).__name__, skipped=skipped, notify=progress or (lambda *_: None),
        say=say or LOGGER.info,
    )  # fmt: skip
    return run.all()


def _load(model: nn.Module, images: Any, count: int) -> tuple[Any, list[str] | None, dict[str, str]]:
    if not isinstance(images, (str, Path, Photos)):
        return images, None, {}
    photos = images if isinstance(images, Photos) else load_photos(images, count)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        raise SparsifinerError(f"{type(model).__name__} has no image size of its own; give images as a tensor")
    prepare = preprocess(model, tuple(size))
    x = torch.stack([prepare(photo.image) for photo in photos.photos])
    return x, [photo.name for photo in photos.photos], photos.skipped


def _check_model(model: nn.Module, x: Any) -> None:
    weight = next(model.parameters(), None)
    if weight is None or weight.dtype != torch.float32 or weight.device.type != "cpu":
        what = "no weights" if weight is None else f"{weight.dtype} on {weight.device}"
        raise SparsifinerError(f"tune takes a float32 model on the CPU, got {what}; use model.float().cpu()")
    if not isinstance(x, Tensor):
        return  # which split_images refuses
    try:
        with torch.inference_mode():
            model.eval()(x[:1])
    except Exception as error:
        raise SparsifinerError(f"the model does not take images of {list(x.shape[1:])}: {error}") from error
