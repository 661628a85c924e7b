"""Weights shared over depth, and the time index that tells the layers apart.

Layer i of L stands at time t = (i + 1) / L. Letters as in layers.py, and: L layers, E time embedding dim, R rank.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.layers import LanguageModel, ModelConfig, control, rms_norm

FEATURES = ("fourier", "legendre", "table", "const", "shuffle", "repo", "free", "none")


def one_of(config: ModelConfig, name: str, choices: Iterable[str]) -> None:
    """Stop on a value that is none of the choices."""
    if getattr(config, name) not in choices:
        raise ValueError(f"{name.upper()}={getattr(config, name)} must be one of {', '.join(choices)}")


@dataclass
class SharedConfig(ModelConfig):
    """Which block serves which layer."""

    ti_blocks: int | None = field(default=3, metadata={"other": 1})  # distinct blocks; None = one per layer
    ti_order: str = field(default="seq", metadata={"other": "cycle"})  # neighbours share a block, or blocks alternate
    unet_skips: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "ti_order", ("seq", "cycle"))
        if self.ti_blocks is not None and self.ti_blocks < 1:
            raise ValueError(f"TI_BLOCKS={self.ti_blocks} must be at least 1, or none for one per layer")

    @property
    def num_blocks(self) -> int:
        return min(self.ti_blocks or self.num_layers, self.num_layers)

    def block_of(self, layer_idx: int) -> int:
        """The number of the block that serves a layer."""
        cycle = self.ti_order == "cycle"
        return layer_idx % self.num_blocks if cycle else layer_idx * self.num_blocks // self.num_layers

    def num_params(self) -> int:
        skips = self.num_layers // 2 * self.model_dim if self.unet_skips else 0
        return self.embed_params() + self.num_blocks * self.block_params() + skips


@dataclass
class TimeConfig(ModelConfig):
    """What a function of time is made of."""

    env_prefix: ClassVar[str] = "TI_"

    # fourier, legendre: smooth in t; table: a free embedding per layer; const: t = 0 in every layer; shuffle: fourier
    # with the layers' times exchanged; repo: the published study's; free: a value per layer and gate; none: no time
    ti_feat: str = field(default="fourier", metadata={"other": "table"})
    ti_freqs: int = 6  # frequencies, or the degree of the polynomials
    ti_embed_dim: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "ti_feat", FEATURES)
        for name in ("ti_freqs", "ti_embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")

    def time_params(self, num_outputs: int, num_twins: int) -> int:
        """Parameters of a TimeNet."""
        E, L = self.ti_embed_dim, self.num_layers
        if self.ti_feat == "free":
            return L * num_outputs
        features = time_features(torch.zeros(1), self.ti_feat, self.ti_freqs).size(-1)
        return num_twins * (num_outputs * E + (L * E if self.ti_feat == "table" else E * features + E * E))


def time_features(t: Tensor, feat: str, num_freqs: int) -> Tensor:
    """The fixed features of times t (L,): (L, S)."""
    k = torch.arange(num_freqs + 1, device=t.device)
    if feat == "const":
        t = torch.zeros_like(t)
    if feat == "shuffle":
        t = t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0)).to(t.device)]
    if feat == "legendre":
        polynomials, u = [torch.ones_like(t), 2 * t - 1], 2 * t - 1
        for n in range(1, num_freqs):
            polynomials.append(((2 * n + 1) * u * polynomials[n] - n * polynomials[n - 1]) / (n + 1))
        return torch.stack(polynomials, dim=-1)
    angles = math.pi * t[:, None] * k
    if feat == "repo":  # fast phases: neighbouring layers are as unlike as distant ones
        angles = 1000 * t[:, None] * 10_000.0 ** (-k[:-1] / num_freqs)
        return torch.cat((t[:, None], angles.sin(), angles.cos()), dim=-1)
    return torch.cat((t[:, None], angles[:, 1:].sin(), angles.cos()), dim=-1)


class TimeNet(nn.Module):
    """A small network from a layer's time to num_outputs numbers, fp32: W n(U silu(V features(t))), n the RMS norm.

    With twins it is the difference of two such networks that begin equal: zero at first, and yet every weight of it
    has a gradient (Chizat et al. 2019, https://arxiv.org/abs/1812.07956). Weights are stored larger than they act, so
    that Adam, whose steps are as large for every weight, moves an output no faster than any other control tensor.
    """

    def __init__(self, config: TimeConfig, num_outputs: int, twins: bool):
        super().__init__()
        self.config, E, L = config, config.ti_embed_dim, config.num_layers
        self.gain = 0.5 / E if twins else 0.25 / E**0.5

        def weight(*shape: int, std: float) -> nn.Parameter:
            value = std * torch.randn(shape)
            return control(nn.Parameter(torch.stack((value, value)) if twins else value[None]))

        if config.ti_feat == "free":
            self.free = control(nn.Parameter(torch.zeros(L, num_outputs) if twins else torch.randn(L, num_outputs)))
            return
        if config.ti_feat == "table":
            self.table = weight(L, E, std=4.0)
        else:
            features = time_features(torch.zeros(1), config.ti_feat, config.ti_freqs)
            self.hidden = weight(E, features.size(-1), std=4.0)
            self.embed = weight(E, E, std=4.0)
        self.head = weight(num_outputs, E, std=1.0 if twins else 4.0)

    def branch(self, t: Tensor, twin: int) -> Tensor:
        """One network's outputs at times t, (L, num_outputs)."""
        if self.config.ti_feat == "table":
            embedded = self.table[twin]
        else:
            features = rms_norm(time_features(t, self.config.ti_feat, self.config.ti_freqs))
            hidden = F.linear(features, self.hidden[twin]) * (0.25 / features.size(-1) ** 0.5)
            embedded = F.linear(F.silu(hidden), self.embed[twin])
        return self.gain * F.linear(rms_norm(embedded), self.head[twin])

    def forward(self, t: Tensor) -> Tensor:
        """(L, num_outputs) of times t (L,)."""
        if self.config.ti_feat == "free":
            return self.free
        first = self.branch(t, 0)
        return first - self.branch(t, 1) if len(self.head) == 2 else first


def layer_of(block: nn.Module, generated: Iterable[str]) -> nn.Module:
    """A copy of block that holds the very same tensors, but for those named: buffers for materialize() to fill."""
    layer = copy.deepcopy(block, {id(t): t for t in [*block.parameters(), *block.buffers()]})
    for name in generated:
        module, _, leaf = name.rpartition(".")
        owner = layer.get_submodule(module)
        value = getattr(owner, leaf).detach().clone()
        delattr(owner, leaf)
        owner.register_buffer(leaf, value, persistent=False)
    return layer


class SharedStack(LanguageModel):
    """A stack in which a few blocks serve all layers."""

    def make_blocks(self) -> nn.ModuleList:
        config = self.config
        shared = [self.make_block(g) for g in range(config.num_blocks)]
        return nn.ModuleList(shared[config.block_of(i)] for i in range(config.num_layers))

    @property
    def num_skips(self) -> int:
        return self.config.num_layers // 2 if self.config.unet_skips else 0


class TimeIndexed(LanguageModel):
    """A stack with a TimeNet, `time`, which the artifact leaves out: what it makes of each layer's time is stored."""

    def __init__(self, config: TimeConfig):
        super().__init__(config)
        self.time: TimeNet | None = None

    def times(self) -> Tensor:
        """The time of every layer, (L,)."""
        L = self.config.num_layers
        return torch.arange(1, L + 1, device=self.embed.weight.device) / L

    @torch.no_grad()
    def folded(self) -> LanguageModel:
        """The same model with a number per layer in place of every output of the time network."""
        if self.time is None:
            return self
        was_training = self.training
        self.eval()  # where depth is that of scoring
        small = self.rebuilt(self.folded_config(), self.state_dict() | self.folded_state())
        self.train(was_training)
        return small

    def folded_config(self, **changes) -> ModelConfig:
        """The config of the folded model; changes are those of a stack that folds more than its time network."""
        return dataclasses.replace(self.config, ti_feat="free", **changes)

    def folded_state(self) -> dict[str, Tensor]:
        """The tensors in which the folded model differs."""
        return {"time.free": self.time(self.times())}
