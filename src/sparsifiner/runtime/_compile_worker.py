"""The process in which ``compilation.CompilingProcess`` compiles a model; its argument is the pickle's path."""

from __future__ import annotations

import sys
import warnings


def main(file: str) -> None:
    import torch

    from .._utils.messages import one_line
    from .compilation import write_package

    torch.set_num_threads(1)
    # The pickle is the caller's own, written a moment ago into a folder only this user can read.
    job = torch.load(file, weights_only=False, map_location="cpu")
    try:
        write_package(job["model"], job["x"], job["package"], job["options"])
    except Exception as error:  # exporters and compilers raise what they like
        sys.exit(one_line(error))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1])
