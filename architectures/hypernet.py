"""Hypernetwork: a small network makes all weights from codes (Ha et al. 2016, https://arxiv.org/abs/1609.09106).

With learned codes z of a layer l, a matrix type m and a tile a of HYPER_TILE x HYPER_TILE weights:
    h = n(A z_l * B z_m * C z_a),   h <- h + V silu(U n(h)),   tile = sum_k (M n(h))_k P_k,   k = 1 .. HYPER_RANK
The P_k are learned tiles that all matrices share. HYPER_MODE=lowrank makes slices of two factors instead, with a P_k
for every hidden unit, and a matrix is the product of its factors, of rank HYPER_RANK. Each matrix is then brought to
the usual scale times a learned gain, 0 at first for those that write to the residual stream. The codes of tiles belong
to a type and serve all layers, so a further layer stores a code and its gains, and the scales that every block has.
Differs from the paper: codes are multiplied, not added, so that matrices start as unlike as random ones; normalised.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.generated import GeneratedConfig, GeneratedStack, Scale
from architectures.layers import Linear, control, rms_norm
from architectures.time_index import one_of


@dataclass
class Config(GeneratedConfig):
    env_prefix: ClassVar[str] = "HYPER_"

    hyper_mode: str = field(default="tile", metadata={"other": "lowrank"})
    hyper_rank: int = 32  # shared tiles that a tile is a mixture of; lowrank: the rank of every matrix
    hyper_dim: int = 64  # numbers in a code
    hyper_hidden: int = 256
    hyper_tile: int = 64  # rows and columns of a tile; lowrank: rows of a slice of a factor

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "hyper_mode", ("tile", "lowrank"))
        for name in ("hyper_rank", "hyper_dim", "hyper_hidden", "hyper_tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")

    def grids(self) -> dict[str, tuple[int, int]]:
        """How many tiles lie under one another and side by side in each matrix; lowrank: slices of each factor."""
        return {name: (-(-m // self.hyper_tile), -(-n // self.hyper_tile)) for name, (m, n) in self.matrices().items()}

    def num_tiles(self) -> dict[str, int]:
        """How many tiles, or slices, of a layer have a code, by matrix."""
        return {name: a * b if self.hyper_mode == "tile" else a + b for name, (a, b) in self.grids().items()}

    def generator_params(self) -> int:
        """Parameters of codes, network, shared tiles and gains."""
        E, H, R, S = self.hyper_dim, self.hyper_hidden, self.hyper_rank, self.hyper_tile
        types = len(self.matrices())
        codes = (self.num_layers + types + sum(self.num_tiles().values())) * E
        tiles = H * R + R * S * S if self.hyper_mode == "tile" else H * R * S
        return codes + 3 * E * H + 2 * H * H + tiles + self.num_layers * types

    def num_params(self) -> int:
        return self.kept_params() + self.generator_params()


class Generator(nn.Module):
    """The network from codes to matrices, of no particular scale."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, E, H, R, S = config, config.hyper_dim, config.hyper_hidden, config.hyper_rank, config.hyper_tile
        self.counts = config.num_tiles()
        tiled = config.hyper_mode == "tile"

        def codes(count: int) -> nn.Parameter:
            return control(nn.Parameter(4 * torch.randn(count, E)))  # large, so that Adam turns them slowly

        self.layer_codes, self.type_codes = codes(config.num_layers), codes(len(self.counts))
        self.tile_codes = codes(sum(self.counts.values()))
        self.from_layer, self.from_type, self.from_tile = (Linear(E, H) for _ in range(3))
        self.up, self.down = Linear(H, H), Linear(H, H)
        self.mix = Linear(H, R) if tiled else None
        bound = S**-0.5
        self.shared = nn.Parameter(torch.empty(R if tiled else H, S, S if tiled else R).uniform_(-bound, bound))

    def hidden(self) -> Tensor:
        """(L, tiles of a layer, H): every tile of every layer, as the network sees it."""
        types = self.from_type(rms_norm(self.type_codes))
        types = torch.cat([row.expand(n, -1) for row, n in zip(types, self.counts.values(), strict=True)])
        h = self.from_layer(rms_norm(self.layer_codes))[:, None] * (types * self.from_tile(rms_norm(self.tile_codes)))
        h = rms_norm(h)
        return rms_norm(h + self.down(F.silu(self.up(h))))

    def forward(self) -> dict[str, Tensor]:
        """Every matrix by name, (L, rows, columns)."""
        L, S, h, made = self.config.num_layers, self.config.hyper_tile, self.hidden(), {}
        weights = h if self.mix is None else self.mix(h)  # (L, tiles, shared tiles)
        tiles = (
            (weights @ self.shared.flatten(1)).unflatten(-1, self.shared.shape[1:]).split([*self.counts.values()], 1)
        )
        for (name, (m, n)), part in zip(self.config.matrices().items(), tiles, strict=True):
            a, b = self.config.grids()[name]
            if self.mix is None:
                rows, columns = (x.flatten(1, 2) for x in part.split([a, b], 1))  # (L, a S, R) and (L, b S, R)
                made[name] = rows[:, :m] @ columns[:, :n].mT
            else:
                square = part.view(L, a, b, S, S).transpose(2, 3).reshape(L, a * S, b * S)
                made[name] = square[:, :m, :n]
        return made


class Model(GeneratedStack):
    def __init__(self, config: Config):
        super().__init__(config)
        self.generator = Generator(config)
        self.scale = Scale(config)

    def generate(self) -> dict[str, Tensor]:
        return self.scale(self.generator())
