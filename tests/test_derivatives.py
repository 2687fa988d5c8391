"""Derivatives of every kind, autocast, and what traces the operations: one sparse layer against itself."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import pytest
import torch
from test_operator import make
from torch import Tensor, nn
from torch.autograd import forward_ad

import sparsifiner
from sparsifiner import SparsifinerConfig, Tiling, sparse_attention
from sparsifiner.attention import AttentionInputs, build_predictor, tail_groups
from sparsifiner.ops import OPERATIONS, block_distances, pool_blocks
from sparsifiner.ops.tail import group_keys

Inputs = tuple[Tensor, Tensor, Tensor]
DTYPES = (torch.float64, torch.float32)  # the first is none of the compiled kernels'


class Layer(nn.Module):
    """Prediction, tail and attention of one layer, ``[B, H, N, D]`` to the same, with one weight."""

    def __init__(self, dtype: torch.dtype, predictor: str = "pooled", backend: str = "auto") -> None:
        super().__init__()
        self.config = SparsifinerConfig(keep_rate=0.3, predictor=predictor)
        self.tiling = Tiling((6, 5), (4, 4), 1)
        self.backend = backend
        torch.manual_seed(0)
        self.predictor = build_predictor(self.config, num_heads=3, head_dim=16, grid=(6, 5), num_prefix_tokens=1)
        self.weight = nn.Parameter(torch.ones(()))
        self.to(dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = AttentionInputs(self.weight * q, k, v, self.tiling, 0.25, None, self.backend)
        groups = tail_groups(self.config.tail, inputs)
        connectivity = self.predictor(inputs, groups)
        tail = groups and groups.tail(connectivity, None, self.backend)
        return sparse_attention(inputs.q, k, v, connectivity, tail=tail, scale=0.25, backend=self.backend)


def tensors(dtype: torch.dtype, batch: int = 2) -> Inputs:
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, batch, 3, 31, 16, generator=g, dtype=torch.float64).to(dtype).unbind(0)
    return q, k, v


def loss_of(layer: Layer) -> Callable[..., Tensor]:
    def loss(*inputs: Tensor) -> Tensor:
        out = layer(*inputs)
        return (out * torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view(out.shape[1:])).sum()

    return loss


def gradients_of(loss: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


def close(got: object, want: object, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got, want, rtol=1e3 * torch.finfo(dtype).eps, atol=1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_torch_func(dtype: torch.dtype) -> None:
    loss, inputs = loss_of(Layer(dtype)), tensors(dtype)
    close(torch.func.grad(loss, (0, 1, 2))(*inputs), gradients_of(loss, inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_sample_gradients_and_mapped_inference(dtype: torch.dtype) -> None:
    layer, inputs = Layer(dtype), tensors(dtype)

    def one(*image: Tensor) -> Tensor:
        return loss_of(layer)(*(x[None] for x in image))

    close(torch.func.vmap(torch.func.grad(one, (0, 1, 2)))(*inputs), gradients_of(loss_of(layer), inputs), dtype)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda *image: layer(*(x[None] for x in image))[0])(*inputs)
        close(mapped, layer(*inputs), dtype)


def test_a_bias_that_images_share_has_a_gradient_per_image() -> None:
    p = make(bias=True, padding=True)

    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out = sparse_attention(q, k, v, p.connectivity, tail=p.tail, attn_bias=bias)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()

    several = [torch.stack([x, x.flip(-1)]) for x in (p.q, p.k, p.v)]
    got = torch.func.vmap(torch.func.grad(loss, 3), (0, 0, 0, None))(*several, p.attn_bias)
    assert got.shape == (2, *p.attn_bias.shape)
    for number in range(2):
        torch.testing.assert_close(got[number], torch.func.grad(loss, 3)(*(x[number] for x in several), p.attn_bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["torch.func.jvp", "forward_ad"])
def test_forward_mode(dtype: torch.dtype, way: str) -> None:
    """A directional derivative is the gradient's product with the direction, never zero."""
    loss, inputs = loss_of(Layer(dtype)), tensors(dtype)
    directions = [x.roll(1, -1) for x in inputs]
    if way == "torch.func.jvp":
        got = torch.func.jvp(loss, inputs, tuple(directions))[1]
    else:
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(loss(*map(forward_ad.make_dual, inputs, directions))).tangent
    want = sum((g * d).sum() for g, d in zip(gradients_of(loss, inputs), directions, strict=True))
    assert want.abs() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=0)


def test_second_derivatives() -> None:
    loss, (q, k, v) = loss_of(Layer(torch.float64)), tensors(torch.float64)

    def of_scale(scale: Tensor) -> Tensor:
        return loss(scale * q, k, v)

    one, step = torch.ones((), dtype=torch.float64), 1e-5
    slope = torch.func.grad(of_scale)
    want = (slope(one + step) - slope(one - step)) / (2 * step)  # the choice of keys stays
    scale = one.clone().requires_grad_()
    (first,) = torch.autograd.grad(of_scale(scale), scale, create_graph=True)
    for got in (
        torch.autograd.grad(first, scale)[0],
        torch.func.hessian(of_scale)(one),
        torch.func.jacrev(slope)(one),
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.func.jacfwd(of_scale)(one), slope(one))
    p = make(padding=True, bias=True, batch=1, heads=1, grid=(3, 3), tile=(2, 2), block=(2, 2), width=2)
    leaves = [x.requires_grad_() for x in (p.q, p.k, p.v, p.attn_bias)]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sparse_attention(q, k, v, p.connectivity, attn_bias=bias[..., :10], backend="gather")

    assert torch.autograd.gradcheck(attend, leaves, check_forward_ad=False)
    assert torch.autograd.gradgradcheck(attend, leaves)


