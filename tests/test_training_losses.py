"""The losses against plain formulas, and what they must not do: hold N x N tensors, reach the backbone."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import lively
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsifiner
from sparsifiner import SparsifinerConfig
from sparsifiner.attention import build_predictor
from sparsifiner.geometry.subset import SubsetTiling
from sparsifiner.geometry.tiling import Tiling
from sparsifiner.predictors import LowRankConfig
from sparsifiner.training import losses
from sparsifiner.training.objective import Objective
from sparsifiner.training.phases import enter_phase
from sparsifiner.training.recipe import PhaseConfig


def setting(**changes):
    """A predictor on an 8x8 grid with a class token, and its queries and keys ``[2, 3, 65, 16]``."""
    torch.manual_seed(0)
    tiling = Tiling((8, 8), (1, 1), 1)
    config = SparsifinerConfig.paper(0.25, **changes)
    predictor = build_predictor(config, num_heads=3, head_dim=16, grid=(8, 8), num_prefix_tokens=1)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    q, k = torch.randn(2, 2, 3, 65, 16).unbind(0)
    return predictor, q.requires_grad_(), k.requires_grad_(), tiling


def attention_of(dense, x):
    """The attention map of the first layer, ``[B, H, N, N]``."""
    layer, seen = dense.blocks[0].attn, []
    layer.fused_attn = False
    handle = layer.attn_drop.register_forward_hook(lambda module, inputs, out: seen.append(out))
    dense(x)
    handle.remove()
    return seen[0]


def scores_of(predictor, q, k, tiling):
    return predictor.dense_coefficients(q, k, tiling) @ predictor.signed_basis(tiling).T


def test_cross_entropy_takes_numbers_and_shares():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 3, 4, 1])
    shares = torch.full((4, 5), 0.1 / 5).scatter_(1, labels[:, None], 0.9 + 0.1 / 5)
    assert losses.cross_entropy(logits, labels, 0.1) == pytest.approx(float(losses.cross_entropy(logits, shares)))
    expected = -(shares * logits.log_softmax(-1)).sum(-1).mean()
    assert losses.cross_entropy(logits, shares) == pytest.approx(float(expected))


def test_logit_distillation_is_the_divergence_from_the_teacher():
    student, teacher = torch.randn(2, 4, 5).unbind(0)
    p = teacher.softmax(-1)
    expected = (p * (p.log() - student.log_softmax(-1))).sum(-1).mean()
    assert losses.logit_distillation(student, teacher) == pytest.approx(float(expected))
    assert losses.logit_distillation(teacher, teacher) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk_bytes", [2**26, 4096])
def test_attention_reconstruction_in_whole_or_in_chunks(monkeypatch, chunk_bytes, biased):
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk_bytes)
    predictor, q, k, tiling = setting()
    bias = torch.randn(1, 3, 65, 65) if biased else torch.zeros(1, 3, 65, 65)
    loss = losses.attention_reconstruction(predictor, q, k, q, k, tiling, 0.25, bias if biased else None)
    attention = (q @ k.transpose(-1, -2) * 0.25 + bias).softmax(-1)[:, :, 1:].detach()
    expected = (scores_of(predictor, q.detach(), k.detach(), tiling) - attention).square().sum() / 2
    assert torch.allclose(loss, expected, rtol=1e-5)
    got = torch.autograd.grad(loss, list(predictor.parameters()))
    want = torch.autograd.grad(expected, list(predictor.parameters()))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_gradient_of_the_predictors_losses_reaches_queries_and_keys():
    predictor, q, k, tiling = setting(score_threshold=0.1)
    total = losses.attention_reconstruction(predictor, q, k, q, k, tiling, 0.25)
    total = total + losses.least_scores(predictor, q, k, tiling) + losses.kept_ratio(predictor, q, k, tiling)
    total.backward()
    assert q.grad is None
    assert k.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in predictor.parameters())


def test_least_scores_and_basis_size():
    predictor, q, k, tiling = setting()
    rows = scores_of(predictor, q, k, tiling).sort(dim=-1).values
    kept = -(-65 // 4)
    assert torch.allclose(losses.least_scores(predictor, q, k, tiling), rows[..., : 65 - kept].abs().mean(), rtol=1e-5)
    assert losses.basis_size(predictor).item() == pytest.approx(predictor.w_up.abs().mean().item())


def test_least_scores_spare_what_is_kept_of_a_pruned_image_and_the_prefix():
    predictor, q, k, _ = setting()
    positions = torch.arange(0, 64, 4).expand(2, -1)
    tiling = SubsetTiling.of(positions, (8, 8), (1, 1), 1, 17)  # 17 of 65 tokens are left, and as many are kept
    assert losses.least_scores(predictor, q[:, :, :17], k[:, :, :17], tiling) == 0
    predictor, q, k, tiling = setting(keep_prefix=True)
    rows = scores_of(predictor, q, k, tiling)[..., 1:].sort(dim=-1).values
    assert torch.allclose(losses.least_scores(predictor, q, k, tiling), rows[..., :48].abs().mean(), rtol=1e-5)


def test_the_ratio_loss_drives_the_kept_share_to_the_keep_rate():
    predictor, q, k, tiling = setting(score_threshold=0.1)

    def share():
        return float((scores_of(predictor, q, k, tiling) > 0.1).float().mean())

    before = abs(share() - 0.25)
    optimizer = torch.optim.Adam(predictor.parameters(), 0.02)
    for _ in range(30):
        losses.kept_ratio(predictor, q, k, tiling).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(share() - 0.25) < before / 3


def test_a_teacher_gets_the_images_as_its_own_weights_expect_them(tiny_vit, images):
    student = tiny_vit("vit_tiny_patch16_224")  # mean and deviation 0.5
    teacher = tiny_vit("deit_tiny_patch16_224")  # those of ImageNet
    pictures, seen = images(2, 3, 32, 32).sigmoid(), []
    teacher.patch_embed.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    Objective(student, teacher, {"kl": 1.0})((pictures - 0.5) / 0.5, None)
    assert torch.allclose(seen[-1], (pictures - mean) / std, atol=1e-6)
    x = images(2, 3, 32, 32)
    Objective(teacher, teacher, {"kl": 1.0})(x, None)
    assert torch.equal(seen[-1], x)


@pytest.mark.parametrize("loss", ["attn_recon", "attn_self_distill", "least_k"])
def test_under_autocast_the_whole_predictor_learns_from_its_scores(loss, tiny_vit, images):
    """Also where the choice of keys has used the same weights without gradients, in the same region."""
    teacher = tiny_vit(depth=1)
    student = sparsifiner.sparsify(teacher, SparsifinerConfig.paper(0.3)).train()
    enter_phase(student, PhaseConfig("joint", steps=1))
    objective = Objective(student, teacher, {"ce": 1.0, loss: 1.0})
    x, y = images(2, 3, 32, 32), torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = objective(x, y)
    total.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters() if ".predictor." in name}
    assert gradients
    half = {name for name, gradient in gradients.items() if gradient is None or not gradient.abs().max() > 0}
    assert not half, half


def test_the_objective_adds_the_weighted_parts(tiny_vit, images):
    teacher = tiny_vit()
    student = sparsifiner.sparsify(teacher, SparsifinerConfig.paper(0.3))
    weights = {"ce": 1.0, "kl": 0.5, "token_mse": 0.25, "attn_recon": 0.1, "attn_self_distill": 0.2, "l1_basis": 3.0}
    objective = Objective(student, teacher, weights, 0.1)
    x, y = images(2, 3, 32, 32), torch.tensor([1, 5])
    total, parts = objective(x, y)
    assert parts.keys() == weights.keys()
    assert total.item() == pytest.approx(sum(weights[name] * parts[name].item() for name in weights), rel=1e-5)
    with torch.no_grad():
        features = teacher.forward_features(x)
        mine = student.forward_features(x)
    assert parts["token_mse"].item() == pytest.approx(float((features - mine)[:, 1:].square().mean()), rel=1e-3)
    layers = []
    with sparsifiner.record(student, tensors=True) as seen, torch.no_grad():
        student(x)
        for path, layer in sparsifiner.sparse_layers(student).items():
            q, k = seen[path].q, seen[path].k
            tiling = layer.tiling(q.shape[2])
            layers.append(losses.attention_reconstruction(layer.predictor, q, k, q, k, tiling, layer.scale).item())
    assert parts["attn_self_distill"].item() == pytest.approx(sum(layers) / 2, rel=1e-4)  # the mean over the layers
    # In the first layer the student still sees what the teacher sees; later its own, disturbed, tokens.
    assert parts["attn_recon"] != parts["attn_self_distill"]


def test_the_reconstruction_phase_runs_dense_and_trains_the_predictor_alone(tiny_vit, images):
    dense = tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5)
    student = sparsifiner.sparsify(dense, SparsifinerConfig.paper(0.1))
    enter_phase(student, PhaseConfig("attn_recon", steps=1))
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(student(x), dense(x), atol=1e-5)
    objective = Objective(student, None, {"attn_recon": 1.0})
    objective(x, None)[0].backward()
    got = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert got == {name for name, _ in student.named_parameters() if ".predictor." in name}


def reconstruction_of(student, x, attention):
    """The squared error of the first layer's scores for two images, whose attention is to be ``attention``."""
    layer = student.blocks[0].attn
    with sparsifiner.record(student, tensors=True) as own:
        student(x)
    q, k = own["blocks.0.attn"].q, own["blocks.0.attn"].k
    scores = scores_of(layer.predictor, q, k, layer.tiling(q.shape[2]))
    return (scores - attention[:, :, 1:]).square().sum() / 2


