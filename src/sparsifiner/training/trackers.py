"""The accelerator: devices, precision, accumulation, distribution, and where numbers are tracked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.messages import one_line
from ..errors import SparsifinerError
from .recipe import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: TrainConfig, folder: Path, *, cpu: bool) -> Accelerator:
    """The engine of a run, for one process or as ``accelerate launch`` set it up.

    Args:
        config: precision, accumulation and trackers.
        folder: for trackers that write files.
        cpu: stay on the CPU.

    Raises:
        ValueError: if accelerate or a tracker is not installed, or the precision does not work here.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise SparsifinerError("training needs accelerate: pip install sparsifiner[train]") from error
    for name in config.trackers:
        _check_tracker(name)
    # Its settings are one per process and outlive a run; a second run may want another precision.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            gradient_accumulation_steps=config.accumulation,
            cpu=cpu,
            log_with=list(config.trackers) or None,
            project_dir=str(folder),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
        )
    except (ValueError, RuntimeError) as error:
        raise SparsifinerError(
            f"precision {config.precision} or the device cannot be used here: {one_line(error)}"
        ) from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":  # accelerate trains in float32 then
        raise SparsifinerError("precision fp16 does not work on a CPU; set precision=bf16 or fp32")
    if config.trackers:
        accelerator.init_trackers("sparsifiner", config=_flat(config.to_dict()))
    return accelerator


def _check_tracker(name: str) -> None:
    from importlib.util import find_spec

    from accelerate.utils import LoggerType

    if name not in {known.value for known in LoggerType}:  # trackio came after 1.0
        raise SparsifinerError(f"the accelerate installed is too old for the tracker {name}: pip install -U accelerate")
    specs = [find_spec(module) for module in (("tensorboard", "tensorboardX") if name == "tensorboard" else (name,))]
    # wandb makes a folder of its name where it runs; a folder without __init__.py has a spec, too, but no origin.
    if not any(spec is not None and spec.origin is not None for spec in specs):
        raise SparsifinerError(f"the tracker {name} is not installed: pip install {name}")


def _flat(values: Any, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as names with dots; trackers take plain values only."""
    if isinstance(values, (dict, list)):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {
            key: item for name, value in pairs for key, item in _flat(value, f"{prefix}.{name}".lstrip(".")).items()
        }
    return {prefix: values if isinstance(values, (str, int, float, bool)) else str(values)}
