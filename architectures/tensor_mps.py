"""Matrix product states as a recurrence, tensor-train MLPs (Stoudenmire and Schwab 2016, https://arxiv.org/abs/1605.05775).

A state of MPS_BOND numbers h is multiplied by a matrix per token, and only its direction is kept. With n the RMS norm:
    A_t = I + r * sum_d p_td G_d,   p_t = n(P u_t) in R^MPS_PHYS       h_t = n(A_t h_{t-1})
    y_t = W (W_h h_t * silu(W_z u_t)),   u_t = n(x_t),   r a rate per row of A
so that h_t is A_t ... A_1 h_0 over its length, the state at site t of a product of matrices that do not commute (as a
language model: Miller et al. 2020, https://arxiv.org/abs/2003.01039). Attention stands in one of MPS_ATTN_EVERY layers.
Each matrix of an MLP is a tensor train of two cores (Novikov et al. 2015, https://arxiv.org/abs/1509.06569), a sum of
TT_RANK Kronecker products: W[(o1 o2), (i1 i2)] = sum_k F_k[o1, i1] S_k[o2, i2].
Differs from the papers: probabilities by softmax, not by the square of the contraction; the product is renormalised at
every site; gate, attention and MLPs. The products form a tree over time; W is put together before it is applied.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.kernels.matrix_scan import matrix_scan
from architectures.layers import MLP, Block, CausalSelfAttention, LanguageModel, Linear, ModelConfig, control, rms_norm


def two_factors(n: int) -> tuple[int, int]:
    """The two numbers whose product is n that are nearest to each other, the smaller first."""
    first = next(i for i in range(int(n**0.5), 0, -1) if n % i == 0)
    return first, n // first


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "MPS_"
    neutral: ClassVar[dict | None] = {"mps_attn_every": 1, "tt_rank": None}

    mps_bond: int = field(default=64, metadata={"other": 16})  # size of the state
    mps_phys: int = 64  # size of what the state meets of a token
    mps_attn_every: int | None = field(
        default=3, metadata={"other": 2}
    )  # attention in one of so many layers; None = none
    tt_rank: int | None = field(default=64, metadata={"other": 8})  # of the MLPs' matrices; None = no tensor train

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mps_bond", "mps_phys"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        for name, off in (("mps_attn_every", "attention in no layer"), ("tt_rank", "whole matrices")):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1, or none for {off}")

    def is_attention(self, layer_idx: int) -> bool:
        every = self.mps_attn_every
        return every is not None and layer_idx % every == every - 1

    def train_params(self, rows: int, columns: int) -> int:
        """Parameters of a matrix of an MLP."""
        (o1, o2), (i1, i2) = two_factors(rows), two_factors(columns)
        return rows * columns if self.tt_rank is None else self.tt_rank * (o1 * i1 + o2 * i2)

    def num_params(self) -> int:
        D, X, L = self.model_dim, self.mps_bond, self.num_layers
        hidden = self.mlp_mult * D
        block = self.train_params(hidden, D) + self.train_params(D, hidden) + 4 * D
        mps = self.mps_phys * (D + X * X) + 2 * X + D * X + 2 * D * D
        mixers = sum(self.attention_params() if self.is_attention(i) else mps for i in range(L))
        return self.embed_params() + L * block + mixers + L // 2 * D


class MatrixProduct(nn.Module):
    """The mixer: one matrix product state along the sequence."""

    def __init__(self, config: Config):
        super().__init__()
        D, X = config.model_dim, config.mps_bond
        self.physical = Linear(D, config.mps_phys)
        # G, a row for each of a site's numbers: Muon would move a column of X^2 rows X / sqrt(MPS_PHYS) times as far.
        self.core = nn.Parameter(torch.randn(config.mps_phys, X * X) * (config.mps_phys * X) ** -0.5)
        # Rows that turn fast and slowly: memories of a few tokens and of many.
        self.rate = control(nn.Parameter(torch.logspace(0, -2, X)))
        self.start = control(nn.Parameter(torch.ones(X)))  # h_0
        self.read = Linear(X, D)
        self.gate = Linear(D, D)
        self.out = Linear(D, D, zero_init=True)

    def matrices(self, x: Tensor) -> Tensor:
        """A of every token of x (B, T, D), fp32 (B, T, X, X)."""
        sites = rms_norm(self.physical(x))
        moves = (sites @ self.core.to(x.dtype)).float().unflatten(2, (len(self.rate), -1))
        return torch.eye(len(self.rate), device=x.device) + self.rate[:, None] * moves

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees positions up to t."""
        h = matrix_scan(self.matrices(x), self.start).to(x.dtype)  # (B, T, X)
        return self.out(self.read(h) * F.silu(self.gate(x)))


class TensorTrain(nn.Module):
    """A linear map of two cores, rows and columns in pairs of factors: a sum of `rank` Kronecker products."""

    def __init__(self, in_features: int, out_features: int, rank: int, zero_init: bool = False):
        super().__init__()
        (self.o1, self.o2), (self.i1, self.i2) = two_factors(out_features), two_factors(in_features)
        std = (3 * in_features * rank) ** -0.25  # of each core, so that the matrix starts with nn.Linear's
        self.first = nn.Parameter(torch.randn(rank, self.o1 * self.i1) * std)
        self.second = nn.Parameter(torch.randn(rank, self.o2 * self.i2) * std)
        if zero_init:
            nn.init.zeros_(self.first)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix, (o1 o2, i1 i2): a product of rank x o1 i1 x o2 i2, small beside that with the tokens."""
        pairs = (self.first.to(dtype).mT @ self.second.to(dtype)).view(self.o1, self.i1, self.o2, self.i2)
        return pairs.transpose(1, 2).reshape(self.o1 * self.o2, self.i1 * self.i2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype))


def naive_tensor_train(train: TensorTrain, x: Tensor) -> Tensor:
    """The definition, one Kronecker product after another and never the whole matrix: x (..., i1 i2)."""
    y, x = 0.0, x.unflatten(-1, (train.i1, train.i2))
    for first, second in zip(train.first, train.second, strict=True):
        y = y + first.view(train.o1, train.i1) @ x @ second.view(train.o2, train.i2).mT  # (..., o1, o2)
    return y.flatten(-2)


class TensorTrainMLP(MLP):
    """relu^2 MLP of two tensor trains."""

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        hidden = config.mlp_mult * config.model_dim
        self.up = TensorTrain(config.model_dim, hidden, config.tt_rank)
        self.down = TensorTrain(hidden, config.model_dim, config.tt_rank, zero_init=True)


class Model(LanguageModel):
    def make_mixer(self, layer_idx: int) -> nn.Module:
        return (CausalSelfAttention if self.config.is_attention(layer_idx) else MatrixProduct)(self.config)

    def make_block(self, layer_idx: int) -> nn.Module:
        block = Block(self.make_mixer(layer_idx), self.config)
        if self.config.tt_rank is not None:
            block.mlp = TensorTrainMLP(self.config)
        return block
