"""Operations and backends: who serves a call and why, one more backend, derivatives of every kind, autocast."""

from __future__ import annotations

import pytest
import torch
from test_operator import make
from torch import Tensor

from sparsifiner import SparsifinerConfig, attention, predictors, register_adapter, register_predictor, sparsify
from sparsifiner.methods import METHODS, convert_with
from sparsifiner.ops import OPERATIONS, backends, pool_blocks, register_backend, registered_backend, serving, top_keys
from sparsifiner.ops.attend import ATTEND


def test_a_backend_of_ones_own_serves_where_it_is_named() -> None:
    """Ten lines make a backend; what it leaves out is the references'."""
    asked = []

    def attend(q: Tensor, *others: object) -> Tensor:
        return torch.full_like(q, 7.0)

    def why_not(operation: str, *, needs_gradients: bool, **arguments: object) -> str | None:
        asked.append(operation)
        return "toys do not learn" if needs_gradients else None

    problem = make(bias=True).to(torch.float32)
    with registered_backend("toy", device_type="cpu", kernels={"attend": attend}, why_not=why_not):
        assert "toy" in backends()
        assert (problem.run("toy") == 7).all()
        assert asked == ["attend"]
        assert serving(ATTEND, "toy", False, {"q": problem.q})[0] == "toy"
        assert not (problem.run("auto") == 7).any()  # it is asked for or not at all
        blocks = problem.connectivity.tiling
        assert torch.equal(pool_blocks(problem.k, blocks, "toy"), pool_blocks(problem.k, blocks, "reference"))
        with pytest.raises(ValueError, match="backend 'toy' cannot run here: toys do not learn"):
            problem.run("toy", q=problem.q.clone().requires_grad_())
        with pytest.raises(ValueError, match="backend 'toy' cannot run here: it runs on cpu, the tensors are on meta"):
            serving(ATTEND, "toy", False, {"q": problem.q.to("meta")})
        with pytest.raises(ValueError, match="there is a backend 'toy' already"), registered_backend("toy", kernels={}):
            pass
    assert "toy" not in backends()
    with pytest.raises(ValueError, match="there is no such backend; choose one of auto, reference"):
        problem.run("toy")
    with pytest.raises(ValueError, match="there is no operation 'attention'; choose from"):
        register_backend("toy", kernels={"attention": attend})


def test_a_whole_model_runs_on_a_backend_of_ones_own(tiny_vit, images) -> None:
    calls = []

    def attend(*arguments: object) -> Tensor:
        calls.append(arguments)
        return ATTEND.reference(*arguments)

    config = SparsifinerConfig(keep_rate=0.3, mode="sparse", backend="toy")
    with registered_backend("toy", kernels={"attend": attend}), torch.no_grad():
        toy = sparsify(tiny_vit(), config)(images(2, 3, 32, 32))
        references = sparsify(tiny_vit(), config.replace(backend="reference"))(images(2, 3, 32, 32))
    assert len(calls) == 2
    assert torch.equal(toy, references)


@pytest.mark.parametrize("method", METHODS)
def test_models_train_inside_autocast(method: str, tiny_vit, images) -> None:
    model = convert_with(method, tiny_vit(), 0.3).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(images(2, 3, 32, 32)).float().square().mean().backward()
    gradient = model.get_submodule("blocks.0.attn.qkv").weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_an_automatic_backend_comes_before_those_for_any_device() -> None:
    def largest(scores: Tensor, count: int) -> Tensor:
        return scores.new_zeros((*scores.shape[:-1], count), dtype=torch.int32)

    scores = torch.randn(3, 9, dtype=torch.float64)  # which the compiled kernels do not take
    with registered_backend("toy", device_type=("cpu", "cuda"), kernels={"topk": largest}, automatic=True):
        assert not top_keys(scores, 4).any()
        backend, reason = serving(OPERATIONS["topk"], "auto", False, {"scores": scores})
        assert backend == "toy"
        assert "native cannot run here" in reason
    assert top_keys(scores, 4).any()


def test_the_answer_is_the_same_for_every_operation() -> None:
    """Each is asked by its own arguments, and says what keeps a backend from serving it."""
    for operation in OPERATIONS.values():
        inputs = {name: torch.empty(1, 1, 1, 1, 40, device="meta") for name in operation.arguments[:1]}
        backend, reason = serving(operation, "auto", False, inputs)
        assert backend in ("reference", "gather")
        assert "native cannot run here: it runs on cpu, the tensors are on meta" in reason or "native" not in reason
        assert serving(operation, "reference", True, inputs)[0] == "reference"


def test_what_extends_the_library_is_public() -> None:
    assert register_adapter is attention.adapters.register_adapter
    assert register_predictor is predictors.register_predictor
