"""Neural ODE transformer whose weights are functions of time (Tong et al. 2025, https://arxiv.org/abs/2503.01329).

    x <- x + dt f(x, t_i),   f(x, t) = Attention(n(x)) + MLP(n(x)),   W(t) = W_0 + sum_k c_k(t) W_k for each matrix of f
with TONG_BASES matrices W_k and coefficients from a small network of t; TI_FEAT=legendre takes the polynomials
P_k(2t - 1) for them. All layers are made once per optimizer step. The artifact holds the bases and a few numbers per
layer, which is less than the layers themselves only while TONG_BASES < NUM_LAYERS; from there on it holds the layers.
Differs from the paper: one set of coefficients for all matrices; few bases, where the paper's outnumber the layers;
they start a tenth as large as W_0, so that f starts as one ordinary block; RMS norm without time-dependent gains.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from architectures.layers import ModelConfig, full_precision
from architectures.ode import OdeConfig, OdeStack
from architectures.time_index import TimeNet, layer_of, time_features

MATRICES = ("mixer.query", "mixer.key", "mixer.value", "mixer.out", "mlp.up", "mlp.down")


@dataclass
class Config(OdeConfig):
    tong_bases: int = field(default=6, metadata={"other": 3})  # W_0 and those that time weighs
    tong_rank: int | None = field(default=None, metadata={"other": 4})  # of W_k, k >= 1; None = full

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tong_bases", "tong_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")

    @property
    def num_timed(self) -> int:
        """How many bases time weighs."""
        return 0 if self.ti_feat == "none" else self.tong_bases - 1

    @property
    def has_network(self) -> bool:
        """Whether the coefficients are learned."""
        return self.num_timed > 0 and self.ti_feat != "legendre"

    def num_params(self) -> int:
        D, kv_dim, hidden = self.model_dim, self.num_kv_heads * self.head_dim, self.mlp_mult * self.model_dim
        shapes = [(D, D), (kv_dim, D), (kv_dim, D), (D, D), (hidden, D), (D, hidden)]
        base = sum(self.tong_rank * (m + n) if self.tong_rank else m * n for m, n in shapes)
        network = self.time_params(self.num_timed, num_twins=1) if self.has_network else 0
        return super().num_params() + self.num_timed * base + network


class Model(OdeStack):
    def __init__(self, config: Config):
        super().__init__(config)
        if config.has_network:
            self.time = TimeNet(config, config.num_timed, twins=False)

    def make_blocks(self) -> nn.ModuleList:
        slope, E, R = self.make_block(0), self.config.num_timed, self.config.tong_rank
        self.bases = nn.ParameterDict()
        for name in MATRICES:
            weight, key = slope.get_submodule(name).weight.detach(), name.replace(".", "_")
            rows, columns = weight.shape
            scale = 0.1 * weight.std() / max(1, E) ** 0.5  # 0 for the projections that start at 0
            if R is None or not E:
                more = scale * torch.randn(E, rows, columns)
                self.bases[key] = nn.Parameter(torch.cat((weight[None], more)))  # (E + 1, rows, columns)
            else:
                self.bases[key] = nn.Parameter(weight[None])
                # Both lie on their side: Muon would take steps sqrt(rows / R) times as long in ones that stand.
                self.bases[f"{key}_u"] = nn.Parameter(scale * columns**0.5 * torch.randn(E, R, rows) / R**0.5)
                self.bases[f"{key}_v"] = nn.Parameter(torch.randn(E, R, columns) / columns**0.5)
        generated = [f"{name}.weight" for name in MATRICES]
        return nn.ModuleList(layer_of(slope, generated) for _ in range(self.num_copies))

    def materialize(self) -> dict[str, Tensor]:
        made = {}
        with full_precision():
            weights = self.coefficients()
            for name in MATRICES:
                for i, weight in enumerate((weights @ self.stack(name).flatten(1)).unbind()):
                    made[f"blocks.{i}.{name}.weight"] = weight.view(self.blocks[0].get_submodule(name).weight.shape)
        return made

    def coefficients(self) -> Tensor:
        """c_k of every layer, (L, E + 1); c_0 is 1."""
        times = self.times()
        if self.time is not None:
            return torch.cat((torch.ones_like(times)[:, None], self.time(times)), dim=1)
        return time_features(times, "legendre", self.config.num_timed)[:, : self.config.num_timed + 1]

    def stack(self, name: str) -> Tensor:
        """The bases of a matrix, (E + 1, rows, columns)."""
        key = name.replace(".", "_")
        if f"{key}_u" not in self.bases:
            return self.bases[key]
        return torch.cat((self.bases[key], self.bases[f"{key}_u"].mT @ self.bases[f"{key}_v"]))

    @property
    def outnumbered(self) -> bool:
        """Whether there are more full bases than layers, so that the layers themselves are smaller."""
        return self.config.tong_rank is None and self.config.tong_bases > self.depth

    def folded_config(self, **changes) -> ModelConfig:
        return super().folded_config(**{"tong_bases": self.depth} if self.outnumbered else {}, **changes)

    def folded_state(self) -> dict[str, Tensor]:
        state = super().folded_state()
        if self.outnumbered:  # W_0 is the first layer, W_k what layer k + 1 adds to it
            made = self.materialize()
            for name in MATRICES:
                layers = torch.stack([made[f"blocks.{i}.{name}.weight"] for i in range(self.depth)])
                state[f"bases.{name.replace('.', '_')}"] = torch.cat((layers[:1], layers[1:] - layers[:1]))
            state["time.free"] = torch.eye(self.depth, device=layers.device)[:, 1:]
        return state
