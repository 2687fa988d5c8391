"""Shards: features of some images in one file, written whole or not at all, beside a JSON file with their names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy

from .._utils.files import write_together
from ..errors import SparsifinerError

Arrays = Mapping[str, numpy.ndarray]


@dataclass(frozen=True)
class ShardFormat:
    """A file format of shards.

    Args:
        suffix: of its files.
        package: without which it does not work.
        write: called with the path, the names of the images and arrays whose first dimension counts images.
        read: called with the path; the arrays.
    """

    suffix: str
    package: str
    write: Callable[[Path, list[str], Arrays], object]
    read: Callable[[Path], Arrays]


def _write_safetensors(path: Path, names: list[str], arrays: Arrays) -> None:
    from safetensors.numpy import save_file

    save_file(dict(arrays), path, metadata={"names": json.dumps(names)})


def _read_safetensors(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    return dict(load_file(path))


def _write_parquet(path: Path, names: list[str], arrays: Arrays) -> None:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {"name": pyarrow.array(names)}
    for name, array in arrays.items():
        width = array.shape[1:]
        flat = pyarrow.array(array.reshape(-1))
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(flat, int(numpy.prod(width)))
    shapes = {name: json.dumps(array.shape[1:]) for name, array in arrays.items()}
    table = pyarrow.table(columns).replace_schema_metadata({"shapes": json.dumps(shapes)})
    pyarrow.parquet.write_table(table, path)


def _read_parquet(path: Path) -> Arrays:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    shapes = json.loads(table.schema.metadata[b"shapes"])
    return {
        name: table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, *json.loads(shape))
        for name, shape in shapes.items()
    }


def _write_zarr(path: Path, names: list[str], arrays: Arrays) -> None:
    import zarr

    path.unlink(missing_ok=True)  # an empty file is no archive
    with zarr.storage.ZipStore(path, mode="w") as store:
        group = zarr.create_group(store, attributes={"names": names})
        for name, array in arrays.items():
            group.create_array(name, data=numpy.ascontiguousarray(array), chunks=(1, *array.shape[1:]))


def _read_zarr(path: Path) -> Arrays:
    import zarr

    with zarr.storage.ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        return {name: numpy.asarray(array[...]) for name, array in group.arrays()}


FORMATS = {
    "parquet": ShardFormat(".parquet", "pyarrow", _write_parquet, _read_parquet),
    "safetensors": ShardFormat(".safetensors", "safetensors", _write_safetensors, _read_safetensors),
    "zarr": ShardFormat(".zarr.zip", "zarr", _write_zarr, _read_zarr),
}


def check_format(name: str) -> ShardFormat:
    """The format of that name.

    Raises:
        SparsifinerError: if there is none, or its package is missing.
    """
    if name not in FORMATS:
        raise SparsifinerError(f"format {name!r} is unknown; choose {', '.join(FORMATS)}")
    if find_spec(FORMATS[name].package) is None:
        raise SparsifinerError(f"{name} needs {FORMATS[name].package}: pip install 'sparsifiner[extract]'")
    return FORMATS[name]


def shard_files(folder: Path, number: int, form: ShardFormat) -> tuple[Path, Path]:
    """The files of a shard: its JSON file, which comes last when it is written, and its arrays."""
    stem = f"features-{number:06d}"
    return folder / f"{stem}.json", folder / f"{stem}{form.suffix}"


def write_shard(
    folder: Path, number: int, form: ShardFormat, names: list[str], arrays: Arrays, unreadable: Mapping[str, str]
) -> None:
    """Write a shard; without any readable image there is a JSON file only."""
    description, data = shard_files(folder, number, form)
    text = json.dumps({"names": names, "unreadable": dict(unreadable)}, indent=1) + "\n"
    files: dict[Path, Any] = {description: text}
    if names:
        files[data] = lambda path: form.write(path, names, arrays)
    write_together(files)


def read_shard(folder: str | Path, number: int) -> tuple[list[str], Arrays]:
    """Names of the images in a shard, and their features: ``patch`` ``[n, patches, C]``, ``class`` ``[n, C]``.

    Raises:
        SparsifinerError: if there is no such shard.
    """
    for form in FORMATS.values():
        description, data = shard_files(Path(folder), number, form)
        if description.is_file() and data.is_file():
            return json.loads(description.read_text())["names"], form.read(data)
    raise SparsifinerError(f"{folder} holds no shard {number} with images in it")


def unreadable_images(folder: Path, numbers: range, form: ShardFormat) -> dict[str, str]:
    """Names of the images that shards leave out, and why."""
    found: dict[str, str] = {}
    for number in numbers:
        description, _ = shard_files(folder, number, form)
        if description.is_file():
            found.update(json.loads(description.read_text())["unreadable"])
    return found
