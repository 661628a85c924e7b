"""gpt with the pieces that the best public records share (competition of 2026, https://github.com/openai/parameter-golf).

Each is a setting, and the published gain is small; with all off this is gpt. n is the RMS norm, h = n(x) s_l:
    LN_SCALE         s_l = 1 / sqrt(l + 1) in layer l, else 1
    LEAKY_SLOPE      W_2 leaky_relu(W_1 h)^2 with that slope below 0; 0: relu^2
    PARALLEL_LAST_N  in the last n layers MLP and attention read the same h (Wang and Komatsuzaki 2021, GPT-J)
    LANES_LAST_N     in place of that, the last n layers have a second stream z, at first x, for the MLP to read:
                     x <- x + g_00 a + g_10 m,  z <- z + g_01 a + g_11 m,  a = attention(n(x) s_l), m = MLP(n(z) s_l),
                     every g 1 at first. Skips and the embedding come into both; after the last layer x <- (x + z) / 2
                     (https://github.com/openai/parameter-golf/pull/1529)
    SKIP_GATES       a U-Net skip s comes in by x <- (1 - g) x + g w s, not x + w s; g is the sigmoid of a number per
                     channel, at first 0: half of each
    ROPE_FRACTION    of a head's numbers, four at least, are rotated; the rest knows no position
    VALUE_RESIDUAL   v_l <- a v_l + b v_0: layer 0's values (Zhou et al. 2024, https://arxiv.org/abs/2410.17897)
    XSA_LAST_N       in the last n layers y <- y - (y . v) v / |v|^2, v the token's own value: a head reads what the
                     token does not hold (exclusive self-attention, Zhai 2026, https://arxiv.org/abs/2603.09078)
    ATTN_GATE        y_h <- 2 sigmoid(w_h . h[:12]) y_h for each head (Qiu et al. 2025, https://arxiv.org/abs/2505.06708)
    SMEAR_GATE       x_t <- x_t + g sigmoid(w . x_t[:12]) x_{t-1} for embeddings, but not where a document begins
They go with MUON_ROW_NORM, MUON_WD, EMBED_WD, MIN_LR, EMA_DECAY, QUANT_BITS=6, EVAL_STRIDE and a wide MLP.
Differs from the records: in lanes their skips go to x alone and the embedding to what attention reads of it, and both
streams have a gain of their own. No recurrence (see depth_recurrence), no hashed bigrams.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.documents import BOS_ID, DocumentConfig, DocumentModel
from architectures.layers import MLP, Block, CausalSelfAttention, Rotary, control, rms_norm, scaled

GATE_INPUTS = 12  # numbers of a token that a gate reads


@dataclass
class Config(DocumentConfig):
    env_prefix: ClassVar[str] = "DOC_"
    neutral: ClassVar[dict | None] = {
        "ln_scale": False, "leaky_slope": 0.0, "parallel_last_n": 0, "rope_fraction": 1.0, "value_residual": False,
        "xsa_last_n": 0, "attn_gate": False, "smear_gate": False, "qk_gain_init": 1.5, "lanes_last_n": 0,
        "skip_gates": False,
    }  # fmt: skip

    qk_gain_init: float = 5.0
    ln_scale: bool = True
    leaky_slope: float = 0.5
    parallel_last_n: int | None = field(default=None, metadata={"other": 2})  # None = a third of the layers, or lanes
    rope_fraction: float = field(default=0.25, metadata={"other": 1.0})
    value_residual: bool = True
    xsa_last_n: int | None = field(default=None, metadata={"other": 1})  # None = all layers
    attn_gate: bool = True
    smear_gate: bool = True
    lanes_last_n: int = field(default=0, metadata={"other": 2})  # 0 = off
    skip_gates: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("leaky_slope", "rope_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be between 0 and 1")
        counts = {"PARALLEL_LAST_N": self.parallel_layers, "LANES_LAST_N": self.lanes_last_n}
        for name, count in (counts | {"XSA_LAST_N": self.xsa_layers}).items():
            if not 0 <= count <= self.num_layers:
                raise ValueError(f"{name}={count} must be between 0 and NUM_LAYERS={self.num_layers}")
        if self.lanes_last_n and self.parallel_layers:
            raise ValueError(
                f"LANES_LAST_N={self.lanes_last_n} is in place of PARALLEL_LAST_N={self.parallel_layers}: set one to 0"
            )

    @property
    def parallel_layers(self) -> int:
        if self.parallel_last_n is None:
            return 0 if self.lanes_last_n else self.num_layers // 3
        return self.parallel_last_n

    @property
    def xsa_layers(self) -> int:
        return self.num_layers if self.xsa_last_n is None else self.xsa_last_n

    @property
    def rope_dims(self) -> int:
        """Numbers of a head that are rotated, in pairs."""
        least = min(4, self.head_dim) if self.rope_fraction else 0  # of two numbers all pairs turn alike
        return max(least, 2 * round(self.rope_fraction * self.head_dim / 2))

    @property
    def gate_inputs(self) -> int:
        return min(GATE_INPUTS, self.model_dim)

    def num_params(self) -> int:
        gates = self.attn_gate * self.num_layers * self.num_heads * self.gate_inputs
        gates += self.skip_gates * (self.num_layers // 2) * self.model_dim
        residuals = self.value_residual * 2 * (self.num_layers - 1) + 4 * self.lanes_last_n
        return super().num_params() + gates + residuals + self.smear_gate * (self.gate_inputs + 1)


class PartialRotary(Rotary):
    """Rotary position of the first of a head's numbers; the rest is left as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((super().forward(x[..., : self.head_dim]), x[..., self.head_dim :]), dim=-1)


