"""Mamba-2 or other recurrent layers, hybrid with attention (Dao and Gu 2024, https://arxiv.org/abs/2405.21060).

A layer that SSM_PATTERN calls m maps x to W n(y), n the RMS norm of each head; SSM_GATE=1 gates n(y) by silu(W_z x).
v, k, q are linear in x, then a short causal convolution and silu. y by SSM_KIND, with a_t = exp(-Delta_t exp(A_log)):
    mamba2   S_t = a_t S_{t-1} + k_t (Delta_t v_t)^T,   y_t = S_t^T q_t + D v_t
    gdn      S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,   y_t = S_t^T q_t,   k_t and q_t of length 1
    s4d      h_t = exp(Delta A) h_{t-1} + B v_t,   y_t = 2 Re(C h_t) + D v_t,   A complex and diagonal: a convolution
Delta_t = softplus(w x_t + b) of a head, in s4d softplus(b) of a channel; beta_t = sigmoid(w' x_t). Gated DeltaNet: Yang
et al. 2024, https://arxiv.org/abs/2412.06464; S4D: Gu et al. 2022, https://arxiv.org/abs/2206.11893. An a layer has
attention within blocks of SSM_ATTN_WINDOW tokens, so that cost grows linearly with the text; SSM_HYBRID=parallel adds a
recurrent mixer beside it (Hymba, Dong et al. 2024, https://arxiv.org/abs/2411.13676). Where windows are scored as one
text, states go on from window to window, and attention begins anew in each.
Differs from Mamba-2: the norm is per head and before the gate; no bias in the convolution; Delta and A go from small to
large together, in equal ratios: drawn apart, they leave few heads that remember 64 tokens. gdn and s4d share the rest.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.kernels.delta import delta_rule, scan_from
from architectures.kernels.modes import held, modal_filter
from architectures.kernels.scan import chunked_scan
from architectures.layers import (
    CausalSelfAttention,
    LanguageModel,
    Linear,
    ModelConfig,
    control,
    inverse_softplus,
    rms_norm,
    scaled,
    short_conv,
)
from architectures.time_index import one_of


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "SSM_"
    neutral: ClassVar[dict | None] = {"ssm_pattern": "a"}

    ssm_kind: str = field(default="mamba2", metadata={"other": "gdn"})
    ssm_pattern: str = field(default="mmma", metadata={"other": "ma"})  # of layers, repeated: m recurrent, a attention
    ssm_hybrid: str = field(default="sequential", metadata={"other": "parallel"})
    ssm_gate: bool = False  # silu(z), for a third more weights in recurrent layers
    ssm_heads: int | None = field(default=None, metadata={"other": 2})  # of recurrent layers; EXPAND x NUM_HEADS
    ssm_groups: int | None = field(default=None, metadata={"other": 2})  # of heads with the same k, q; 1, gdn SSM_HEADS
    ssm_attn_window: int = field(default=512, metadata={"other": 32})  # tokens
    ssm_dt_min: float = 1e-3  # Delta at first, from the slowest head (s4d: channel) to the fastest
    ssm_dt_max: float = 0.1
    ssm_a_max: float = 8.0  # exp(A_log) at first, from 1 to this
    d_state: int = 64  # N: key dim of a head; of s4d, numbers that are a channel's state
    d_conv: int = field(default=4, metadata={"other": 2})
    expand: float = 1.0  # width of v over MODEL_DIM
    chunk_size: int = field(default=64, metadata={"other": 16})  # steps; Triton kernels have their own

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "ssm_kind", KINDS)
        one_of(self, "ssm_hybrid", ("sequential", "parallel"))
        sizes = ("d_state", "d_conv", "chunk_size", "heads")
        for name in ("ssm_heads", "ssm_groups", "ssm_attn_window", "ssm_a_max", *sizes):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        if not self.ssm_pattern or set(self.ssm_pattern) - set("ma"):
            raise ValueError(f"SSM_PATTERN={self.ssm_pattern} must be made of m (recurrent) and a (attention)")
        if not 0 < self.ssm_dt_min <= self.ssm_dt_max:
            raise ValueError(f"SSM_DT_MIN={self.ssm_dt_min} must be above 0, at most SSM_DT_MAX={self.ssm_dt_max}")
        if self.d_inner % self.heads or self.heads % self.groups:
            divisors = f"divide EXPAND x MODEL_DIM = {self.d_inner} and be a multiple of SSM_GROUPS={self.groups}"
            raise ValueError(f"SSM_HEADS={self.heads} must {divisors}")
        if self.ssm_kind == "s4d" and self.d_state % 2:
            raise ValueError(f"D_STATE={self.d_state} must be even: a state of s4d is made of complex numbers")

    @property
    def d_inner(self) -> int:
        return round(self.expand * self.model_dim)

    @property
    def heads(self) -> int:
        return self.ssm_heads or round(self.expand * self.num_heads)

    @property
    def groups(self) -> int:
        return self.ssm_groups or (self.heads if self.ssm_kind == "gdn" else 1)

    def mixers(self, layer_idx: int) -> str:
        """What mixes tokens in a layer: "m", "a" or "am"."""
        letter = self.ssm_pattern[layer_idx % len(self.ssm_pattern)]
        return "am" if letter == "a" and self.ssm_hybrid == "parallel" else letter

    def recurrent_params(self) -> int:
        D, H, inner, keys = self.model_dim, self.heads, self.d_inner, 2 * self.groups * self.d_state
        own = {
            "mamba2": (D + self.d_conv) * keys + D * H + 3 * H,
            "gdn": (D + self.d_conv) * keys + 2 * D * H + 2 * H,
            "s4d": inner * (1 + self.d_state) + H * self.d_state + H,
        }
        return (2 + self.ssm_gate) * D * inner + inner * self.d_conv + own[self.ssm_kind]

    def num_params(self) -> int:
        kinds = [self.mixers(i) for i in range(self.num_layers)]
        recurrent = sum("m" in kind for kind in kinds) * self.recurrent_params()
        return super().num_params() + recurrent - kinds.count("m") * self.attention_params()


def spread(low: float, high: float, num: int) -> Tensor:
    """num values from low to high in equal ratios; of one, the middle."""
    return torch.logspace(0, 1, num, base=high / low) * low if num > 1 else torch.tensor([(low * high) ** 0.5])


class Recurrent(nn.Module):
    """The convolution before and the gate after the recurrence, and what goes on from window to window.

    A kind's mix gives y, like v (B, T, H, P), and the state after it, from x (B, T, D), v, k and q (B, T, num_keys),
    and the state before, None for none.
    """

    takes_scale = True

    def __init__(self, config: Config, num_keys: int, num_rates: int, state: tuple[int, ...]):
        super().__init__()
        D, inner, self.heads, self.chunk_size = config.model_dim, config.d_inner, config.heads, config.chunk_size
        self.widths = (inner, num_keys, num_keys)
        self.inputs = Linear(D, sum(self.widths))  # v, k, q
        self.conv = control(nn.Parameter((2 * torch.rand(sum(self.widths), config.d_conv) - 1) / config.d_conv**0.5))
        self.rates = Linear(D, num_rates) if num_rates else None  # of Delta and beta
        delta = spread(config.ssm_dt_min, config.ssm_dt_max, self.heads if num_rates else inner)
        self.dt_bias = control(nn.Parameter(inverse_softplus(delta)))
        self.gate = Linear(D, inner) if config.ssm_gate else None
        self.out = Linear(inner, D, zero_init=True)
        self.carrying = False
        self.register_buffer("state", torch.zeros(state), persistent=False)
        self.register_buffer("tail", torch.zeros(config.d_conv - 1, sum(self.widths)), persistent=False)

    def short_conv(self, x: Tensor) -> Tensor:
        """Each channel of x (B, T, n) convolved with its own taps, the last of which meets the present."""
        if not self.carrying:
            return short_conv(x, self.conv)
        before = self.tail.to(x.dtype)[None]
        y = short_conv(x, self.conv, before)
        self.tail.copy_(torch.cat((before, x), dim=1)[0, x.size(1) :])
        return y

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees positions up to t and, while carrying, all rows before its own."""
        shape = x.shape
        if self.carrying:
            x = x.reshape(1, -1, shape[-1])
        v, k, q = F.silu(self.short_conv(self.inputs(x))).split(self.widths, dim=-1)
        y, state = self.mix(x, v.unflatten(2, (self.heads, -1)), k, q, self.state if self.carrying else None)
        if self.carrying:
            self.state.copy_(state)
        y = rms_norm(y).flatten(2)
        return scaled(self.out, y if self.gate is None else y * F.silu(self.gate(x)), scale).view(shape)


