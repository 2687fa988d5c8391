"""The patch grid of the present input, as the attention layers of one model learn it."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import SparsifinerError
from .forward_pass import ForwardPass
from .frames import FrameTiling, TokenLayout
from .subset import SubsetTiling
from .tiling import Tiling

_MOST_PENDING = 64

_Pending = list[tuple[ForwardPass, bool]]
"""Passes that wait for their first block, and whether the whole embedding has run."""


class PatchGrid:
    """The patch grid of the input being processed, shared by all sparse layers below one patch embedding.

    Attention layers see a flat sequence and cannot tell a 16x64 grid from a 32x32 one. Hooks of the patch embedding
    note the grid of each image, and hooks of the blocks tie it to the very tensors that pass through them, so that a
    block that runs again (activation checkpointing) finds the state of the pass its input belongs to. Each thread has
    passes of its own; a thread that runs blocks on tokens which another has embedded gets that thread's.

    Args:
        shape: rows and columns the model was built for, used until the first forward pass.
        patch_size: pixels per patch, rows and columns.
        num_prefix_tokens: tokens that precede the patches in the sequence.
    """

    def __init__(self, shape: tuple[int, int], patch_size: tuple[int, int], num_prefix_tokens: int) -> None:
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.latest = ForwardPass(shape)
        self._forget()

    def _forget(self) -> None:
        """Start without memory of any forward pass but the grid of the latest."""
        self.latest = ForwardPass(self.latest.shape, self.latest.num_frames)
        self._owner: weakref.ref[nn.Module] | None = None
        self._thread = threading.local()
        self._passes = WeakTensorKeyDictionary()
        self._alive: weakref.WeakSet[ForwardPass] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._pending: weakref.WeakKeyDictionary[threading.Thread, _Pending] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to one forward pass; ``torch.export`` leaves fake tensors there."""
        state = {name: getattr(self, name) for name in ("patch_size", "num_prefix_tokens", "shape")}
        return {**state, "owner": None if self._owner is None else self._owner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.patch_size, self.num_prefix_tokens = state["patch_size"], state["num_prefix_tokens"]
        self.latest = ForwardPass(state["shape"])
        self._forget()
        self._owner = None if state["owner"] is None else weakref.ref(state["owner"])

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchGrid:
        """A new one for a copy of the whole model; a block or an embedding copied alone goes on with this one."""
        owner = None if self._owner is None else self._owner()
        if owner is not None and id(owner) not in memo:
            return self
        new = type(self).__new__(type(self))
        new.__setstate__({**self.__getstate__(), "owner": None if owner is None else memo[id(owner)]})
        memo[id(self)] = new
        return new

    @property
    def current(self) -> ForwardPass:
        """The forward pass under way in this thread, or the latest of any."""
        if torch.compiler.is_compiling():
            return self.latest
        own: ForwardPass | None = getattr(self._thread, "current", None)
        return self.latest if own is None else own

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the present patch grid."""
        return self.current.shape

    @shape.setter
    def shape(self, shape: tuple[int, int]) -> None:
        self._enter(ForwardPass(shape))

    @property
    def kept(self) -> dict[int, Tensor]:
        """As in ``ForwardPass``, of the present pass."""
        return self.current.kept

    @property
    def num_patches(self) -> int:
        return self.current.num_patches

    def follow(self, other: PatchGrid) -> None:
        """Take over what another grid saw in its latest forward pass, to attend to that pass's tokens."""
        self._enter(other.current.copy())

    def tiling(self, tile: tuple[int, int], num_tokens: int) -> Tiling:
        """The query tiles of a sequence of ``num_tokens`` tokens, of the patches that it still holds."""
        state = self.current
        num_tokens = int(num_tokens) if torch.jit.is_tracing() else num_tokens
        positions = state.kept.get(num_tokens)
        if positions is None:
            if state.num_frames > 1:
                return FrameTiling.of((state.num_frames, *state.shape), tile, self.num_prefix_tokens)
            return Tiling(state.shape, tile, self.num_prefix_tokens)
        return SubsetTiling.of(positions, state.shape, tile, self.num_prefix_tokens, num_tokens)

    def layout(self, num_tokens: int) -> TokenLayout | None:
        """The order of a sequence of ``num_tokens`` tokens; None where prefix tokens come first, then the patches."""
        return None

    def projected(self, proj: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Hook of the embedding's convolution: its output ``[B, C, rows, columns]`` is the grid."""
        if isinstance(output, Tensor) and output.ndim == 4:
            self._begin((output.shape[2], output.shape[3]), embedded=False)

    def embedded(self, patch_embed: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook of the patch embedding."""
        if not isinstance(output, Tensor):  # symbolic tracing
            return
        if output.ndim == 4:  # [B, rows, columns, C], as timm returns it for dynamic image sizes
            self._begin((output.shape[1], output.shape[2]), embedded=True)
            return
        height, width = inputs[0].shape[-2:]
        shape = (height // self.patch_size[0], width // self.patch_size[1])
        # Padded images and convolutional stems follow the size the embedding was built for.
        fits = shape[0] * shape[1] == output.shape[1]
        self._begin(shape if fits else tuple(patch_embed.grid_size), embedded=True)

    def _begin(self, shape: tuple[int, int], *, embedded: bool, num_frames: int = 1) -> None:
        """An image was embedded: its pass waits for the first block."""
        if torch.compiler.is_exporting() and any(isinstance(side, torch.SymInt) for side in shape):
            raise SparsifinerError(
                "a sparse model is exported for one height and width, since its tiles are cut for one patch grid; "
                "leave dimensions 2 and 3 out of dynamic_shapes, and export once per image size"
            )
        begun = ForwardPass(shape, num_frames)
        if torch.compiler.is_compiling():
            self.latest = begun
            return
        thread = self._thread
        with self._lock:
            pending = self._pending.get(threading.current_thread(), [])
            if getattr(thread, "running", False):
                pending = []
            elif embedded and pending and not pending[-1][1]:  # the convolution of this very call was noted already
                pending = pending[:-1]
            self._pending[threading.current_thread()] = [*pending[-_MOST_PENDING:], (begun, embedded)]
        thread.running = False
        self._enter(begun)

    def entered(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Pre-hook of a block: find the pass its input belongs to."""
        if torch.compiler.is_compiling() or not inputs or not isinstance(inputs[0], Tensor):
            return
        x = inputs[0]
        known = self._passes.get(x)
        if known is None:
            known = self._pass_of_unknown(x, block)
            self._note(x, known)
        known.entered.add(id(block))
        self._thread.running = True
        self._thread.task = _backward_task()
        self._enter(known)

    def attended(self, attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Pre-hook of an attention layer, for those that run without their block: checkpointed alone, or by hand.

        Raises:
            SparsifinerError: if images of several grids come into question.
        """
        if torch.compiler.is_compiling() or not inputs or not isinstance(inputs[0], Tensor) or inputs[0].ndim < 3:
            return
        x, task = inputs[0], _backward_task()
        known = self._passes.get(x)
        if known is None and task is not None:
            known = self.current if self._thread_task() == task else self._pass_to_recompute(x.shape[-2])
        elif known is None:
            known = self.current
            if not known.entered:
                with self._lock:
                    known = self._waiting(x.shape[-2], [threading.current_thread()]) or known
                known.entered.add(id(attention))
                self._thread.running = True
            if torch.is_grad_enabled():
                self._note(x, known)
        self._enter(known)

    def _thread_task(self) -> int | None:
        """The backward pass in which this thread entered its latest block, or None."""
        return getattr(self._thread, "task", None)

    def left(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Hook of a block: what it returns belongs to the pass of its input."""
        x = output[0] if isinstance(output, tuple) and output else output
        if not torch.compiler.is_compiling() and isinstance(x, Tensor):
            state = self.current
            self._note(x, state)
            if _backward_task() is None:
                state.place = (threading.get_ident(), id(block))

    def _pass_of_unknown(self, x: Tensor, block: nn.Module) -> ForwardPass:
        """The pass of tokens ``[B, N, C]`` that no block has returned.

        Raises:
            SparsifinerError: if images of several grids come into question.
        """
        num_tokens = x.shape[-2]
        if _backward_task() is not None:
            return self._pass_to_recompute(num_tokens)
        own: ForwardPass | None = getattr(self._thread, "current", None)
        with self._lock:
            here = threading.current_thread()
            pending = self._pending.get(here, [])
            chosen = self._waiting(num_tokens, [here])
            if chosen is None and (own is None or id(block) in own.entered):
                # Not in the middle of a pass of this thread: another may have embedded the image.
                chosen = self._waiting(num_tokens, [thread for thread in self._pending if thread is not here])
        if chosen is not None:
            return chosen
        self._refuse_interleaved(num_tokens)
        if pending or num_tokens != self.num_prefix_tokens + self.num_patches:
            return self.current  # in the middle of a pass: something changed the tokens between two blocks
        self._check_embedding()
        return ForwardPass(self.shape, self.current.num_frames)

    def _waiting(self, num_tokens: int, threads: list[threading.Thread]) -> ForwardPass | None:
        """The first pass that was begun in these threads and waits for blocks to run on ``num_tokens`` tokens; it waits
        no more.

        Raises:
            SparsifinerError: if images of several grids come into question.
        """
        entries = [(thread, state) for thread in threads for state, _ in self._pending.get(thread, [])]
        matching = [entry for entry in entries if self.num_prefix_tokens + entry[1].num_patches == num_tokens]
        shapes = {state.shape for _, state in matching}
        if len(shapes) > 1:
            grids = " and ".join(f"{rows}x{columns}" for rows, columns in sorted(shapes))
            self._thread.running = True  # the next image is embedded afresh: what is refused here does not refuse it
            raise SparsifinerError(
                f"images of {grids} patches were embedded before the blocks ran, and these {num_tokens} tokens may be "
                f"of either; run the blocks of one image before the next is embedded"
            )
        if not matching:
            return None
        thread, chosen = matching[0]
        self._pending[thread] = [entry for entry in self._pending[thread] if entry[0] is not chosen]
        return chosen

    def _refuse_interleaved(self, num_tokens: int) -> None:
        """Refuse tokens that may belong to either of two passes that stopped after the same block in this thread."""
        current = self.current
        for state in self._alive_with(num_tokens) if current.place is not None else ():
            if state.place == current.place and state.shape != current.shape:
                grids = " and ".join(f"{rows}x{columns}" for rows, columns in (current.shape, state.shape))
                raise SparsifinerError(
                    f"images of {grids} patches are both between two blocks, and these {num_tokens} tokens, which no "
                    f"block returned, may be of either; run all blocks of one image before those of the next"
                )

    def _alive_with(self, num_tokens: int) -> list[ForwardPass]:
        """Passes whose tensors are still held, of which a sequence of ``num_tokens`` tokens may be."""
        with self._lock:
            alive = list(self._alive)
        return [state for state in alive if state.may_hold(num_tokens, self.num_prefix_tokens)]

    def _pass_to_recompute(self, num_tokens: int) -> ForwardPass:
        """The pass of a block that runs again inside a backward pass, with a copy of its input."""
        alive = self._alive_with(num_tokens)
        if not all(state.agrees(alive[0]) for state in alive[1:]):
            raise SparsifinerError(
                "activation checkpointing runs a block again, and its input may belong to any of several forward "
                "passes; use checkpointing with use_reentrant=False, not nested, or one backward pass after each "
                "forward pass"
            )
        return alive[0] if alive else self.current

    def _check_embedding(self) -> None:
        """Refuse to go on with the grid of an embedding that its model has lost."""
        owner: Any = None if self._owner is None else self._owner()
        if owner is not None and not self._follows(owner):
            raise SparsifinerError(
                f"the patch embedding of {type(owner).__name__} was replaced after the model was converted, so the "
                f"patch grid of this image is unknown; replace it first and convert then"
            )

    def _follows(self, owner: Any) -> bool:
        """True while the embedding of ``owner`` tells this grid."""
        return find_grid(owner) is self

    def _note(self, x: Tensor, state: ForwardPass) -> None:
        self._passes[x] = state
        with self._lock:
            self._alive.add(state)

    def _enter(self, state: ForwardPass) -> None:
        self.latest = state
        if not torch.compiler.is_compiling():
            self._thread.current = state

    def attach(self, owner: Any, blocks: Iterable[nn.Module]) -> None:
        """Hook into the patch embedding of ``owner``, a timm model, and into the blocks that look at the grid."""
        self._owner = weakref.ref(owner)
        embed = owner.patch_embed
        add_grid_hook(embed.register_forward_hook, embed._forward_hooks, self, "embedded")
        if isinstance(getattr(embed, "proj", None), nn.Conv2d):
            add_grid_hook(embed.proj.register_forward_hook, embed.proj._forward_hooks, self, "projected")
        for block in blocks:
            add_grid_hook(block.register_forward_pre_hook, block._forward_pre_hooks, self, "entered")
            add_grid_hook(block.register_forward_hook, block._forward_hooks, self, "left")


class GridHook:
    """A hook of a module that tells a patch grid, as long as a layer looks at it."""

    def __init__(self, grid: PatchGrid | None, event: str) -> None:
        self._grid = None if grid is None else weakref.ref(grid)
        self.event = event

    @property
    def grid(self) -> PatchGrid | None:
        return None if self._grid is None else self._grid()

    def __call__(self, module: nn.Module, *args: Any) -> None:
        grid = self.grid
        if grid is not None:
            getattr(grid, self.event)(module, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> GridHook:
        return GridHook(copy.deepcopy(self.grid, memo), self.event)

    def __reduce__(self) -> tuple[Any, ...]:
        return GridHook, (self.grid, self.event)


def add_grid_hook(register: Any, hooks: dict[int, Any], grid: PatchGrid, event: str) -> None:
    if not any(isinstance(hook, GridHook) and hook.grid is grid and hook.event == event for hook in hooks.values()):
        register(GridHook(grid, event))


def _backward_task() -> int | None:
    """The number of the backward pass under way, or None outside; PyTorch has no public way to ask."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    number = -1 if task is None else task()
    return None if number == -1 else number


def find_grid(owner: Any) -> PatchGrid | None:
    """The patch grid that follows the patch embedding of ``owner``, or None."""
    hooks = owner.patch_embed._forward_hooks.values()
    return next((hook.grid for hook in hooks if isinstance(hook, GridHook) and hook.grid is not None), None)


def follow_grid(owner: Any) -> PatchGrid:
    """The patch grid of ``owner``, a timm model with ``patch_embed``; not attached yet where there was none."""
    embed = owner.patch_embed
    return find_grid(owner) or PatchGrid(
        tuple(embed.grid_size), tuple(getattr(embed, "patch_size", (1, 1))), owner.num_prefix_tokens
    )


def drop_unused_grids(model: nn.Module) -> None:
    """Take out the hooks of patch grids that no layer looks at any more, or none of ``model``'s blocks."""
    used = {id(vars(module)["grid"]) for module in model.modules() if "grid" in vars(module)}
    for module in model.modules():
        attends = "grid" in vars(module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for handle, hook in list(hooks.items()):
                if isinstance(hook, GridHook) and (
                    hook.grid is None
                    or (hook.event in ("entered", "left") and id(hook.grid) not in used)
                    or (hook.event == "attended" and not attends)
                ):
                    del hooks[handle]


def check_size(size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Refuse a size, rows and columns in pixels, that the patches do not divide; the error names near ones."""
    if any(side < patch or side % patch for side, patch in zip(size, patch_size, strict=True)):
        near = []
        for up in (0, 1):
            rows, columns = (
                max(patch, (side // patch + (up and side % patch > 0)) * patch)
                for side, patch in zip(size, patch_size, strict=True)
            )
            near.append(str(rows) if rows == columns else f"{rows}x{columns}")
        wanted = size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"
        raise SparsifinerError(
            f"image size {wanted} is not a multiple of the model's {patch_size[0]}x{patch_size[1]} patches; "
            f"use {' or '.join(dict.fromkeys(near))}"
        )


def check_image_size(model: Any, size: tuple[int, int]) -> None:
    """:func:`check_size` for ``model``: timm's patch embeddings leave out the pixels that fill no patch, unless they
    pad the image."""
    embed = getattr(model, "patch_embed", None)
    patch_size = getattr(embed, "patch_size", None)
    if patch_size is not None and not getattr(embed, "dynamic_img_pad", False):
        check_size(size, (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size))
