"""The package the page is made with, which is an extra."""

from __future__ import annotations

import os
from typing import Any

from ..errors import SparsifinerError


def import_gradio() -> Any:
    """The module ``gradio``, told to send nothing anywhere.

    Raises:
        ValueError: if it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise SparsifinerError("the explorer needs gradio; pip install 'sparsifiner[explorer]'") from error
    return gradio
