"""SIREN: a network of sines makes all weights from their coordinates (Sitzmann et al. 2020, https://arxiv.org/abs/2006.09661).

    W[i, j] = u(i, rows of W)^T v(j, columns of W),   u, v in R^SIREN_RANK the outputs of one network, per layer l:
    h_1 = sin(W_1 c + b_1),   h_k = sin(W_k h_k-1 + b_k),   (u; v) = W_o h_SIREN_LAYERS
The coordinates c are waves over the grid of layers, sides of matrices and indices, up to the fastest that its points
can hold. Nothing that makes weights grows with the width; SIREN_CODE > 0 adds so many learned numbers per index, shared
by layers and matrices, and SIREN_BASE=seed adds matrices that follow from a seed, uncounted.
Each matrix is brought to the usual scale times a learned gain, 0 at first for those that write to the stream.
Differs from the paper's images: one evaluation per row and column, not per weight; waves for coordinates, because
neighbouring neurons are not alike; orthogonal weights, or deep sines would make all rows alike; no factor omega in the
forward pass but a W_1 that SIREN_OMEGA makes larger at first, so that a step of the optimizer is as large in every
layer.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.generated import GeneratedConfig, GeneratedStack, Scale, hashed_uniform
from architectures.layers import Linear, control, rms_norm
from architectures.time_index import one_of

NUM_WAVES = 64
SLOWER = 3.0  # weights are stored larger than they act: a step of Muon in all layers at once would turn phases too far
WAVE_SEED, BASE_SEED = 1, 2  # of the waves' directions and of the random matrix


@dataclass
class Config(GeneratedConfig):
    env_prefix: ClassVar[str] = "SIREN_"

    siren_hidden: int = 256
    siren_layers: int = 2  # of sines; one without follows. More of them train more slowly
    siren_omega: float = 30.0  # how fast the first layer's sines begin
    siren_rank: int = field(default=192, metadata={"other": 8})
    siren_code: int = field(default=0, metadata={"other": 16})  # learned numbers per index; 0 = off
    siren_base: str = field(default="none", metadata={"other": "seed"})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "siren_base", ("none", "seed"))
        for name, least in (("siren_hidden", 1), ("siren_layers", 1), ("siren_rank", 1), ("siren_code", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least {least}")
        if self.siren_omega <= 0:
            raise ValueError(f"SIREN_OMEGA={self.siren_omega} must be above 0")

    @property
    def num_coordinates(self) -> int:
        return 2 * NUM_WAVES + self.siren_code

    def generator_params(self) -> int:
        """Parameters of the network, the codes and the gains."""
        H, R = self.siren_hidden, self.siren_rank
        network = self.num_coordinates * H + H + (self.siren_layers - 1) * (H * H + H) + H * R
        return network + self.siren_code * sum(self.axis_sizes().values()) + self.num_layers * len(self.matrices())

    def num_params(self) -> int:
        return self.kept_params() + self.generator_params()


def waves(*counts: int) -> Tensor:
    """Sines and cosines at every point of a grid: (*counts, 2 NUM_WAVES).

    A wave's phase turns by some angle in (-pi, pi) with every step along an axis, so that they reach up to the fastest
    that the points can hold, and no two points are alike (Fourier features, Tancik et al. 2020,
    https://arxiv.org/abs/2006.10739).
    """
    turns = hashed_uniform(WAVE_SEED, 0, len(counts), NUM_WAVES).double() * (math.pi / 3**0.5)
    points = torch.cartesian_prod(*(torch.arange(count).double() for count in counts))
    angles = points @ turns
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float().view(*counts, -1)


class Generator(nn.Module):
    """The network from coordinates to matrices, of no particular scale."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, H = config, config.siren_hidden
        self.sides = [(axis, size) for name in config.matrices() for axis, size in self.axes_of(name)]
        self.register_buffer("coordinates", self.fixed_coordinates(), persistent=False)
        self.codes = nn.ParameterDict()
        if config.siren_code:
            for axis, size in config.axis_sizes().items():
                self.codes[axis] = control(nn.Parameter(4 * torch.randn(size, config.siren_code)))
        inputs = [config.num_coordinates, *[H] * (config.siren_layers - 1)]
        self.layers = nn.ModuleList(Linear(n, H) for n in inputs)  # SLOWER times what acts
        # Zero: a sine of a symmetric input keeps unlike inputs unlike, one with a phase makes all outputs alike.
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(H)) for _ in inputs)
        self.out = Linear(H, config.siren_rank)
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, gain=SLOWER * 2**0.5)  # a sine's mean square is 1/2: phases of variance 1
        bound = SLOWER * config.siren_omega / 15 * (6 / config.num_coordinates) ** 0.5  # phases of deviation omega / 15
        nn.init.uniform_(self.layers[0].weight, -bound, bound)
        nn.init.orthogonal_(self.out.weight, gain=SLOWER)

    def axes_of(self, name: str) -> list[tuple[str, int]]:
        """(what it stands for, size) of the rows and of the columns of a matrix."""
        return [(axis, self.config.axis_sizes()[axis]) for axis in self.config.axes()[name]]

    def fixed_coordinates(self) -> Tensor:
        """Of every index of every side of every matrix in every layer: (L, indices, 2 NUM_WAVES)."""
        sizes = [size for _, size in self.sides]
        grid = waves(self.config.num_layers, len(sizes), max(sizes))
        return torch.cat([grid[:, side, :size] for side, size in enumerate(sizes)], dim=1)

    def forward(self) -> dict[str, Tensor]:
        """Every matrix by name, (L, rows, columns)."""
        h = self.coordinates
        if self.codes:
            codes = torch.cat([rms_norm(self.codes[axis]) for axis, _ in self.sides])
            h = torch.cat((h, codes.expand(len(h), -1, -1)), dim=-1)
        for layer, bias in zip(self.layers, self.biases, strict=True):
            h = torch.sin(layer(h) / SLOWER + bias)
        factors = iter(self.out(h).split([size for _, size in self.sides], dim=1))
        return {name: next(factors) @ next(factors).mT for name in self.config.matrices()}


class Model(GeneratedStack):
    def __init__(self, config: Config):
        super().__init__(config)
        self.generator = Generator(config)
        self.scale = Scale(config)
        if config.siren_base == "seed":
            for stream, (name, shape) in enumerate(config.matrices().items()):
                base = hashed_uniform(BASE_SEED, stream, config.num_layers, *shape)
                self.register_buffer(self.base_name(name), base, persistent=False)

    @staticmethod
    def base_name(name: str) -> str:
        return f"base_{name.replace('.', '_')}"

    def generate(self) -> dict[str, Tensor]:
        made = self.generator()
        if self.config.siren_base == "seed":
            made = {
                name: self.get_buffer(self.base_name(name)) + F.rms_norm(stack, stack.shape[1:])
                for name, stack in made.items()
            }
        return self.scale(made)
