"""Conversions that would lose something, or could never run: refused by name before anything is changed."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from dataclasses import dataclass

import pytest
import timm
import torch
from conftest import TINY
from torch import nn

import sparsifiner
from sparsifiner import SparsifinerConfig, densify, prune_tokens, register_predictor, sparse_layers, sparsify
from sparsifiner._utils.copying import copy_model
from sparsifiner.attention.adapters.registry import _ADAPTERS
from sparsifiner.attention.module_state import replaced_method
from sparsifiner.ops import cpu, registered_backend
from sparsifiner.predictors import LowRankConfig
from sparsifiner.predictors.base import Predictor, PredictorConfig
from sparsifiner.predictors.registry import _CONFIGS, _PREDICTORS, predictor_class

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "vit_tiny_patch16_224"


def tiny(**changes: object) -> nn.Module:
    return timm.create_model(NAME, num_classes=3, **{**TINY, **changes}).eval()


@pytest.mark.parametrize("wrapped", [False, True], ids=["replaced", "wrapped"])
@pytest.mark.parametrize("convert", [sparsify, functools.partial(prune_tokens, keep_rate=0.5, layers=(1,))])
def test_a_forward_put_on_the_class_is_not_lost(wrapped, convert, monkeypatch):
    model = tiny()
    kind = type(model.blocks[1].attn)
    original = kind.forward

    def forward(self, x, *arguments, **settings):
        return original(self, x, *arguments, **settings) * 2

    monkeypatch.setattr(kind, "forward", functools.wraps(original)(forward) if wrapped else forward)
    with pytest.raises(ValueError, match=r"forward of the class Attention was replaced by a function of test_refusals"):
        convert(model)
    monkeypatch.undo()
    convert(model)


def test_no_class_that_can_be_converted_looks_replaced():
    assert len(_ADAPTERS) >= 7
    homes = (timm.layers, timm.models.vision_transformer, timm.models.beit, timm.models.eva, torch.nn)
    classes = {kind for home in homes for kind in vars(home).values() if isinstance(kind, type)} | _ADAPTERS.keys()
    found = {kind for kind in classes if issubclass(kind, nn.Module)}
    assert len(found) > 200
    assert [kind for kind in found if replaced_method(kind) is not None] == []


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a backward pass"])
def test_old_parametrizations_are_copied(norm, used):
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in model.blocks:
            getattr(torch.nn.utils, norm)(block.attn.qkv)
    x = torch.randn(2, 3, 32, 32)
    if used:
        model(x).sum().backward()
    want = model(x)
    sparse = sparsify(model, SparsifinerConfig(keep_rate=1.0, mode="sparse", query_tile=(2, 2)))
    torch.testing.assert_close(sparse(x), want, rtol=1e-4, atol=1e-5)
    sparse(x).sum().backward()
    name = "weight_g" if norm == "weight_norm" else "weight_orig"
    assert getattr(sparse.blocks[0].attn.qkv, name).grad.abs().max() > 0
    torch.testing.assert_close(densify(sparse)(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy_model(model)(x), want)


def test_a_backend_that_can_never_run_is_refused_at_conversion(monkeypatch):
    model = tiny()
    with pytest.raises(ValueError, match="backend 'nativ' cannot run here: there is no such backend; choose"):
        sparsify(model, SparsifinerConfig(backend="nativ"))
    with monkeypatch.context() as patch:
        patch.setattr(cpu.binding, "_missing", "there is no compiled module")
        with pytest.raises(ValueError, match="backend 'native' cannot run here: there is no compiled module"):
            sparsify(model, SparsifinerConfig(backend="native"))
    with pytest.raises(ValueError, match="cannot run here: .*multiples of 16 from 16 to 128, not 12|_native"):
        sparsify(model, SparsifinerConfig(backend="native"))  # TINY has heads of width 12
    kernels = {"attend": lambda q, *others: q}
    with registered_backend("elsewhere", device_type="xpu", kernels=kernels), monkeypatch.context() as patch:
        patch.setattr(torch.xpu, "is_available", lambda: False)
        with pytest.raises(ValueError, match="it runs on devices that this machine does not have"):
            sparsify(model, SparsifinerConfig(backend="elsewhere"))
    assert not sparsifiner.convert.is_sparse(model)

    def half_only(name: str, *, needs_gradients: bool, q: torch.Tensor, **others: object) -> str | None:
        return None if q.dtype == torch.float16 else "it takes float16"

    with registered_backend("halves", device_type="cpu", kernels=kernels, why_not=half_only):
        assert sparse_layers(sparsify(model, SparsifinerConfig(backend="halves")))  # it may become one


def test_a_saved_model_of_a_backend_that_is_not_here_loads_and_is_refused_when_it_runs(tmp_path):
    with registered_backend("elsewhere", device_type="cpu", kernels={"attend": lambda q, *others: q}):
        sparse = sparsify(tiny(), SparsifinerConfig(backend="elsewhere", mode="sparse", query_tile=(2, 2), tail=(2, 2)))
        sparsifiner.save_pretrained(sparse, tmp_path)
    loaded = sparsifiner.from_pretrained(tmp_path)
    assert {layer.config.backend for layer in sparse_layers(loaded).values()} == {"elsewhere"}
    with pytest.raises(ValueError, match="there is no such backend"):
        loaded(torch.zeros(1, 3, 32, 32))
    assert densify(loaded)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@dataclass(frozen=True)
class Sound(PredictorConfig):
    width: int = 3


@dataclass(frozen=True)
class NoDefault(PredictorConfig):
    width: int


@dataclass
class Thawed:
    width: int = 3


class NoDataclass(PredictorConfig):
    width = 3


class OnePredictor(Predictor):
    pass


class AnotherPredictor(Predictor):
    pass


@pytest.mark.parametrize(
    ("name", "config", "predictor", "words"),
    [
        ("mine", NoDefault, OnePredictor, "NoDefault.width needs a default"),
        ("mine", Thawed, OnePredictor, "must be a dataclass, a subclass of PredictorConfig"),
        ("mine", NoDataclass, OnePredictor, "NoDataclass must be a frozen dataclass"),
        ("mine", "Sound", OnePredictor, "must be a dataclass"),
        ("mine", LowRankConfig, OnePredictor, "holds the settings of the predictor 'lowrank'"),
        ("mine", Sound, nn.Linear, "must be a subclass of Predictor"),
        ("pooled", Sound, OnePredictor, "there is a predictor 'pooled' already, sparsifiner.predictors.pooled"),
        ("", Sound, OnePredictor, "registered by a name"),
    ],
)
def test_predictors_are_checked_where_they_are_registered(name, config, predictor, words):
    before = dict(_PREDICTORS), dict(_CONFIGS), Sound.name
    with pytest.raises(ValueError, match=words):
        register_predictor(name, config)(predictor)
    assert (dict(_PREDICTORS), dict(_CONFIGS), Sound.name) == before


def test_a_predictor_that_is_defined_again_takes_its_own_place(monkeypatch):
    monkeypatch.setattr(Sound, "name", "")
    monkeypatch.setitem(_PREDICTORS, "mine", OnePredictor)
    monkeypatch.setitem(_CONFIGS, "mine", Sound)
    again = dataclasses.make_dataclass("Sound", [("width", int, 4)], bases=(PredictorConfig,), frozen=True)
    once_more = type("OnePredictor", (Predictor,), {"__module__": OnePredictor.__module__})
    register_predictor("mine", again)(once_more)
    assert predictor_class("mine") is once_more
    with pytest.raises(ValueError, match="there is a predictor 'mine' already"):
        register_predictor("mine", Sound)(AnotherPredictor)
