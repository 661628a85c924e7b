"""Time-indexed SSM: shared attention, state-space and MLP blocks gated by depth (https://github.com/zaphrode/qkvflow).

SSM_MODE=selective, per head, as in Mamba-2 (Dao and Gu 2024, https://arxiv.org/abs/2405.21060), with u = n(x):
    S_s = exp(Delta_s A) S_{s-1} + Delta_s B_s v_s^T,   y_s = S_s^T C_s + D v_s,   out = W n(y) * silu(z)
where Delta, B, C, v, z are linear in u; B, C, v pass a short causal convolution and silu. SSM_MODE=lti:
    h_s = exp(Delta A) h_{s-1} + Delta B u_s,   y_s = C h_s + D u_s,   out = y * silu(z),   with diagonal A.
In layer i, at time t = (i + 1) / L, gates g(t), all 1 at first, multiply the matrices, A, D and, within the softplus,
exp of Delta's bias. Attention stands in every third layer only: a state-space layer must not cost more than attention.
Differs from the study: weights are shared and gated instead of made from t by a network that was 22 times larger than
what it made; selective by default; a gate and an MLP, without which the block was linear; causal attention with RoPE;
time constants spread from one token to the whole context. Differs from Mamba-2: a norm per head, before the gate.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.kernels.scan import chunked_scan, diagonal_scan
from architectures.layers import (
    MLP,
    CausalSelfAttention,
    Linear,
    control,
    inverse_softplus,
    rms_norm,
    scaled,
    short_conv,
)
from architectures.time_gates import GateConfig, Gated, GatedStack, attention_gates, mlp_gates
from architectures.time_index import SharedConfig, one_of

# Parts that read the same x stand together; each stage adds to the residual stream.
LAYOUTS = {
    "attn+ssm": (("attention",), ("ssm",)),
    "attn+ssm+mlp": (("attention",), ("ssm",), ("mlp",)),
    "ssm+mlp": (("ssm",), ("mlp",)),
    "parallel": (("attention", "ssm"), ("mlp",)),
}


@dataclass
class Config(GateConfig, SharedConfig):
    env_prefix: ClassVar[str] = "TI_"

    ssm_mode: str = field(default="selective", metadata={"other": "lti"})
    ssm_layout: str = field(default="attn+ssm+mlp", metadata={"other": "parallel"})
    ssm_attn_every: int = field(default=3, metadata={"other": 2})  # attention in one of so many layers
    ssm_gate: bool = True  # silu(z)
    d_state: int = 64  # N: per head (selective), of the layer (lti)
    d_conv: int = field(default=4, metadata={"other": 2})
    expand: int = 1  # width of v over MODEL_DIM (selective)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "ssm_mode", ("selective", "lti"))
        one_of(self, "ssm_layout", LAYOUTS)
        for name in ("ssm_attn_every", "d_state", "d_conv", "expand"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")

    @property
    def d_inner(self) -> int:
        return self.expand * self.model_dim

    def parts(self, layer_idx: int) -> list[str]:
        """What a layer is made of."""
        every = self.ssm_attn_every
        names = [name for stage in LAYOUTS[self.ssm_layout] for name in stage]
        return [name for name in names if name != "attention" or layer_idx % every == every - 1]

    def block_parts(self, block_idx: int) -> list[str]:
        """What a block is made of: everything that a layer of its needs."""
        layers = [i for i in range(self.num_layers) if self.block_of(i) == block_idx]
        return list(dict.fromkeys(name for i in layers for name in sorted(self.parts(i))))

    def gated(self, layer_idx: int) -> dict[str, Gated]:
        D, N, H, inner = self.model_dim, self.d_state, self.num_heads, self.d_inner
        selective = {
            "value.weight": Gated((inner, D), columns="ssm_in"),
            "keys.weight": Gated((2 * N, D), rows="ssm_keys", columns="ssm_in"),
            "step.weight": Gated((H, D), columns="ssm_in"),
            "dt_bias": Gated((H,), rows="ssm_dt", log=True),
            "A_log": Gated((H,), rows="ssm_A", log=True),
            "skip": Gated((H,), rows="ssm_skip"),
            "out.weight": Gated((D, inner), rows="ssm_out"),
        }
        lti = {
            "read.weight": Gated((N, D), rows="ssm_B", columns="ssm_in"),
            "dt_bias": Gated((N,), rows="ssm_dt", log=True),
            "A_log": Gated((N,), rows="ssm_A", log=True),
            "skip": Gated((D,), rows="ssm_skip"),
            "write.weight": Gated((D, N), rows="ssm_out", columns="ssm_C"),
        }
        ssm, width = (selective, inner) if self.ssm_mode == "selective" else (lti, D)
        ssm |= {"gate.weight": Gated((width, D), columns="ssm_in")} if self.ssm_gate else {}
        gated = {
            "attention": attention_gates(self, "parts.attention"),
            "ssm": {f"parts.ssm.{name}": gate for name, gate in ssm.items()},
            "mlp": mlp_gates(self, "parts.mlp"),
        }
        return {name: gate for part in self.parts(layer_idx) for name, gate in gated[part].items()}

    def num_params(self) -> int:
        D, N, H, inner = self.model_dim, self.d_state, self.num_heads, self.d_inner
        selective = 2 * D * inner + D * (2 * N + H) + (inner + 2 * N) * self.d_conv + 3 * H
        width, ssm = (inner, selective) if self.ssm_mode == "selective" else (D, 2 * D * N + 2 * N + D)
        sizes = {"attention": self.attention_params(), "mlp": 2 * self.mlp_mult * D * D}
        sizes["ssm"] = ssm + (D * width if self.ssm_gate else 0)
        blocks = [sum(sizes[part] + D for part in self.block_parts(g)) + 2 * D for g in range(self.num_blocks)]
        skips = self.num_layers // 2 * D if self.unet_skips else 0
        return self.embed_params() + sum(blocks) + skips + self.gate_params()


class SelectiveSSM(nn.Module):
    """State-space duality: per head, a decay that depends on the input and a state of d_state by head width."""

    takes_scale = True

    def __init__(self, config: Config):
        super().__init__()
        D, H, N, inner = config.model_dim, config.num_heads, config.d_state, config.d_inner
        self.num_heads = H
        self.value = Linear(D, inner)
        self.keys = Linear(D, 2 * N)  # B and C
        self.step = Linear(D, H)
        self.conv_value = control(nn.Parameter(torch.rand(inner, config.d_conv) - 0.5))
        self.conv_keys = control(nn.Parameter(torch.rand(2 * N, config.d_conv) - 0.5))
        self.dt_bias = control(nn.Parameter(inverse_softplus(torch.logspace(-1, -3, H))))
        self.A_log = control(nn.Parameter(torch.linspace(16, 1, H).log()))
        self.skip = control(nn.Parameter(torch.ones(H)))  # D
        self.gate = Linear(D, inner) if config.ssm_gate else None
        self.out = Linear(inner, D, zero_init=True)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees positions up to t."""
        v = F.silu(short_conv(self.value(x), self.conv_value)).unflatten(2, (self.num_heads, -1))  # (B, T, H, P)
        b, c = F.silu(short_conv(self.keys(x), self.conv_keys)).unsqueeze(2).chunk(2, dim=-1)  # (B, T, 1, N)
        delta = F.softplus(self.step(x).float() + self.dt_bias)  # (B, T, H)
        y = chunked_scan(c, b, v, -delta * self.A_log.exp(), delta, self.skip)
        y = rms_norm(y).flatten(2)  # each head on its own
        return scaled(self.out, y if self.gate is None else y * F.silu(self.gate(x)), scale)