def exclude_own(y: Tensor, v: Tensor) -> Tensor:
    """What is read, y (B, H, T, K), without its part along the token's own value in v (B, H or fewer, T, K)."""
    grouped = y.unflatten(1, (v.size(1), -1))  # (B, G, H / G, T, K)
    along = F.normalize(v.float(), dim=-1).to(y.dtype)[:, :, None]
    return (grouped - (grouped * along).sum(dim=-1, keepdim=True) * along).flatten(1, 2)


class FirstValues:
    """The values of layer 0, (B, num_kv_heads, T, K), from when it has run until the last layer has."""

    now: Tensor | None = None


class StrongAttention(CausalSelfAttention):
    """Attention with the settings that concern it, of layer `layer_idx`."""

    def __init__(self, config: Config, layer_idx: int, first: FirstValues):
        super().__init__(config)
        if config.rope_dims < config.head_dim:
            self.rotary = PartialRotary(config.rope_dims, config.rope_base, config.train_seq_len)
        self.first = first if config.value_residual else None
        self.excludes = layer_idx >= config.num_layers - config.xsa_layers
        self.gate = self.value_mix = None
        if self.first and layer_idx:
            self.value_mix = control(nn.Parameter(torch.full((2,), 0.5)))
        if config.attn_gate:
            self.gate = control(nn.Parameter(torch.zeros(config.num_heads, config.gate_inputs)))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees positions up to t."""
        q, k, v = self.heads(x)
        if self.value_mix is not None:
            own, first = self.value_mix.to(v.dtype)
            v = own * v + first * self.first.now
        elif self.first:
            self.first.now = v
        y = self.attend(q, k, v)
        if self.excludes:
            y = exclude_own(y, v)
        y = y.transpose(1, 2)  # (B, T, H, K)
        if self.gate is not None:
            opened = 2 * torch.sigmoid(F.linear(x[..., : self.gate.size(1)], self.gate.to(x.dtype)))  # (B, T, H)
            y = y * opened[..., None]
        return scaled(self.out, y.reshape(x.shape), scale)


class LeakyMLP(MLP):
    """leaky_relu^2 MLP: the square of what is below 0 counts slope^2 times."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.slope = config.leaky_slope

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return scaled(self.down, F.leaky_relu(self.up(x), self.slope).square(), scale)