def test_a_kernel_without_forward_mode_says_so_when_it_is_asked_for() -> None:
    layer, inputs = Layer(torch.float64, backend="gather"), tensors(torch.float64)
    with pytest.raises(ValueError, match="backend 'gather' cannot run here: it has no forward-mode derivatives"):
        torch.func.jvp(layer, inputs, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_kernel_are_the_references(dtype: torch.dtype) -> None:
    """A kernel that serves calls which need gradients gets those of the reference."""
    blocks, (x, _, _) = Tiling((6, 5), (4, 4), 1), tensors(dtype)

    kernels = {name: OPERATIONS[name].reference for name in ("pool_blocks", "block_distances")}
    with sparsifiner.ops.registered_backend("toy", kernels=kernels, why_not=lambda operation, **_: None):
        for operation in (pool_blocks, block_distances):

            def loss(x: Tensor, backend: str = "toy", operation: Callable[..., Tensor] = operation) -> Tensor:
                return operation(x, blocks, backend).square().sum()

            want = gradients_of(functools.partial(loss, backend="reference"), (x,))
            close(gradients_of(loss, (x,)), want, dtype)
            close(torch.func.vmap(torch.func.grad(loss))(x[:, None])[:, 0], want[0], dtype)


@pytest.mark.parametrize("predictor", ["pooled", "lowrank", "local", "oracle"])
def test_backward_inside_autocast(predictor: str) -> None:
    """The operations compute as written, forward and backward; what surrounds them is the caller's affair."""
    layer, inputs = Layer(torch.float32, predictor), tensors(torch.float32)
    with torch.no_grad():
        groups = group_keys(*inputs[1:], layer.tiling.regions((4, 4)), 2)
        connectivity = layer.predictor(AttentionInputs(*inputs, layer.tiling, 0.25), groups)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tail = group_keys(k, v, layer.tiling.regions((4, 4)), 2).tail(connectivity)
        return sparse_attention(q, k, v, connectivity, tail=tail).square().sum()

    want = gradients_of(loss, inputs)
    for backend in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            close(gradients_of(loss, inputs), want, torch.float32)
            loss_of(Layer(torch.float32, predictor, backend))(*inputs).backward()


@pytest.mark.parametrize("method", ["pooled", "lowrank", "random", "local", "strided", "oracle"])
def test_export_for_any_batch(method: str) -> None:
    layer, batch = Layer(torch.float32, method).eval(), torch.export.Dim("batch", min=1, max=8)
    sizes = {name: {0: batch} for name in "qkv"}
    exported = torch.export.export(layer, tensors(torch.float32), dynamic_shapes=sizes).module()
    for number in (1, 2, 7):
        inputs = tensors(torch.float32, number)
        with torch.no_grad():
            close(exported(*inputs), layer(*inputs), torch.float32)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # checks of shapes do not become part of the graph
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(grad: bool) -> None:
    """Also saved and loaded, and for another batch."""
    layer, file = Layer(torch.float32).eval(), io.BytesIO()
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(layer, tensors(torch.float32)), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for number in (2, 5):
            inputs = tensors(torch.float32, number)
            close(loaded(*inputs), layer(*inputs), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_training_and_inference_have_no_graph_breaks(dtype: torch.dtype) -> None:
    layer, inputs = Layer(dtype), tensors(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def loss(*inputs: Tensor) -> Tensor:
        return compiled(*inputs).square().sum()

    close(gradients_of(loss, inputs), gradients_of(lambda *x: layer(*x).square().sum(), inputs), dtype)
    with torch.no_grad():
        close(compiled(*inputs), layer(*inputs), dtype)


@pytest.mark.parametrize("where", ["pixel of one image", "query", "key", "value"])
@pytest.mark.parametrize("predictor", ["pooled", "lowrank", "local"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nan_concerns_its_image_only(tiny_vit, images, dtype: torch.dtype, predictor: str, where: str) -> None:
    """The others answer as they do without it, bit for bit; that image is NaN, as it is in dense attention."""
    if where == "pixel of one image":
        config = SparsifinerConfig(keep_rate=0.3, predictor=predictor, mode="sparse")
        model = sparsifiner.sparsify(tiny_vit(), config).to(dtype).eval()
        whole, broken = [images(3, 3, 32, 32).to(dtype)], images(3, 3, 32, 32).to(dtype)
        broken[1, 0, 9, 9] = float("nan")
        changed = [broken]
    else:
        model, whole = Layer(dtype, predictor), list(tensors(dtype, 3))
        changed = [x.clone() for x in whole]
        changed[["query", "key", "value"].index(where)][1, :, 9, 3] = float("nan")
    with torch.no_grad():
        want, got = model(*whole), model(*changed)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert got[1].isnan().any()
    if where == "pixel of one image":
        assert got[1].isnan().all()