class LtiSSM(nn.Module):
    """One linear time-invariant filter of d_state states, which all channels feed and read."""

    def __init__(self, config: Config):
        super().__init__()
        D, N = config.model_dim, config.d_state
        self.read = Linear(D, N)  # B
        longest = float(max(2, config.train_seq_len))
        self.dt_bias = control(nn.Parameter(inverse_softplus(1 / torch.logspace(0, 1, N, base=longest))))
        self.A_log = control(nn.Parameter(torch.zeros(N)))
        self.skip = control(nn.Parameter(torch.zeros(D)))  # D
        self.gate = Linear(D, D) if config.ssm_gate else None
        self.write = Linear(N, D, zero_init=True)  # C

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees positions up to t."""
        delta = F.softplus(self.dt_bias)  # (N)
        h = diagonal_scan(self.read(x) * delta.to(x.dtype), -delta * self.A_log.exp())  # (B, T, N)
        y = self.write(h) + self.skip.to(x.dtype) * x
        return y if self.gate is None else y * F.silu(self.gate(x))


class StagedBlock(nn.Module):
    """Pre-norm residual stages, each the sum of its parts, each part scaled per channel; x0 is mixed back in."""

    def __init__(self, parts: dict[str, nn.Module], config: Config):
        super().__init__()
        self.stages = LAYOUTS[config.ssm_layout]
        self.parts = nn.ModuleDict(parts)
        ones = torch.ones(config.model_dim)
        self.scales = nn.ParameterDict({name: control(nn.Parameter(ones.clone())) for name in parts})
        self.resid_mix = control(nn.Parameter(torch.stack((ones, torch.zeros(config.model_dim)))))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """x and x0 (B, T, D) to (B, T, D); x0 is the normalised embedding."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        for stage in self.stages:
            normed = rms_norm(x)
            for name in stage:
                if name in self.parts:
                    x = x + scaled(self.parts[name], normed, self.scales[name])
        return x


class Model(GatedStack):
    def make_block(self, layer_idx: int) -> nn.Module:
        config = self.config
        kinds = {"attention": CausalSelfAttention, "mlp": MLP}
        kinds["ssm"] = SelectiveSSM if config.ssm_mode == "selective" else LtiSSM
        return StagedBlock({name: kinds[name](config) for name in config.block_parts(layer_idx)}, config)

    def make_layer(self, layer_idx: int) -> nn.Module:
        layer = super().make_layer(layer_idx)
        for name in set(layer.parts) - set(self.config.parts(layer_idx)):
            del layer.parts[name], layer.scales[name]
        return layer
