"""What a search found, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime import Runtime
from .models import WholeModel
from .space import Candidate

NONE_TRIED = "No sparse model was compiled whole in the time there was; give the search more of it."


def verdict(where: str, best: WholeModel, like: WholeModel | None, models: Sequence[WholeModel]) -> list[str]:
    """Sentences about the result: its speed and fidelity, and which part precision and which part sparsity has in it.

    Args:
        where: size, batch and bound, as the sentence begins.
        best: the result.
        like: the dense model in the same precision and compilation, None if it was not measured.
        models: all that were run.
    """
    tried = any(model.candidate.config is not None for model in models)
    if best.candidate == Candidate(None, Runtime()):
        lines = [f"{where} nothing that was measured is faster than the dense model as it was given."]
        return lines if tried else [*lines, NONE_TRIED]
    assert best.fidelity is not None
    lines = [
        f"{where} {best.candidate} runs {best.speedup:.2f}x as fast as dense float32 (mean cosine "
        f"{best.fidelity.mean('patch_cosine'):.4f}, worst image {best.fidelity.worst('patch_cosine'):.4f})."
    ]
    if best.candidate.config is None:
        lines.append("That is all precision and compilation: no sparse model was faster within the bound.")
        if not tried:
            lines[-1] = f"That is all precision and compilation. {NONE_TRIED}"
    elif like is not None:
        lines.append(
            f"Precision and compilation alone give {like.speedup:.2f}x; sparse attention gives the other "
            f"{best.speedup / like.speedup:.2f}x."
        )
    lines += [f"{rival.name} gives {rival.speedup:.2f}x on the same images." for rival in models if rival.rival]
    return lines
