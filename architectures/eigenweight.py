"""Eigenweight: every matrix is a learned truncated SVD (Khodak et al. 2021, https://arxiv.org/abs/2103.01720).

    W = U diag(s) V,   U rows x r,   V r x columns,   of r (rows + columns + 1) parameters in place of rows x columns
EIGEN_ATTN_RANK and EIGEN_MLP_RANK set r apart for the two. A matrix that is no smaller in factors stays as it is. W is
multiplied out once per optimizer step; where r is small, y = U (s * (V x)) runs in two thin products instead. Layers
repeat as in depth_recurrence; RECUR_REPEATS=1: none of them does.
Differs from the paper: U and V begin random and orthonormal with equal s, instead of as the SVD of a random matrix, U
at 0 where gpt begins at 0; Muon for U and V, Adam for s, in place of weight decay on the product.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.generated import GeneratedConfig
from architectures.layers import CausalSelfAttention, Linear, control, full_precision
from architectures.recurrence import RecurrenceConfig, RecurrentStack


@dataclass
class Config(RecurrenceConfig, GeneratedConfig):
    env_prefix: ClassVar[str] = "EIGEN_"
    neutral: ClassVar[dict | None] = {"eigen_rank": 512, "recur_repeats": 1}

    eigen_rank: int | None = field(default=None, metadata={"other": 4})  # r; None = a quarter of MODEL_DIM
    eigen_attn_rank: int | None = field(default=None, metadata={"other": 4})  # None = EIGEN_RANK
    eigen_mlp_rank: int | None = field(default=None, metadata={"other": 4})  # None = EIGEN_RANK

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eigen_rank", "eigen_attn_rank", "eigen_mlp_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")

    def rank(self, name: str) -> int:
        """r of a matrix of the block."""
        own = self.eigen_attn_rank if name.startswith("mixer.") else self.eigen_mlp_rank
        return own or self.eigen_rank or max(1, self.model_dim // 4)

    def factored_params(self, name: str) -> int:
        rows, columns = self.matrices()[name]
        return self.rank(name) * (rows + columns + 1)

    def generated(self) -> dict[str, tuple[int, int]]:
        """The matrices that are smaller in factors."""
        every = self.matrices().items()
        return {name: (rows, columns) for name, (rows, columns) in every if self.factored_params(name) < rows * columns}

    def merges(self, name: str) -> bool:
        """Whether W is multiplied out; else its factors run, where they take a quarter of the multiplications."""
        rows, columns = self.matrices()[name]
        return 4 * self.rank(name) * (rows + columns) > rows * columns

    def num_params(self) -> int:
        return self.kept_params() + self.num_layers * sum(map(self.factored_params, self.generated()))


class LowRank(nn.Module):
    """A linear map in factors, in place of one of the same shape that begins at zero if that does."""

    def __init__(self, linear: Linear, rank: int, merges: bool):
        super().__init__()
        (rows, columns), begins = linear.weight.shape, bool(linear.weight.any())
        # U is stored on its side: Muon moves a tall matrix further, and W would move by both factors.
        # With U at zero, not s, the first step already picks what to write.
        self.u = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, rows)) if begins else torch.zeros(rank, rows))
        self.v = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, columns)))
        usual = (rows / (3 * rank)) ** 0.5  # the mean square of all of W is then that of nn.Linear
        self.s = control(nn.Parameter(torch.full((rank,), usual)))
        self.register_buffer("weight", torch.zeros(rows, columns) if merges else None, persistent=False)

    def product(self) -> Tensor:
        """W, (rows, columns)."""
        return (self.u.T * self.s) @ self.v

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.linear(x, self.weight.to(x.dtype))
        return (F.linear(x, self.v.to(x.dtype)) * self.s.to(x.dtype)) @ self.u.to(x.dtype)


class Model(RecurrentStack):
    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)

    def make_block(self, layer_idx: int) -> nn.Module:
        block = super().make_block(layer_idx)
        for name in self.config.generated():
            owner, _, leaf = name.rpartition(".")
            linear = block.get_submodule(name)
            setattr(block.get_submodule(owner), leaf, LowRank(linear, self.config.rank(name), self.config.merges(name)))
        return block

    def materialize(self) -> dict[str, Tensor]:
        every = [(name, m) for name, m in self.named_modules() if isinstance(m, LowRank) and m.weight is not None]
        with full_precision():
            return {f"{name}.weight": m.product() for name, m in every}