class StrongBlock(Block):
    """The kit's block, its branches one after the other or side by side, their input scaled down with depth."""

    def __init__(self, mixer: nn.Module, config: Config, layer_idx: int):
        super().__init__(mixer, config)
        if config.leaky_slope:
            self.mlp = LeakyMLP(config)
        self.parallel = layer_idx >= config.num_layers - config.parallel_layers
        self.input_scale = (layer_idx + 1) ** -0.5 if config.ln_scale else None

    def normed(self, x: Tensor) -> Tensor:
        """What a branch reads of x (B, T, D)."""
        return rms_norm(x) if self.input_scale is None else rms_norm(x) * self.input_scale

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """x and x0 (B, T, D) to (B, T, D); x0 is the normalised embedding."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        read = self.normed(x)
        x = x + scaled(self.mixer, read, self.mixer_scale)
        return x + scaled(self.mlp, read if self.parallel else self.normed(x), self.mlp_scale)


class LaneBlock(StrongBlock):
    """The branches side by side on two residual streams: each reads its own and writes to both."""

    def __init__(self, mixer: nn.Module, config: Config, layer_idx: int):
        super().__init__(mixer, config, layer_idx)
        self.gains = control(nn.Parameter(torch.ones(2, 2)))  # of each branch, in each stream

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """x, one stream (B, T, D) or two (2, B, T, D), and x0 (B, T, D) to (2, B, T, D)."""
        mix = self.resid_mix.to(x.dtype)
        lanes = (mix[0] * x + mix[1] * x0).expand(2, *x0.shape)
        attended = scaled(self.mixer, self.normed(lanes[0]), self.mixer_scale)
        computed = scaled(self.mlp, self.normed(lanes[1]), self.mlp_scale)
        gains = self.gains.to(x.dtype)[..., None, None, None]
        return lanes + gains[0] * attended + gains[1] * computed


class Model(DocumentModel):
    def __init__(self, config: Config):
        self.first = FirstValues()
        super().__init__(config)
        if config.smear_gate:
            self.smear = control(nn.Parameter(torch.zeros(config.gate_inputs)))
            self.smear_size = control(nn.Parameter(torch.zeros(())))  # g
        if config.skip_gates and self.num_skips:
            self.skip_gates = control(nn.Parameter(torch.zeros_like(self.skip_weights)))

    def make_attention(self, layer_idx: int) -> CausalSelfAttention:
        return StrongAttention(self.config, layer_idx, self.first)

    def make_block(self, layer_idx: int) -> nn.Module:
        in_lanes = layer_idx >= self.config.num_layers - self.config.lanes_last_n
        return (LaneBlock if in_lanes else StrongBlock)(self.make_mixer(layer_idx), self.config, layer_idx)

    def embedded(self, input_ids: Tensor) -> Tensor:
        x = super().embedded(input_ids)
        if not self.config.smear_gate:
            return x
        opened = self.smear_size * torch.sigmoid((x[..., : len(self.smear)] * self.smear).sum(-1, keepdim=True))
        opened = opened.masked_fill((input_ids == BOS_ID)[..., None], 0.0)
        return x + opened.to(x.dtype) * F.pad(x, (0, 0, 1, -1))

    def backbone(self, x: Tensor) -> Tensor:
        x = super().backbone(x)
        self.first.now = None
        return x.mean(dim=0) if self.config.lanes_last_n else x

    def join_skip(self, i: int, x: Tensor, skip: Tensor) -> Tensor:
        """x, one stream (B, T, D) or two (2, B, T, D), with a skip of one stream or of as many as x."""
        if not self.config.skip_gates:
            return super().join_skip(i, x, skip)
        return torch.lerp(x, self.skip_weights[i].to(x.dtype) * skip, torch.sigmoid(self.skip_gates[i]).to(x.dtype))
