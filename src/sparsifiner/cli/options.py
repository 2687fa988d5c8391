"""Options that several commands take in the same words, as types of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _complete_recipe(incomplete: str) -> list[str]:
    from .._utils.settings_files import bundled_recipes

    return [name for name in bundled_recipes() if name.startswith(incomplete)]


RECIPE = typer.Option(
    help="YAML file, or a bundled recipe by name.", metavar="FILE|NAME", autocompletion=_complete_recipe
)
SavedModel = Annotated[
    str, typer.Option(help="builtin, a timm model name, or a folder of save_pretrained.", metavar="NAME|FOLDER")
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML or JSON file of sparsifier settings.")]
DataFolder = Annotated[str | None, typer.Option(help="Folder of the images.", metavar="FOLDER")]
DataSource = Annotated[str, typer.Option(help="folder, cifar10-png, torch/<name> or hf/<name>.", metavar="KIND")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision or Hugging Face download.")]
ImageSize = Annotated[str | None, typer.Option(help="Pixels, such as 224 or 480x640.")]
BatchSize = Annotated[int, typer.Option(help="Images per forward pass.", min=1)]
Workers = Annotated[int, typer.Option(help="Processes that decode images.", min=0)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
KeepRates = Annotated[str | None, typer.Option(help="Shares of keys to keep, such as 0.05,0.1.")]
MaxTokens = Annotated[int, typer.Option(help="Bound of the search for the size that pays.", min=256)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
