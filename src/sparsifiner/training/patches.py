"""Student and teacher patch by patch: which tokens belong together, and the head that classifies each of them."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import SparsifinerError
from ..geometry.patch_grid import find_grid
from ..reduction.blocks import reduces_tokens
from ..reduction.pruning import is_pruned, kept_patches, take_tokens


def refuse_reducing_teacher(teacher: nn.Module, loss: str) -> None:
    """Refuse a teacher that itself ends with fewer tokens than patches.

    Args:
        teacher: the model.
        loss: name of the loss that needs every patch of it, for the message.

    Raises:
        ValueError: in one line.
    """
    if reduces_tokens(teacher):
        raise SparsifinerError(
            f"{loss} needs the teacher's token of every patch, but the teacher prunes or merges tokens; name a "
            f"teacher that keeps them (unprune_tokens undoes pruning), or leave that loss out"
        )


def same_patches(student: nn.Module, tokens: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
    """The student's patch tokens and the teacher's tokens of the same patches.

    Each token that a pruned student (``prune_tokens``) still has in the end goes with the teacher's token of its
    patch; the fused token goes with none and is left out. DynamicViT (Rao et al., NeurIPS 2021) compares the tokens
    that remain in this way, and so do Wei et al.

    Args:
        student: the model whose latest forward pass made ``tokens``.
        tokens: what follows its prefix tokens in the end, ``[B, n, C]``.
        taught: the teacher's tokens of all patches in raster order, ``[B, P, D]``.

    Returns:
        ``[B, P', C]`` and ``[B, P', D]``; ``P'`` patches are left of ``P``. Without pruning the arguments.

    Raises:
        ValueError: if the student merges patches, or the patch grids differ.
    """
    if is_pruned(student):
        grid = find_grid(student)
        assert grid is not None
        if grid.num_patches != taught.shape[1]:
            raise SparsifinerError(
                f"the teacher has {taught.shape[1]} patches and the student {grid.num_patches}; distil from a teacher "
                f"of the same patch grid, or leave out the losses on patches"
            )
        kept = kept_patches(student).to(tokens.device).expand(len(tokens), -1)
        return tokens[:, tokens.shape[1] - kept.shape[1] :], take_tokens(taught, kept)
    if tokens.shape[1] != taught.shape[1] and reduces_tokens(student):
        raise SparsifinerError(
            f"the student merges {taught.shape[1]} patches into {tokens.shape[1]} tokens, which no token of the "
            f"teacher corresponds to; leave out the losses on patches (token_mse, aux_mse, token_label)"
        )
    return tokens, taught


def auxiliary_head(model: nn.Module, whose: str, loss: str) -> nn.Module:
    """The head that classifies patch tokens ``[B, P, C]`` one by one, to ``[B, P, classes]``.

    Args:
        model: the model.
        whose: student or teacher, for the message.
        loss: name of the loss that needs it, for the message.

    Raises:
        ValueError: if the model has none.
    """
    head = getattr(model, "aux_head", None)
    if head is None or isinstance(head, nn.Identity):
        raise SparsifinerError(
            f"{loss} needs a {whose} with an auxiliary head that classifies every patch, as LV-ViT has with "
            f"num_classes above 0; {type(model).__name__} has none, so leave {loss} out"
        )
    return head
