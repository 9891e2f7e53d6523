"""Products over the edges of a sparse pattern, differentiable any number of times.

y_i = sum_j a_ij x_j, and s_ij = x_i . y_j on the pattern alone: the derivatives of each are the other and itself on the
transposed pattern. Neither builds a tensor of edges times features, as gathering would.
"""
# Shapes: R rows of the pattern (all copies of all nodes), P places in it, p in one copy, F features.

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def available(device: torch.device) -> bool:
    """Whether the kernels exist here: a CPU build of torch with MKL, and not while a compiler traces."""
    return device.type == "cpu" and torch.backends.mkl.is_available() and not torch.compiler.is_compiling()


@dataclass
class Pattern:
    """Places of a sparse matrix [R, R] row by row, and the same of the transposed matrix (`t_`)."""

    row_start: Tensor  # [R+1] int32
    column: Tensor  # [P] int32
    order: Tensor  # [p] place of this matrix for each place of the transposed one
    t_row_start: Tensor
    t_column: Tensor
    t_order: Tensor

    @classmethod
    def build(cls, column: Tensor, width: int, num_copies: int) -> Pattern:
        """From the columns [n * width] of n rows of equal width; the block-diagonal of `num_copies` of it."""
        n, device = len(column) // width, column.device
        copy = torch.arange(num_copies, device=device)[:, None]
        order = torch.argsort(column, stable=True)
        count = torch.bincount(column, minlength=n).repeat(num_copies)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=device)
        pattern = cls(
            row_start=torch.arange(0, n * width * num_copies + 1, width, device=device, dtype=torch.int32),
            column=(column + copy * n).flatten().int(),
            order=order,
            t_row_start=torch.cat([count.new_zeros(1), count.cumsum(0)]).int(),
            t_column=(order // width + copy * n).flatten().int(),
            t_order=inverse,
        )
        with warnings.catch_warnings():  # torch says once that its sparse matrices are in beta
            warnings.simplefilter("ignore")
            pattern.matrix(torch.zeros(len(pattern.column), device=device))
        return pattern

    @property
    def transposed(self) -> Pattern:
        return Pattern(self.t_row_start, self.t_column, self.t_order, self.row_start, self.column, self.order)

    def transpose(self, value_P: Tensor) -> Tensor:
        """Values on this pattern in the order of the transposed one."""
        return value_P.unflatten(0, (-1, len(self.order))).index_select(1, self.order).flatten()

    def matrix(self, value_P: Tensor) -> Tensor:
        size = (len(self.row_start) - 1,) * 2
        return torch.sparse_csr_tensor(self.row_start, self.column, value_P, size=size, check_invariants=False)


class SparseProduct(Function):
    """a [P] on the pattern times x [R, F]: [R, F]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, pattern: Pattern) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a, x)
        ctx.pattern = pattern
        with torch.autocast(x.device.type, enabled=False):  # a backward pass may run under another one than this did
            return pattern.matrix(a) @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        a, x = ctx.saved_tensors
        pattern = ctx.pattern
        return (
            SampledProduct.apply(grad, x, pattern) if ctx.needs_input_grad[0] else None,  # type: ignore[return-value]
            SparseProduct.apply(pattern.transpose(a), grad, pattern.transposed) if ctx.needs_input_grad[1] else None,  # type: ignore[return-value]
            None,
        )


class SampledProduct(Function):
    """x_i . y_j of x, y [R, F] at the places (i, j) of the pattern: [P]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, pattern: Pattern) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, y)
        ctx.pattern = pattern
        empty = pattern.matrix(x.new_zeros(len(pattern.column)))
        with torch.autocast(x.device.type, enabled=False):
            sampled = torch.sparse.sampled_addmm(empty, x.contiguous(), y.contiguous().T, beta=0.0)
        return sampled.values().clone()  # compilers stumble over views of sparse tensors

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        pattern = ctx.pattern
        return (
            SparseProduct.apply(grad, y, pattern) if ctx.needs_input_grad[0] else None,  # type: ignore[return-value]
            SparseProduct.apply(pattern.transpose(grad), x, pattern.transposed) if ctx.needs_input_grad[1] else None,  # type: ignore[return-value]
            None,
        )


# Compilers break their graph at it and leave it as it is.
sparse_product: Callable[[Tensor, Tensor, Pattern], Tensor] = torch.compiler.disable(
    lambda a, x, pattern: SparseProduct.apply(a, x, pattern)  # type: ignore[assignment]
)
