"""The tiny model and the recipe that the tests of sweeps train it by."""

from sparsifiner.training.recipe_file import from_dict

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
PHASES = [
    {"name": "attn_recon", "steps": 1},
    {"name": "cls_distill", "steps": 2, "lr": 1e-3, "losses": {"ce": 1.0, "kl": 0.5}},
]
RECIPE = from_dict({"phases": PHASES, "batch_size": 4, "log_every": 1, "sparsity": {"predictor": "lowrank"}})
