"""What a user does on a CUDA GPU gives what it gives on a CPU. Skipped where there is no GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import TINY
from sweep_recipes import RECIPE
from test_operator import Problem, make

from sparsifiner import SparsifinerConfig, calibrate, sparse_attention, sparsify
from sparsifiner.evaluation import run_sweep, validate
from sparsifiner.methods import METHODS, convert_with
from sparsifiner.ops.gather import chunks
from sparsifiner.training import DataConfig, train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    # timm's fused attention, of which torch has no deterministic backward pass at every width.
    pytest.mark.filterwarnings("ignore:Memory Efficient attention defaults:UserWarning"),
]

PROBLEMS = {
    "tiles": {"grid": (14, 13), "width": 64},
    "single queries": {"grid": (7, 9), "tile": (1, 1), "block": None},
    "padding and bias": {"padding": True, "bias": True},
    "no prefix": {"prefix": 0, "block": None},
}


def on_gpu(problem: Problem) -> Problem:
    def move(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.cuda()
        if dataclasses.is_dataclass(value):
            changes = {f.name: move(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            return dataclasses.replace(value, **changes)  # type: ignore[type-var]
        return value

    return move(problem)  # type: ignore[return-value]


@pytest.mark.parametrize("cost", [0, 10**9], ids=["copied keys", "masked keys"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_operator_and_its_gradients(name, cost, dtype, budget, monkeypatch):
    monkeypatch.setattr(chunks, "COPY_COST", cost)
    problem = make(**PROBLEMS[name])
    exact, found = problem.to(dtype).to(torch.float64), on_gpu(problem.to(dtype))
    results = []
    for one, backend in ((exact, "reference"), (found, "gather")):
        inputs = [x.clone().requires_grad_() for x in (one.q, one.k, one.v)]
        out = sparse_attention(*inputs, one.connectivity, tail=one.tail, attn_bias=one.attn_bias, backend=backend)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for expected, got in zip(*results, strict=True):
        assert (got.cpu().double() - expected).norm() <= budget * expected.norm()


def test_more_groups_than_one_launch_takes():
    problem = make(grid=(48, 48), tile=(1, 1), heads=16, keys=3, block=None)
    assert problem.connectivity.indices[..., 0].numel() > 65_535
    out = on_gpu(problem.to(torch.float32)).run("gather").cpu()
    assert (out.double() - problem.run("gather")).norm() <= 1e-5 * out.norm()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers_as_on_a_cpu(name, tiny_vit, images):
    model = convert_with(name, tiny_vit(depth=4), 0.3).double()
    x = images(3, 3, 32, 32).double()
    with torch.no_grad():
        expected, got = model(x), model.cuda()(x.cuda()).cpu()
    assert (got - expected).norm() <= 1e-6 * expected.norm()  # class attention is float32; another choice shows at 1e-3


def losses(config, folder, *, cpu: bool = False) -> list[float]:
    return [entry["loss"] for entry in train(config, folder, cpu=cpu).history if "loss" in entry]


def test_training_goes_as_on_a_cpu(recipe, tmp_path):
    config = recipe(model_args=TINY)  # a GPU drops other paths than a CPU
    found = losses(config, tmp_path / "gpu")
    assert len(found) > 2
    assert found == pytest.approx(losses(config, tmp_path / "cpu", cpu=True), rel=1e-2)


def test_training_goes_twice_the_same(recipe, tmp_path):
    assert losses(recipe(), tmp_path / "one") == losses(recipe(), tmp_path / "two")


def test_calibration(tiny_vit, images):
    for predictor in ("pooled", "lowrank"):
        model = sparsify(tiny_vit(), SparsifinerConfig(keep_rate=0.3, predictor=predictor)).cuda()
        layers = calibrate(model, images(6, 3, 32, 32), steps=3).layers
        assert next(model.parameters()).is_cuda
        assert sum(layer.error for layer in layers) <= sum(layer.error_before for layer in layers)


def test_a_sweep_of_all_methods_and_stages(sweep, tmp_path):
    everything = sweep(
        methods=tuple(METHODS), keep_rates=(0.5,), stages=("training-free", "calibrated", "fine-tuned"), recipe=RECIPE,
        num_images=16, device="cuda", dtype=torch.bfloat16, repeats=1,
    )  # fmt: skip
    rows = run_sweep(everything, tmp_path)
    assert {row.cell.method for row in rows} == set(METHODS)
    assert all(row.images == 16 and row.ms > 0 for row in rows)


def test_validation(classifier, folder_of_images):
    data = DataConfig(path=str(folder_of_images), img_size=32, workers=0)
    found = [validate(str(classifier), data, device=device, repeats=1).rows for device in ("cpu", "cuda")]
    assert [row.accuracy.top1 for row in found[0]] == [row.accuracy.top1 for row in found[1]]