class Mamba2(Recurrent):
    """State-space duality: a state of d_state by head width per head, which decays and to which each step adds."""

    num_rates = 1

    def __init__(self, config: Config):
        H, N, self.groups = config.heads, config.d_state, config.groups
        super().__init__(config, self.groups * N, self.num_rates * H, (N, H, config.d_inner // H))
        self.A_log = control(nn.Parameter(spread(1.0, config.ssm_a_max, H).log()))
        self.skip = control(nn.Parameter(torch.ones(H))) if self.num_rates == 1 else None  # D

    def mix(self, x: Tensor, v: Tensor, k: Tensor, q: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        k, q = (y.unflatten(2, (self.groups, -1)) for y in (k, q))
        rates, *beta = self.rates(x).float().split(self.heads, dim=-1)
        delta = F.softplus(rates + self.dt_bias)
        return self.scan(state, q, k, v, -delta * self.A_log.exp(), delta, *beta)

    def scan(self, state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, delta: Tensor) -> tuple:
        """(y, the state after it); q, k (B, T, G, N), v (B, T, H, P), log_decay, delta fp32 (B, T, H)."""
        return scan_from(state, chunked_scan, q, k, v, log_decay, delta, skip=self.skip, chunk_size=self.chunk_size)


class DeltaNet(Mamba2):
    """Gated delta rule: each step replaces what its key recalls."""

    num_rates = 2

    def scan(self, state, q, k, v, log_decay: Tensor, delta: Tensor, beta: Tensor) -> tuple:
        q, k, beta = F.normalize(q, dim=-1), F.normalize(k, dim=-1), torch.sigmoid(beta)
        return scan_from(state, delta_rule, q, k, v, log_decay, beta, chunk_size=self.chunk_size)


class Modes(Recurrent):
    """One linear filter per channel, a sum of decaying oscillations: A per head, Delta and C per channel, B = 1."""

    def __init__(self, config: Config):
        H, M, inner = config.heads, config.d_state // 2, config.d_inner
        super().__init__(config, 0, 0, (2, inner, 1, M))
        self.A_log = control(nn.Parameter(torch.full((H, M), 0.5).log()))
        self.frequency = control(nn.Parameter(torch.pi * torch.arange(M).repeat(H, 1)))
        self.weight = control(nn.Parameter(torch.randn(2, inner, M) / 2**0.5))  # C
        self.skip = control(nn.Parameter(torch.ones(H)))  # D

    def mix(self, x: Tensor, v: Tensor, k: Tensor, q: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        poles = (y.repeat_interleave(v.size(-1), dim=0) for y in (-self.A_log.exp(), self.frequency))
        log_pole, weight = held(tuple(poles), F.softplus(self.dt_bias), tuple(self.weight))
        y, state = modal_filter(v.flatten(2).float(), log_pole, weight, state, self.chunk_size)
        return y.to(v.dtype).view_as(v) + v * self.skip.to(v.dtype)[:, None], state


KINDS = {"mamba2": Mamba2, "gdn": DeltaNet, "s4d": Modes}


class BlockAttention(CausalSelfAttention):
    """Causal attention within blocks of SSM_ATTN_WINDOW tokens."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.window = config.ssm_attn_window

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees those of its block up to t."""
        B, T, D = x.shape
        window = min(self.window, T)
        blocks = F.pad(x, (0, 0, 0, -T % window)).view(-1, window, D)
        return super().forward(blocks, scale).view(B, -1, D)[:, :T]


class Sum(nn.Module):
    """Mixers side by side, on the same input."""

    takes_scale = True

    def __init__(self, *mixers: nn.Module):
        super().__init__()
        self.mixers = nn.ModuleList(mixers)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return sum(mixer(x, scale) for mixer in self.mixers)


class Model(LanguageModel):
    def make_mixer(self, layer_idx: int) -> nn.Module:
        made = {"a": BlockAttention, "m": KINDS[self.config.ssm_kind]}
        mixers = [made[letter](self.config) for letter in self.config.mixers(layer_idx)]
        return Sum(*mixers) if len(mixers) > 1 else mixers[0]

    @property
    def recurrent(self) -> list[Recurrent]:
        return [module for module in self.modules() if isinstance(module, Recurrent)]

    @property
    def can_carry(self) -> bool:
        return bool(self.recurrent)

    def carry(self, on: bool) -> None:
        for module in self.recurrent:
            module.carrying = on
            module.state.zero_()
            module.tail.zero_()
