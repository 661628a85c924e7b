"""Universal Transformer with adaptive computation time (Dehghani et al. 2018, https://arxiv.org/abs/1807.03819).

UT_BLOCKS blocks take turns over up to L = NUM_LAYERS steps, each with an embedding e_n and a scale g_n of its own:
    s_n = s_{n-1} + g_n (f_{n mod UT_BLOCKS}(s_{n-1} + e_n) - s_{n-1}),   s_0 = n(x)
UT_ACT=1 lets each token halt (Graves 2016, https://arxiv.org/abs/1603.08983), by h_n = sigmoid(w . n(s_n) + b), and
h_n = 0 before step UT_MIN_STEPS, without which the last of the blocks would soon have nothing to do:
    N = min{n : h_1 + .. + h_n >= 1 - UT_HALT_EPS, or n = L},   R = 1 - (h_1 + .. + h_{N-1})
    out = h_1 s_1 + .. + h_{N-1} s_{N-1} + R s_N,   training loss = nats + UT_PONDER mean(N + R) / L
A token that has halted keeps its state, which later tokens still attend to; its further steps change nothing, so
scoring ends when all have halted. UT_ACT=0 takes every step and predicts from s_L.
Differs from the paper: the kit's block, which mixes s_0 back in at every step; learned step embeddings; blocks may take
turns; the cost is a fraction of L, so that its weight means the same for any L; no U-Net skips, for a token may halt
before their second half; no halting before UT_MIN_STEPS; at first, about half of the steps that are left.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from architectures.layers import CausalSelfAttention, LanguageModel, ModelConfig, control, rms_norm


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "UT_"

    num_layers: int = 12  # the most steps of a token; costs time, and parameters only for embeddings and scales
    ut_blocks: int = field(default=3, metadata={"other": 1})  # different blocks
    ut_act: bool = True
    ut_min_steps: int = field(default=3, metadata={"other": 1})  # of every token, but below NUM_LAYERS: one may be left
    ut_ponder: float = 0.01  # nats for taking every step rather than none
    ut_halt_eps: float = field(default=0.01, metadata={"other": 0.7})
    ut_step_embed: bool = True
    ut_step_scales: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ut_blocks", "ut_min_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        if self.ut_ponder < 0:
            raise ValueError(f"UT_PONDER={self.ut_ponder} must be at least 0")
        if not 0 < self.ut_halt_eps < 1:
            raise ValueError(f"UT_HALT_EPS={self.ut_halt_eps} must be above 0 and below 1")

    @property
    def num_blocks(self) -> int:
        return min(self.ut_blocks, self.num_layers)

    @property
    def min_steps(self) -> int:
        return min(self.ut_min_steps, max(1, self.num_layers - 1))

    def num_params(self) -> int:
        tables = (self.ut_step_embed + self.ut_step_scales) * self.num_layers * self.model_dim
        halting = self.model_dim + 1 if self.ut_act else 0
        return self.embed_params() + self.num_blocks * self.block_params() + tables + halting


class Model(LanguageModel):
    def __init__(self, config: Config):
        super().__init__(config)
        L, D = config.num_layers, config.model_dim
        self.step_embed = control(nn.Parameter(torch.zeros(L, D))) if config.ut_step_embed else None
        self.step_scale = control(nn.Parameter(torch.ones(L, D))) if config.ut_step_scales else None
        if config.ut_act:
            self.halt = control(nn.Parameter(torch.zeros(D)))
            self.halt_bias = control(nn.Parameter(torch.tensor([-math.log((L - config.min_steps + 1) / 2)])))
        self.spent: tuple[Tensor, Tensor] | None = None  # N and R, on their way from backbone to training_loss

    @property
    def gauge_names(self) -> tuple[str, ...]:
        """Also the mean of N: at UT_MIN_STEPS or at L, nothing is adaptive."""
        return ("nats", "ut_steps") if self.config.ut_act else ()

    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)

    def make_blocks(self) -> nn.ModuleList:
        return nn.ModuleList(self.make_block(i) for i in range(self.config.num_blocks))

    @property
    def num_skips(self) -> int:
        return 0

    def step(self, n: int, x: Tensor, x0: Tensor) -> Tensor:
        """The states after step n = 0 .. L - 1, from those before it; all (B, T, D)."""
        block = self.blocks[n % len(self.blocks)]
        y = block(x if self.step_embed is None else x + self.step_embed[n].to(x.dtype), x0)
        return y if self.step_scale is None else x + self.step_scale[n].to(x.dtype) * (y - x)

    def halting(self, x: Tensor) -> Tensor:
        """h of states x (B, T, D), fp32 (B, T, 1)."""
        # Adam moves all of w at once: unscaled, one step of it would send h from 0 to 1.
        score = rms_norm(x) @ self.halt.to(x.dtype)[:, None] / x.size(-1) ** 0.5
        return torch.sigmoid(score.float() + self.halt_bias)

    def adaptive(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(out (B, T, D), N, R, both fp32 (B, T, 1)) for s_0 = x."""
        L, x0, out = self.config.num_layers, x, torch.zeros_like(x)
        spent = torch.zeros(*x.shape[:2], 1, device=x.device)  # of a token's probability, fp32
        taken, remainder = torch.zeros_like(spent), torch.zeros_like(spent)
        running = torch.ones_like(spent, dtype=torch.bool)
        for n in range(L):
            x = torch.where(running, self.step(n, x, x0), x)
            taken = taken + running
            if n + 1 < self.config.min_steps:
                continue
            h = self.halting(x)
            ends = running & (spent + h >= 1 - self.config.ut_halt_eps) if n + 1 < L else running
            p = torch.where(ends, 1 - spent, h) * running
            out = out + p.to(x.dtype) * x
            remainder = torch.where(ends, 1 - spent, remainder)
            spent, running = spent + p, running & ~ends
            # A graph is compiled for all steps; and what trains must not wait for the device at every step.
            if not (self.training or torch.compiler.is_compiling() or running.any()):
                break
        return out, taken, remainder

    def backbone(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): the mean of the states under the halting probabilities, or the last state."""
        if self.config.ut_act:
            out, *spent = self.adaptive(x)
            self.spent = tuple(spent) if self.training else None
            return out
        x0 = x
        for n in range(self.config.num_layers):
            x = self.step(n, x, x0)
        return x

    def training_loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Mean nats, and in training the cost of the steps taken."""
        nats, spent = super().training_loss(input_ids, target_ids), self.spent
        self.spent = None
        if spent is None:
            return nats
        taken, remainder = spent
        self.show(nats, taken.mean())
        return nats + self.config.ut_ponder * (taken + remainder).mean() / self.config.num_layers
