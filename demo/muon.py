"""The optimizers: Muon for the matrices inside the layers, AdamW for the embedding and the norms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to g [batch, rows, cols], by a Newton-Schulz iteration of degree five."""
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if flip else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.transpose(1, 2) if flip else x
    return out


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for 2-D parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, decay: float) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; parameters of equal shape are orthogonalised together, each process doing its share."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            updates = [torch.zeros_like(p) for p in members]
            shapes: defaultdict[torch.Size, list[int]] = defaultdict(list)
            for index, p in enumerate(members):
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                shapes[p.shape].append(index)
            for indices in shapes.values():
                mine = indices[rank::world]
                stacked = [
                    g.lerp(self.state[members[i]]["momentum"], 0.95) for i in mine if (g := members[i].grad) is not None
                ]
                for index, update in zip(mine, orthogonalise(torch.stack(stacked)), strict=True):
                    updates[index].copy_(update)
            share(updates)
            for p, update in zip(members, updates, strict=True):
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def share(tensors: list[Tensor]) -> None:
    """Sum the tensors over all processes, in place and in one message."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def build(model: nn.Module, muon_lr: float, adam_lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """(Muon over the layers' matrices, AdamW over the rest; norms learn twice as fast)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    embedding = [p for name, p in model.named_parameters() if "embed" in name]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embedding, "lr": adam_lr}, {"params": norms, "lr": 2 * adam_lr}]
    return Muon(matrices, muon_lr, 0.95, 0.01), torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
