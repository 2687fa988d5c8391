"""``sparsifiner explore``: a local page to look at what a model attends to, image by image."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SparsifinerError
from .arguments import check_files, parse_one_size
from .options import ConfigFile, ImageSize, SavedModel


def explore(
    model: SavedModel = "builtin",
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures to offer; four bundled photographs by default.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Of 127.0.0.1; the first free one from 7860 on by default.", min=1, max=65535)
    ] = None,
    img_size: ImageSize = None,
    config: ConfigFile = None,
    num_images: Annotated[int, typer.Option(help="Pictures to offer at most.", min=1)] = 24,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the browser of this machine.")] = False,
) -> None:
    """Serve a page on this machine: which keys a patch keeps, dense attention beside it, and what an image costs."""
    size = parse_one_size(img_size, "explore")
    check_files(config=config, images=images)
    _check_port(port)

    from rich.console import Console

    from ..explorer.extra import import_gradio

    import_gradio()  # before a model is loaded in vain

    from .._utils.photos import bundled_photos, load_photos
    from ..config import SparsifinerConfig
    from ..explorer.look import Explorer
    from ..explorer.page import build_page
    from ..explorer.server import serve
    from ..report.pair import load_pair
    from .console import output_console, say

    stderr = Console(stderr=True)
    photos = bundled_photos(num_images) if images is None else load_photos(images, num_images)
    for name, reason in photos.skipped.items():
        say(stderr, f"skipped {name}: {reason}")
    settings = None if config is None else SparsifinerConfig.from_file(config)
    explorer = Explorer(*load_pair(model, size, settings))
    page = build_page(explorer, photos.photos, model)
    url = serve(page, port, browser=browser)
    say(output_console(), f"{url} shows {model} until this command ends (Ctrl+C)")
    with suppress(KeyboardInterrupt):  # how it is meant to end
        threading.Event().wait()
    page.close(verbose=False)
    explorer.close()


def _check_port(port: int | None) -> None:
    """Refuse a port that is taken before a model is loaded in vain."""
    if port is None:
        return
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            raise SparsifinerError(
                f"port {port} of 127.0.0.1 cannot be used: {error.strerror}; name another"
            ) from error
