"""The explorer's page: controls beside the pictures, and a state per browser tab."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .._utils.photos import Photo, crop, read_photo
from ..errors import SparsifinerError
from ..report.maps import QUERY_PLACES
from .html import read_asset, render_figures, render_head, render_viewer
from .look import ROUNDS, Explorer, Look

MEAN = "mean of the heads"
_IDLE = 3600  # seconds after which the state of a tab that does nothing is dropped


def build_page(explorer: Explorer, photos: list[Photo], title: str) -> gr.Blocks:
    """The page of a model.

    Args:
        explorer: the model, dense and sparse.
        photos: offered at the side; the first is shown when the page opens.
        title: what the page calls the model.
    """
    do = _Handlers(explorer, photos)
    heads = [MEAN, *(f"head {number + 1}" for number in range(explorer.num_heads))]
    hidden: dict[str, Any] = {"show_progress": "hidden"}
    with gr.Blocks(title=f"Sparsifiner: {title}", analytics_enabled=False, delete_cache=(600, _IDLE)) as page:
        photo, look, patch = (gr.State(None, time_to_live=_IDLE) for _ in range(3))
        gr.HTML(render_head(title), padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=0, min_width=276, elem_id="controls"):
                gallery = gr.Gallery(
                    [(crop(item.image, (128, 128)), item.name) for item in photos],
                    columns=4, height=66 if len(photos) <= 4 else 140, allow_preview=False, show_label=False,
                    interactive=False, object_fit="cover", elem_id="gallery", buttons=[],
                )  # fmt: skip
                upload = gr.UploadButton("Open or drop an image", type="filepath", size="sm", elem_id="upload")
                keep = gr.Slider(0.01, 1, do.own_rate, step=0.01, label="Keep rate", elem_id="keep", buttons=[])
                middle = (explorer.num_layers + 1) // 2
                layer = gr.Slider(1, explorer.num_layers, middle, step=1, label="Layer", elem_id="layer", buttons=[])
                head = gr.Dropdown(heads, value=MEAN, label="Head", elem_id="head")
                figures = gr.HTML(elem_id="figures", padding=False)
            with gr.Column(scale=1, min_width=600):
                viewer = gr.HTML(elem_id="viewer", js_on_load=read_asset("viewer.js"), apply_default_css=False)

        drawing: dict[str, Any] = {"fn": do.draw, "inputs": [look, patch, layer, head], "outputs": viewer, **hidden}
        seeing: dict[str, Any] = {"fn": do.see, "inputs": [photo, keep, look], "outputs": look, **hidden}
        measuring: dict[str, Any] = {"fn": do.measure, "inputs": look, "outputs": figures, **hidden}
        latest: dict[str, Any] = {"trigger_mode": "always_last"}
        private: dict[str, Any] = {"api_visibility": "private"}
        # Each step is open to programs once, under its name; the first to ask for a name gets it.
        gr.on([layer.change, head.change], **drawing, **latest, api_name="draw")
        changed = keep.change(**seeing, **latest, api_name="see")
        opened = upload.upload(do.read, upload, photo, api_name="open", **hidden)
        picked = gallery.select(do.pick, None, photo, **private, **hidden)
        loaded = page.load(do.first, None, photo, **private, **hidden)
        seen = [changed, *(event.success(**seeing, **private) for event in (opened, picked, loaded))]
        drawn = [event.success(**drawing, **private) for event in seen]
        measured = [drawn[0].success(**measuring, api_name="measure")]
        measured += [event.success(**measuring, **private) for event in drawn[1:]]
        gr.on([gallery.select, upload.upload, keep.change], None, cancels=measured)
        viewer.select(do.move, None, patch, **latest, **private, **hidden).success(**drawing, **private)
        viewer.apply(do.choose, None, [layer, head], **private, **hidden)
    return page


class _Handlers:
    """What the page calls; all state comes in and goes out, so that tabs share nothing but the model.

    Args:
        explorer: the model.
        photos: those offered.
    """

    def __init__(self, explorer: Explorer, photos: list[Photo]) -> None:
        self.explorer, self.photos = explorer, photos
        self.own_rate = max(0.01, round(explorer.keep_rate, 2))

    def first(self) -> Photo:
        return self.photos[0]

    def pick(self, event: gr.SelectData) -> Photo:
        return self.photos[event.index]

    def read(self, path: str) -> Photo:
        """The uploaded file, or a sentence if it is no image."""
        file = Path(path)
        try:
            return Photo(file.name, read_photo(file, file.name))
        except SparsifinerError as error:
            raise self._say(error) from error

    def see(self, photo: Photo | None, keep_rate: float, before: Look | None) -> Look:
        if photo is None:  # its state was dropped after an idle hour
            photo = self.photos[0]
        rate = None if keep_rate == self.own_rate else keep_rate  # which may be one per layer
        try:
            return self.explorer.look(photo.image, photo.name, rate, before)
        except SparsifinerError as error:
            raise self._say(error) from error

    def measure(self, look: Look) -> Iterator[str]:
        for cost in self.explorer.measure(look):
            yield render_figures(look, cost, ROUNDS)

    def draw(self, look: Look | None, patch: tuple[int, int] | None, layer: int, head: str) -> Any:
        if look is None:
            return gr.skip()
        rows, columns = look.grid
        if patch is None:
            patch = (int(QUERY_PLACES[1][0] * rows), int(QUERY_PLACES[1][1] * columns))
        return render_viewer(look, patch, int(layer) - 1, None if head == MEAN else int(head.split()[1]) - 1)

    def move(self, event: gr.EventData) -> tuple[int, int]:
        return (int(event.row), int(event.column))

    def choose(self, event: gr.EventData) -> tuple[int, str]:
        return (int(event.layer) + 1, f"head {int(event.head) + 1}")

    def _say(self, error: SparsifinerError) -> Exception:
        return gr.Error(str(error), title="Not shown", print_exception=False)
