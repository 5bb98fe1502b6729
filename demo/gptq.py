"""Rounding weights to 4 bits with error feedback (GPTQ), scales by a search for the least squared error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUP = 64  # weights that share a scale, along the input
LOW, HIGH = -8, 7
SHRINKS = 48  # candidate scales per group


def best_scale(w: Tensor, importance: Tensor) -> Tensor:
    """Scale [rows, 1] of a group w [rows, group] that minimises the error weighted by importance [group]."""
    widest = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    best = widest / HIGH
    least = torch.full_like(best, float("inf"))
    for index in range(SHRINKS):
        scale = (widest / (HIGH + 0.5) * (1.1 - 0.6 * index / SHRINKS)).half().float().clamp_min(1e-7)
        error = ((torch.clamp(torch.round(w / scale), LOW, HIGH) * scale - w).square() * importance).sum(
            1, keepdim=True
        )
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def quantize(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Integers-times-scale weights [out, in] and scales [out, in / 64].

    hessian [in, in] is the second moment of the layer's inputs. Columns are rounded one after the other, and the
    error of each is spread over the columns that are still to come.
    """
    w = weight.double().clone()
    columns = w.shape[1]
    h = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    scales = []
    rounded = torch.empty_like(w)
    for column in range(columns):
        if column % GROUP == 0:
            part = slice(column, column + GROUP)
            scales.append(best_scale(w[:, part].float(), h.diagonal()[part].float()).double())
        value = torch.clamp(torch.round(w[:, column] / scales[-1][:, 0]), LOW, HIGH) * scales[-1][:, 0]
        rounded[:, column] = value
        error = (w[:, column] - value) / upper[column, column]
        w[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
    return rounded.float(), torch.cat(scales, dim=1).float()


class Moments:
    """Collects the second moment of the inputs of some linear layers while the model runs."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self.sums = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
        self.handles = [layer.register_forward_pre_hook(self.hook(name)) for name, layer in layers.items()]

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The forward pre-hook of one layer."""

        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()  # [tokens, in]
            self.sums[name] += x.T @ x / x.shape[0]

        return collect

    def remove(self) -> None:
        """Detach the hooks."""
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def quantize_model(model: nn.Module, batches: list[Tensor], blocks: list[nn.Module]) -> dict[str, Tensor]:
    """Quantize every linear layer inside the blocks in place, block by block; returns the scales by layer name.

    batches are token ids [rows, seq]; each block sees the inputs that the already quantized ones produce.
    """
    names = {id(module): name for name, module in model.named_modules()}
    scales: dict[str, Tensor] = {}
    for block in blocks:
        inner = [module for module in block.modules() if isinstance(module, nn.Linear)]
        layers = {names[id(module)]: module for module in inner}
        moments = Moments(layers)
        for ids in batches:
            model(ids)
        moments.remove()
        for name, layer in layers.items():
            rounded, scales[name] = quantize(layer.weight, moments.sums[name] / len(batches))
            layer.weight.copy_(rounded)
    return scales
