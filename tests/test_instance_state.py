"""What an instance holds besides weights: patched methods, compiled calls, hooks. Conversion carries it or refuses."""

from __future__ import annotations

import copy
import functools
import gc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sparsifiner
from sparsifiner import SparsifinerConfig, conversion, densify, prune_tokens, record, sparsify
from sparsifiner.reduction import linformer, merge_tokens

ALWAYS = SparsifinerConfig(keep_rate=0.2, mode="sparse")


def patch_forward(module: nn.Module) -> None:
    """The usual recipe to look at attention."""
    original = type(module).forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: original(self, *args, **kwargs), module)


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "sparsify": lambda model: sparsify(model, ALWAYS),
    "sparsify in place": lambda model: sparsify(model, ALWAYS, inplace=True),
    "prune_tokens": lambda model: prune_tokens(model, layers=(0,)),
    "merge_tokens": lambda model: merge_tokens(model, 4),
    "linformer": lambda model: linformer(model, keep_rate=0.5),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("where", ["attn", "block"])
@pytest.mark.parametrize("how", ["forward", "compile"])
def test_what_would_stay_dense_in_silence_is_refused(convert, where, how, tiny_vit, images) -> None:
    model, x = tiny_vit(), images(1, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
    for block in model.blocks:
        module = block if where == "block" else block.attn
        patch_forward(module) if how == "forward" else module.compile(backend="eager")
    reduces = convert in (CONVERSIONS["prune_tokens"], CONVERSIONS["merge_tokens"])
    copies_first = convert in (CONVERSIONS["sparsify"], CONVERSIONS["linformer"])
    if not reduces and (where == "block" or (how == "compile" and copies_first)):
        # Blocks stay what they are, so what was set on them goes on; copies of modules are not compiled.
        with torch.no_grad():
            assert not torch.allclose(convert(model)(x), want, rtol=1e-3, atol=1e-3)
        return
    with pytest.raises(ValueError, match="it was compiled" if how == "compile" else "forward is replaced"):
        convert(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)


def test_densify_refuses_what_was_set_on_a_sparse_layer(tiny_vit) -> None:
    sparse = sparsify(tiny_vit(), ALWAYS)
    patch_forward(sparse.blocks[0].attn)
    with pytest.raises(ValueError, match="forward is replaced"):
        densify(sparse)


def test_hooks_of_accelerate_are_carried_over(tiny_vit, images) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    calls: list[type[nn.Module]] = []

    class Watching(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(module))
            return args, kwargs

    model, x = tiny_vit(), images(1, 3, 32, 32)
    for block in model.blocks:
        hooks.add_hook_to_module(block.attn, Watching())
    sparse = sparsify(model, ALWAYS)
    with torch.no_grad(), record(sparse) as seen:
        got = sparse(x)
        assert not torch.equal(got, tiny_vit()(x))
    assert len(seen) == len(calls) == 2
    assert all(issubclass(kind, sparsifiner.attention.SparseAttention) for kind in calls)


@pytest.mark.parametrize("inplace", [False, True])
def test_every_kind_of_hook_goes_on_and_can_be_removed(inplace, tiny_vit, images, tmp_path: Path) -> None:
    model, x = tiny_vit(), images(1, 3, 32, 32)
    attention, calls = model.blocks[0].attn, []

    def note(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: calls.append(name)

    handles = {
        "forward": attention.register_forward_hook(note("forward")),
        "forward with kwargs": attention.register_forward_hook(note("forward with kwargs"), with_kwargs=True),
        "forward pre": attention.register_forward_pre_hook(note("forward pre")),
        "full backward": attention.register_full_backward_hook(note("full backward")),
        "full backward pre": attention.register_full_backward_pre_hook(note("full backward pre")),
        "state dict": attention.register_state_dict_post_hook(note("state dict")),
        "state dict pre": attention.register_state_dict_pre_hook(note("state dict pre")),
        "load pre": attention.register_load_state_dict_pre_hook(note("load pre")),
        "load": attention.register_load_state_dict_post_hook(note("load")),
    }
    sparse = sparsify(model, ALWAYS, inplace=inplace)
    del attention
    gc.collect()
    sparse(x.requires_grad_()).sum().backward()
    sparse.load_state_dict(sparse.state_dict())
    assert sorted(set(calls)) == sorted(handles)
    if inplace:
        calls.clear()
        for handle in handles.values():
            handle.remove()
        sparse(x).sum().backward()
        sparse.load_state_dict(sparse.state_dict())
        assert calls == []
    dense = densify(sparse)
    calls.clear()
    dense(x).sum().backward()
    assert ("full backward" in calls) == (not inplace)


def test_hooks_of_modules_that_no_longer_run_are_named(tiny_vit) -> None:
    model = tiny_vit()
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda *args: None)
    text = str(conversion(sparsify(model, ALWAYS)))
    assert "blocks.1.attn.attn_drop: its hooks are not called any more" in text


def test_a_module_shared_by_two_blocks_stays_shared(tiny_vit, images) -> None:
    model, x = tiny_vit(), images(1, 3, 32, 32)
    model.blocks[1].attn = model.blocks[0].attn
    sparse = sparsify(model, ALWAYS)
    assert sparse.blocks[0].attn is sparse.blocks[1].attn
    assert [item.name for item in conversion(sparse).swapped] == ["blocks.0.attn", "blocks.1.attn"]
    with torch.no_grad():
        dense = densify(sparse)
        assert dense.blocks[0].attn is dense.blocks[1].attn
        assert type(dense.blocks[0].attn) is timm.layers.Attention
        torch.testing.assert_close(dense(x), model(x))


class LowRankAdapter(nn.Module):
    """A linear wrapped as PEFT does, without a ``weight`` of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("before", [True, False])
def test_wrapped_linears_work_before_and_after(before, tiny_vit, images) -> None:
    model, x = tiny_vit().eval(), images(1, 3, 32, 32)

    def wrap(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        for block in model.blocks:
            for name in ("qkv", "proj"):
                adapter = LowRankAdapter(getattr(block.attn, name))
                for linear in (adapter.down, adapter.up):
                    nn.init.normal_(linear.weight, std=0.1, generator=generator)
                setattr(block.attn, name, adapter)
        return model

    config = ALWAYS.replace(keep_rate=1.0)
    sparse = sparsify(wrap(model), config) if before else wrap(sparsify(model, config))
    dense = model if before else wrap(model)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dynamically_quantized_linears_work(tiny_vit, images) -> None:
    model, x = tiny_vit().eval(), images(1, 3, 32, 32)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    for config in (ALWAYS.replace(keep_rate=1.0), SparsifinerConfig.paper(keep_rate=1.0)):
        with torch.no_grad():
            torch.testing.assert_close(sparsify(quantized, config)(x), quantized(x), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(linformer(quantized, keep_rate=1.0)(x), quantized(x), rtol=1e-3, atol=1e-3)


def test_a_block_at_several_places_is_refused_where_tokens_leave(tiny_vit, images) -> None:
    model, x = tiny_vit(depth=3), images(1, 3, 32, 32)
    model.blocks[2] = model.blocks[0]
    for convert in (lambda: prune_tokens(model, layers=(0,)), lambda: merge_tokens(model, 4)):
        with pytest.raises(ValueError, match="block 0 stands at several places of the model"):
            convert()
    assert prune_tokens(model, layers=(1,))(x).shape == model(x).shape  # another block may prune


@pytest.mark.parametrize("shared", ["attention", "block"])
def test_linformer_converts_what_is_shared_at_every_place(shared, tiny_vit, images) -> None:
    model, x = tiny_vit(depth=3), images(1, 3, 32, 32)
    if shared == "attention":
        model.blocks[2].attn = model.blocks[0].attn
    else:
        model.blocks[2] = model.blocks[0]
    converted = linformer(model, keep_rate=1.0)
    assert all(type(block.attn).__name__ == "LinformerAttention" for block in converted.blocks)
    assert converted.blocks[0].attn is converted.blocks[2].attn
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)


def test_backward_hooks_of_the_dropout_are_named_too(tiny_vit) -> None:
    model = tiny_vit()
    model.blocks[0].attn.attn_drop.register_full_backward_hook(lambda *args: None)
    assert "blocks.0.attn.attn_drop: its hooks" in str(conversion(sparsify(model, ALWAYS)))


def test_a_function_that_uses_the_original_is_not_copied(tiny_vit, images) -> None:
    """``model.forward = lambda x: ...model...`` in a copy would run the dense original, with nobody told."""
    x = images(1, 3, 32, 32)

    def patched(how: str) -> nn.Module:
        model = tiny_vit()
        forward, block = model.forward, model.blocks[0]

        def with_default(x: Tensor, model: nn.Module = model) -> Tensor:
            return type(model).forward(model, x)

        def of_block(x: Tensor, **settings: Any) -> Tensor:
            return type(block).forward(block, x, **settings)

        if how == "block":
            block.forward = of_block
        else:
            model.forward = {
                "lambda": lambda x: model.head(model.forward_head(model.forward_features(x), pre_logits=True)),
                "bound method": lambda x: forward(x),
                "default": with_default,
            }[how]
        return model

    for how in ("lambda", "bound method", "default", "block"):
        for convert in CONVERSIONS.values():
            model = patched(how)
            if convert is CONVERSIONS["sparsify in place"]:
                with torch.no_grad():
                    want = sparsify(tiny_vit(), ALWAYS)(x)
                    torch.testing.assert_close(convert(model)(x), want)
                continue
            with pytest.raises(ValueError, match=r"uses modules of this very model|forward is replaced"):
                convert(model)
    model = tiny_vit()
    model.forward = types.MethodType(lambda self, x: type(self).forward_features(self, x), model)
    sparse = sparsify(model, ALWAYS)
    with torch.no_grad(), record(sparse) as seen:
        assert sparse(x).ndim == 3
    assert len(seen) == 2


def test_attention_inside_a_compiled_module_is_refused(tiny_vit, images) -> None:
    """``torch.compile(attn)`` keeps a function of the module it was given; around more than that it looks anew."""
    x = images(1, 3, 32, 32)
    for inplace in (False, True):
        model = tiny_vit()
        for block in model.blocks:
            block.attn = torch.compile(block.attn, backend="eager")
        for convert in (sparsify, functools.partial(linformer, keep_rate=0.5)):
            with pytest.raises(ValueError, match="compiled and would go on running as before; convert first"):
                convert(model, inplace=inplace)
        model = tiny_vit()
        for number, block in enumerate(model.blocks):
            model.blocks[number] = torch.compile(block, backend="eager")
        sparse = sparsify(model, ALWAYS, inplace=inplace)
        with torch.no_grad(), record(sparse) as seen:
            torch.testing.assert_close(sparse(x), sparsify(tiny_vit(), ALWAYS)(x))
        assert len(seen) == 2


def test_dense_attention_keeps_no_hook_of_ours(tiny_vit) -> None:
    for model in (tiny_vit(), prune_tokens(tiny_vit(), layers=(0,))):
        sparse = sparsify(model, ALWAYS)
        assert all(block.attn._forward_pre_hooks for block in sparse.blocks)
        assert not any(block.attn._forward_pre_hooks for block in densify(sparse).blocks)