@pytest.mark.parametrize("taught", [False, True])
def test_the_attention_to_imitate_has_the_models_biases(images, taught):
    dense = lively(timm.create_model("beit_base_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=1))
    x = images(2, 3, 64, 64)
    attention = attention_of(dense, x)
    student = sparsifiner.sparsify(dense, SparsifinerConfig.paper(0.2))
    enter_phase(student, PhaseConfig("attn_recon", steps=1))
    expected = reconstruction_of(student, x, attention)
    _, parts = Objective(student, dense if taught else None, {"attn_recon": 1.0})(x, None)
    assert parts["attn_recon"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"predictor": "lowrank", "n_down": 8}])
def test_gradients_flow_through_sparse_attention_to_every_backbone_weight(tiny_vit, images, changes):
    student = sparsifiner.sparsify(tiny_vit(), SparsifinerConfig.from_dict({"keep_rate": 0.2, **changes}))
    enter_phase(student, PhaseConfig("cls", steps=1))
    Objective(student, None, {"ce": 1.0})(images(2, 3, 32, 32), torch.tensor([0, 1]))[0].backward()
    for name, parameter in student.named_parameters():
        if ".predictor." in name:
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_a_teacher_of_wider_heads_has_its_own_scale(tiny_vit, images):
    teacher = tiny_vit(embed_dim=96, depth=1)
    student = sparsifiner.sparsify(tiny_vit(depth=1), SparsifinerConfig.paper(0.3))
    x = images(2, 3, 32, 32)
    attention = attention_of(teacher, x)
    expected = reconstruction_of(student, x, attention)
    _, parts = Objective(student, teacher, {"attn_recon": 1.0})(x, None)
    assert parts["attn_recon"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_teacher_of_another_kind_is_refused_in_one_line(tiny_vit, images):
    student = sparsifiner.sparsify(tiny_vit(), SparsifinerConfig.paper(0.3))
    x = images(1, 3, 32, 32)
    for teacher, weights, words in [
        (tiny_vit(num_classes=3), {"kl": 1.0}, r"logits have shape \[1, 3\]"),
        (tiny_vit(embed_dim=96), {"token_mse": 1.0}, "patch tokens have shape"),
        (tiny_vit(depth=3), {"attn_recon": 1.0}, "as many attention layers"),
        (tiny_vit(num_heads=6), {"attn_recon": 1.0}, "heads and tokens"),
    ]:
        with pytest.raises(ValueError, match=words):
            Objective(student, teacher, weights)(x, None)


class Largest(TorchDispatchMode):
    """The largest square any tensor holds in two of its dimensions, forward and backward."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.found = tokens, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and sum(side >= self.tokens for side in leaf.shape) >= 2:
                self.found.append((str(func), tuple(leaf.shape)))
        return out


@pytest.mark.parametrize("predictor", ["pooled", "lowrank"])
def test_training_with_tiles_never_makes_a_tensor_of_tokens_by_tokens(predictor, images):
    # 257 tokens; no other dimension of the model or the batch comes near.
    dense = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=3
    )
    student = sparsifiner.sparsify(dense, SparsifinerConfig(0.1, predictor=LowRankConfig(n_down=8)))
    enter_phase(student, PhaseConfig("cls_distill", steps=1))
    objective = Objective(student, dense, {"ce": 1.0, "kl": 0.5, "token_mse": 0.5})
    with Largest(256) as seen:
        objective(images(2, 3, 64, 64), torch.tensor([0, 2]))[0].backward()
    assert not seen.found
    enter_phase(student, PhaseConfig("cls", steps=1))
    with Largest(256) as seen:  # the same watch does see dense attention
        attention = torch.randn(1, 257, 8) @ torch.randn(1, 8, 257)
        assert attention.shape == (1, 257, 257)
    assert seen.found


def test_the_papers_method_keeps_no_tensor_of_tokens_by_tokens_for_the_backward_pass(images):
    dense = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=3
    )
    student = sparsifiner.sparsify(dense, SparsifinerConfig.paper(0.1))
    enter_phase(student, PhaseConfig("cls_distill", steps=1))
    kept = []

    def note(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        Objective(student, dense, {"kl": 0.5, "token_mse": 0.5})(images(2, 3, 64, 64), None)[0].backward()
    assert kept
    assert not [shape for shape in kept if sum(side >= 256 for side in shape) >= 2]
