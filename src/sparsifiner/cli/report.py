"""``sparsifiner report``: what sparsity gains and costs, on your model, images and machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import ConfigFile, Device, Dtype, SavedModel

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = ("float32", "bfloat16", "float16")


def report(
    model: SavedModel = "builtin",
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures; four bundled photographs by default.")
    ] = None,
    img_size: Annotated[
        str | None, typer.Option(help="Pixels, such as 518,1036 or 480x640; the model's own size by default.")
    ] = None,
    keep_rate: Annotated[
        str | None, typer.Option(help="Shares of keys to keep, such as 0.05,0.1; 0.1 by default.")
    ] = None,
    config: ConfigFile = None,
    output: Annotated[Path, typer.Option(help="Folder for report.html, report.json and the pictures.")] = Path(
        "sparsifiner-report"
    ),
    num_images: Annotated[int, typer.Option(help="Pictures to use at most.", min=1)] = 8,
    num_pictures: Annotated[int, typer.Option(help="How many of them to draw attention for.", min=0)] = 4,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    repeats: Annotated[int, typer.Option(help="Interleaved latency runs; 0 measures no latency.", min=0)] = 7,
    max_seconds: Annotated[
        float, typer.Option(help="Start no further run of one latency measurement after so many seconds.", min=1)
    ] = 60.0,
    max_tokens: Annotated[int, typer.Option(help="Bound of the search for the size that pays.", min=256)] = 16384,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each model in a process of its own.")] = True,
    json: Annotated[
        bool, typer.Option("--json", help="Print the JSON report on stdout and nothing else there.")
    ] = False,
) -> None:
    """Convert a model and print dense beside sparse: fidelity, FLOPs, latency, memory, density and pictures."""
    from ..files import check_writable

    rates, sizes = parse_keep_rates(keep_rate), parse_sizes(img_size)
    check_dtype(dtype)
    folder = check_writable(output)

    import torch
    from rich.console import Console

    from ..analysis.html import write_report
    from ..analysis.images import bundled_photos, load_photos
    from ..analysis.run import Settings, run_report
    from ..analysis.table import print_report
    from ..config import SparsifinerConfig
    from ..progress import progress_on

    stderr = Console(stderr=True)
    photos = bundled_photos(num_images) if images is None else load_photos(images, num_images)
    for name, reason in photos.skipped.items():
        stderr.print(f"skipped {name}: {reason}", markup=False, highlight=False)
    settings = Settings(
        model=model,
        image_sizes=sizes,
        keep_rates=rates,
        config=None if config is None else SparsifinerConfig.from_file(config),
        dtype=getattr(torch, dtype),
        device=parse_device(device),
        repeats=repeats,
        max_seconds=max_seconds,
        max_tokens=max_tokens,
        memory=memory,
        pictures=num_pictures,
    )
    with progress_on(stderr) as progress:
        result = run_report(settings, photos, progress)
    *_, page, data = write_report(result, folder)
    if json:
        print(result.to_json(), end="")
        return
    stdout = output_console()
    print_report(result, stdout)
    stdout.print(
        f"\nwritten: {page}, {data} and {len(result.pictures)} pictures", markup=False, highlight=False, soft_wrap=True
    )


def parse_keep_rates(text: str | None) -> tuple[float, ...]:
    """``"0.05,0.1"`` as numbers in (0, 1]; empty for None."""
    from ..config import check_keep_rate

    if text is None:
        return ()
    rates = []
    for part in _parts(text, "--keep-rate", "0.05,0.1"):
        try:
            rates.append(check_keep_rate(float(part)))
        except ValueError as error:
            raise ValueError(f"keep rate {part!r} must be a number in (0, 1]; 0.1 keeps a tenth of the keys") from error
    return tuple(dict.fromkeys(rates))


def parse_sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """``"518,480x640"`` as rows and columns in pixels; empty for None."""
    if text is None:
        return ()
    sizes = []
    for part in _parts(text, "--img-size", "518,1036"):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", part)
        if match is None or not all(int(side) for side in match.groups(default="1")):
            raise ValueError(f"image size {part!r} must be pixels such as 518, or rows x columns: 480x640")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    return tuple(dict.fromkeys(sizes))


def parse_one_size(text: str | None, command: str) -> tuple[int, int] | None:
    """:func:`parse_sizes` for a ``command`` that takes a single size; None for None."""
    sizes = parse_sizes(text)
    if len(sizes) > 1:
        raise ValueError(f"--img-size {text!r} names several sizes; {command} takes one")
    return sizes[0] if sizes else None


def _parts(text: str, option: str, example: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{option} {text!r} has an empty entry; expected a list such as {example}")
    return parts


def check_dtype(name: str) -> None:
    """Refuse a dtype that no model can be run in."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; choose {', '.join(DTYPES)}")


def parse_device(name: str):  # type: ignore[no-untyped-def]
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; choose cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda cannot be used: torch sees no CUDA GPU here; choose cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; choose cpu or cuda")
    return device


def output_console(width: int = 100) -> Console:
    """stdout for tables: as wide as the terminal, and ``width`` columns where it goes to a file or another program."""
    from rich.console import Console

    stdout = Console()
    return stdout if stdout.is_terminal else Console(width=width)
