"""AdamW with weight decay on matrices only."""

from torch import nn
from torch.optim import AdamW, Optimizer

from aquilamoe.config.schema import OptimizerConfig


def build(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> Optimizer:
    """Gains and biases are not decayed; every matrix, embeddings included, is."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=learning_rate, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
