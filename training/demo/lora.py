"""A low-rank update of the language model's matrices (LoRA, Hu et al. 2021)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """A frozen linear layer and its update: W x + alpha / rank * B A x (section 4.1)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B)


def add_low_rank(model: Any, rank: int, alpha: float) -> None:
    """Give every matrix of the layers of a frozen `LlamaForCausalLM` an update, which is zero."""
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(block, name, LowRankLinear(module, rank, alpha))
