"""Basis sharing: layers combine the vectors of a common basis (Wang et al. 2024, https://arxiv.org/abs/2410.03765).

    W_l = C_l B_g(l)    BASIS_SIDE=in: B (r x columns) reads for a group of layers, C_l (rows x r) is a layer's own
    W_l = B_g(l) C_l    out: B (rows x r) writes for the group, C_l (r x columns) is a layer's own
    W_l = B_g(l) S_l B'_g(l)    both: only the core S_l (r x r) is a layer's own
for each of the BASIS_TYPES; BASIS_GROUP neighbouring layers make a group. The other matrices are factored in the same
way with a basis of their own, so that every layer writes to the residual stream in directions of its own. Matrices are
multiplied out once per optimizer step. A matrix that its factors would not make smaller is stored as it is.
Differs from the paper: trained so from the start, where the paper factors a trained model and weighs errors by its
activations; bases begin orthonormal and what is a layer's own at random, or at 0 where gpt begins at 0.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from architectures.generated import WRITERS, GeneratedConfig, GeneratedStack, usual_std
from architectures.time_index import one_of

TYPES = {"query": "mixer.query", "key": "mixer.key", "value": "mixer.value", "out": "mixer.out"}
TYPES |= {"up": "mlp.up", "down": "mlp.down"}


@dataclass
class Config(GeneratedConfig):
    env_prefix: ClassVar[str] = "BASIS_"
    neutral: ClassVar[dict | None] = {"basis_rank": 512}  # at which no matrix of up to that width is factored

    basis_rank: int | None = field(default=None, metadata={"other": 4})  # r; None = a quarter of MODEL_DIM
    basis_side: str = field(default="in", metadata={"other": "out"})
    basis_group: int = field(default=3, metadata={"other": 1})  # layers that share a basis
    basis_types: str = field(default="query,key,value,up", metadata={"other": "query,key,value,out,up,down"})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "basis_side", ("in", "out", "both"))
        for name in ("basis_rank", "basis_group"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        if unknown := [word for word in self.basis_types.split(",") if word not in TYPES]:
            raise ValueError(f"BASIS_TYPES={self.basis_types}: {unknown[0]!r} must be one of {', '.join(TYPES)}")

    @property
    def rank(self) -> int:
        return self.basis_rank or max(1, self.model_dim // 4)

    def group_of(self, name: str) -> int:
        """How many neighbouring layers share the basis of a matrix."""
        return self.basis_group if name in [TYPES[word] for word in self.basis_types.split(",")] else 1

    def factors(self, name: str) -> dict[str, tuple[int, int, int]]:
        """Shapes of the factors of a matrix from left to right; `own` has one per layer, the others one per group.

        The leftmost is stored on its side, for Muon moves tall matrices further and a product moves by each factor.
        """
        L, r, (rows, columns) = self.num_layers, self.rank, self.matrices()[name]
        G = -(-L // self.group_of(name))
        if self.basis_side == "in":
            return {"own": (L, r, rows), "read": (G, r, columns)}
        if self.basis_side == "out":
            return {"write": (G, r, rows), "own": (L, r, columns)}
        return {"write": (G, r, rows), "own": (L, r, r), "read": (G, r, columns)}

    def factored_params(self, name: str) -> int:
        return sum(math.prod(shape) for shape in self.factors(name).values())

    def generated(self) -> dict[str, tuple[int, int]]:
        """The matrices that their factors make smaller."""
        return {
            name: (rows, columns)
            for name, (rows, columns) in self.matrices().items()
            if self.rank < min(rows, columns) and self.factored_params(name) < self.num_layers * rows * columns
        }

    def num_params(self) -> int:
        return self.kept_params() + sum(map(self.factored_params, self.generated()))


class Model(GeneratedStack):
    def __init__(self, config: Config):
        super().__init__(config)
        self.factors = nn.ParameterDict()
        for name in config.generated():
            for side, shape in config.factors(name).items():
                factor = torch.empty(shape)
                if side == "own":
                    self.start_own(name, factor)
                else:
                    for basis in factor:
                        nn.init.orthogonal_(basis)
                self.factors[self.key(name, side)] = nn.Parameter(factor)

    def start_own(self, name: str, own: Tensor) -> None:
        """Fill what is a layer's own so that the products have the usual deviation."""
        if name in WRITERS:
            own.zero_()
            return
        (rows, columns), r = self.config.matrices()[name], self.config.rank
        spread = {"in": columns / r, "out": rows / r, "both": rows * columns / r**2}[self.config.basis_side]
        bound = usual_std(columns) * (3 * spread) ** 0.5  # entries of an orthonormal basis are as small as it is long
        own.uniform_(-bound, bound)

    @staticmethod
    def key(name: str, side: str) -> str:
        return f"{name.replace('.', '_')}_{side}"

    def generate(self) -> dict[str, Tensor]:
        made = {}
        for name in self.config.generated():
            group, product = self.config.group_of(name), None
            for side in self.config.factors(name):
                factor = self.factors[self.key(name, side)]
                if side != "own":
                    factor = factor.repeat_interleave(group, dim=0)[: self.config.num_layers]
                product = factor.mT if product is None else product @ factor
            made[name] = product
        return made
