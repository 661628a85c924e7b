"""Hopfield energy descent with learned memories (Energy Transformer, Hoover et al. 2023, https://arxiv.org/abs/2302.07253).

A layer is a scalar energy per position, and HOP_STEPS steps down its exact gradient. With n the RMS norm:
    E_t(g) = -sum_h 1/b log sum_{s <= t} exp(q_ht . k_hs + b P_h g . v_hs) - sum_j m_j relu(M_j . g)^n / n
    x_t <- x_t - HOP_ALPHA dE_t/dg   at g = n(x_t)
The first term retrieves values v from the context (Ramsauer et al. 2020, https://arxiv.org/abs/2008.02217), the second
from MLP_MULT x MODEL_DIM learned memories M_j (Krotov and Hopfield 2016, https://arxiv.org/abs/1606.01164) of strength
m_j, 0 at first. What reads also writes: P^T carries what P found, and the memories are both matrices of an MLP.
Differs from the paper: the sum over pairs of tokens is an energy of each query alone. In the full sum t is also a key
of later queries, and its gradient would carry the future back to t. Where to look, q . k, is set by x at the layer's
entry and held, as keys and values are: a state that moved along its own query would trade what it knows for where it
looks. HOP_BETA near 0 weighs the context as attention does, by q . k alone. A memory may repel (m_j < 0): what attracts
adds to g only what g has already. RoPE, QK-norm, U-Net skips.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.layers import LanguageModel, Linear, ModelConfig, Rotary, causal_attention, control, rms_norm


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "HOP_"

    hop_steps: int = 1  # down each layer's energy; they cost time and no parameters
    hop_alpha: float = 0.3  # step size
    hop_beta: float = 0.1  # b sqrt(K): how much the content of a token weighs in finding it
    hop_degree: int = field(default=3, metadata={"other": 2})  # n; 3 retrieves by relu^2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hop_steps < 1:
            raise ValueError(f"HOP_STEPS={self.hop_steps} must be at least 1")
        if self.hop_degree < 2:
            raise ValueError(f"HOP_DEGREE={self.hop_degree} must be at least 2: what is retrieved is its slope")
        for name in ("hop_alpha", "hop_beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be above 0")

    def block_params(self) -> int:
        D, M = self.model_dim, self.mlp_mult * self.model_dim
        return self.attention_params() + M * D + M + 2 * D  # memories and their strengths; a pair of mixes per channel


class Energy(nn.Module):
    """A layer's energy and the way down from it, at g (B, T, D) in the `scene` of the layer's entry."""

    def __init__(self, config: Config):
        super().__init__()
        D, H, M = config.model_dim, config.num_heads, config.mlp_mult * config.model_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.num_heads, self.num_kv_heads = H, config.num_kv_heads
        self.degree, self.beta = config.hop_degree, config.hop_beta
        self.query = Linear(D, D)
        self.key = Linear(D, kv_dim)
        self.value = Linear(D, kv_dim)
        self.rotary = Rotary(config.head_dim, config.rope_base, config.train_seq_len)
        self.q_gain = control(nn.Parameter(torch.full((H,), config.qk_gain_init)))
        self.probe = Linear(D, D, zero_init=True)  # P
        self.memory = Linear(D, M)  # a memory per row
        self.strength = control(nn.Parameter(torch.zeros(M)))  # m

    def split(self, x: Tensor, num_heads: int) -> Tensor:
        """x (B, T, n) as (B, H, T, n / H)."""
        return x.unflatten(2, (num_heads, -1)).transpose(1, 2)

    def scene(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """What is held on the way down: queries (B, H, T, K); keys and values (B, H or fewer, T, 2 K)."""
        q = rms_norm(self.query(g).unflatten(2, (self.num_heads, -1)), self.q_gain[:, None])  # (B, T, H, K)
        k = rms_norm(self.key(g).unflatten(2, (self.num_kv_heads, -1)))
        v = self.split(self.value(g), self.num_kv_heads)
        return self.rotary(q).transpose(1, 2), torch.cat((self.rotary(k).transpose(1, 2), v), dim=-1)

    def forward(self, g: Tensor, scene: tuple[Tensor, Tensor]) -> Tensor:
        """The energy of each position, (B, T). It depends on g at that position and on the scene up to it."""
        q, context = scene
        K, repeats = q.size(-1), self.num_heads // self.num_kv_heads
        k, v = context.repeat_interleave(repeats, dim=1).chunk(2, dim=-1)
        scores = (q @ k.mT + self.beta * self.split(self.probe(g), self.num_heads) @ v.mT) / K**0.5  # (B, H, T, T)
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        found = scores.masked_fill(future, -torch.inf).logsumexp(-1).sum(1) * K**0.5 / self.beta
        answers = F.relu(self.memory(g)).pow(self.degree)  # (B, T, M)
        return -found - answers @ self.strength / self.degree

    def descent(self, g: Tensor, scene: tuple[Tensor, Tensor]) -> Tensor:
        """-dE/dg, (B, T, D): each position's own, by the kernel of attention."""
        q, context = scene
        seen = torch.cat((q, self.beta * self.split(self.probe(g), self.num_heads)), dim=-1)  # (B, H, T, 2 K)
        found = causal_attention(2**0.5 * seen, context, context).chunk(2, dim=-1)[1]  # the kernel divides by sqrt(2 K)
        found = found.transpose(1, 2).flatten(2)  # (B, T, D)
        answers = F.relu(self.memory(g)).pow(self.degree - 1) * self.strength.to(g.dtype)  # (B, T, M)
        return found @ self.probe.weight.to(g.dtype) + answers @ self.memory.weight.to(g.dtype)


class EnergyBlock(nn.Module):
    """HOP_STEPS steps down one energy; the embedding x0 is mixed back in before them."""

    def __init__(self, config: Config):
        super().__init__()
        self.steps, self.alpha = config.hop_steps, config.hop_alpha
        self.energy = Energy(config)
        self.resid_mix = control(
            nn.Parameter(torch.stack((torch.ones(config.model_dim), torch.zeros(config.model_dim))))
        )

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """x and x0 (B, T, D) to (B, T, D); x0 is the normalised embedding."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        scene = self.energy.scene(rms_norm(x))
        for _ in range(self.steps):
            x = x + self.alpha * self.energy.descent(rms_norm(x), scene)
        return x


class Model(LanguageModel):
    def make_block(self, layer_idx: int) -> nn.Module:
        return EnergyBlock(self.config)
