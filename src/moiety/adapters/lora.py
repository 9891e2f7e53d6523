"""LoRA's linear map in one product, for training: W + s B A is summed first, which peft's own layer does not."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional


class SummedLinear(Linear):
    """peft's layer, with the same weights and gradients; its three products over all rows become one.

    A trunk has more rows (nodes times components) than channels, so the sum of two small matrices costs nothing, while
    every pass over the rows does. The layer of peft acts where the sum would round small updates away (half precision),
    where ZeRO-3 has the weights in parts, and where there is more to do than plain LoRA (several active adapters, DoRA,
    dropout, biases).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or args or kwargs or not self._is_plain(active[0], x):
            return super().forward(x, *args, **kwargs)
        base, (name,) = self.base_layer, active
        update = self.lora_B[name].weight, self.lora_A[name].weight
        weight = torch.addmm(base.weight, *update, alpha=self.scaling[name])  # type: ignore[arg-type]
        return functional.linear(x, weight, base.bias)  # type: ignore[arg-type]

    def _is_plain(self, name: str, x: Tensor) -> bool:
        weights = self.base_layer.weight, self.lora_A[name].weight
        return (
            not (self.disable_adapters or self.merged or name in self.lora_variant or self.lora_bias[name])
            and isinstance(self.lora_dropout[name], nn.Identity)
            and all(w.dtype in (torch.float32, torch.float64) and not hasattr(w, "ds_id") for w in weights)
            and not torch.is_autocast_enabled(x.device.type)
        )
