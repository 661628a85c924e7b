"""Random adapters on seeded frozen matrices (VeRA, Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454).

Every matrix that RAND_TARGETS names is, in each layer,
    W = diag(g) R + B A,   R (m, n) from RAND_SEED,   g (m),   B (m, r),   A (r, n),   r = RAND_RANK
R costs no bytes: integer arithmetic gives it on every machine. Its numbers are uniform (RAND_BASE=uniform), signs
(sign), or signs of which each block of n rows is orthogonal where n is a power of two (hadamard), at the scale at which
nn.Linear begins. Where W writes to the residual stream g and B are 0 at first, elsewhere g is 1 and B A
random. Stored are g, A and B, r (m + n) + m numbers a matrix; W is put together once per optimizer step.
RAND_UNFREEZE=f lets the terms of the last layer train from the start, those of the one before it from f / (L - 1) of
the run on, of the first from f on.
Differs from the paper: A and B are learned, as in LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685), on a base
that was never trained, which leaves no reason to begin at R; VeRA learns two diagonals around random A and B.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from architectures.generated import (
    WRITERS,
    GeneratedConfig,
    GeneratedStack,
    hadamard_matrix,
    hashed_signs,
    hashed_uniform,
    usual_std,
)
from architectures.layers import control
from architectures.time_index import one_of

NAMES = {"query": "mixer.query", "key": "mixer.key", "value": "mixer.value", "out": "mixer.out"}
NAMES |= {"up": "mlp.up", "down": "mlp.down"}


@dataclass
class Config(GeneratedConfig):
    env_prefix: ClassVar[str] = "RAND_"

    rand_targets: str = field(default="up,down", metadata={"other": "query,up"})  # some of query,key,value,out,up,down
    rand_rank: int | None = field(default=None, metadata={"other": 3})  # r; 0 = no A and B; None = 5/16 of MODEL_DIM
    rand_diag: bool = True  # g; without it R stays as it is
    rand_base: str = field(default="hadamard", metadata={"other": "uniform"})
    rand_seed: int = 1337
    rand_unfreeze: float = field(default=0.0, metadata={"other": 0.5})  # fraction of the run; 0 = all from the start

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "rand_base", ("uniform", "sign", "hadamard"))
        chosen = self.rand_targets.split(",")
        for name in chosen:
            if name not in NAMES or chosen.count(name) > 1:
                known = f"some of {','.join(NAMES)}, each once"
                raise ValueError(f"RAND_TARGETS={self.rand_targets} must be {known}; {name!r} is not")
        if self.rank < 0:
            raise ValueError(f"RAND_RANK={self.rand_rank} must be at least 0, which is no A and B")
        if not self.rank and not self.rand_diag:
            raise ValueError("RAND_RANK=0 and RAND_DIAG=0 leave nothing to train of these matrices; set one of them")
        if not 0 <= self.rand_unfreeze <= 1:
            raise ValueError(f"RAND_UNFREEZE={self.rand_unfreeze} must be between 0 and 1")

    @property
    def rank(self) -> int:
        return 5 * self.model_dim // 16 if self.rand_rank is None else self.rand_rank

    def generated(self) -> dict[str, tuple[int, int]]:
        chosen = {NAMES[name] for name in self.rand_targets.split(",")}
        return {name: shape for name, shape in self.matrices().items() if name in chosen}

    def adapter_params(self) -> int:
        """Numbers in g, A and B."""
        each = (self.rank * (m + n) + m * self.rand_diag for m, n in self.generated().values())
        return self.num_layers * sum(each)

    def num_params(self) -> int:
        return self.kept_params() + self.adapter_params()


def random_map(kind: str, seed: int, stream: int, rows: int, columns: int) -> Tensor:
    """R (rows, columns), fp32, of `usual_std`, from seed and stream alone."""
    if kind == "uniform":
        return usual_std(columns) * hashed_uniform(seed, stream, rows, columns)
    if kind == "sign":
        return usual_std(columns) * hashed_signs(seed, stream, rows, columns)
    size = 1 << (columns - 1).bit_length()
    num_blocks = -(-rows // size)
    signs = hashed_signs(seed, stream, num_blocks, 1, size)  # of the columns, others in each block of rows
    blocks = size**0.5 * hadamard_matrix(size) * signs
    return usual_std(columns) * blocks.flatten(0, 1)[:rows, :columns]


class Adapter(nn.Module):
    """One matrix of all layers: diag(g) R + B A."""

    def __init__(self, config: Config, name: str, stream: int):
        super().__init__()
        (m, n), L, r = config.generated()[name], config.num_layers, config.rank
        maps = [random_map(config.rand_base, config.rand_seed, stream * L + i, m, n) for i in range(L)]
        self.register_buffer("base", torch.stack(maps), persistent=False)  # (L, m, n)
        self.gain = control(nn.Parameter(torch.full((L, m), float(name not in WRITERS)))) if config.rand_diag else None
        self.A = nn.Parameter(torch.empty(L, r, n).uniform_(-(n**-0.5), n**-0.5)) if r else None
        # B^T: Muon would take steps sqrt(m / r) times as long in a matrix that stands.
        self.B = nn.Parameter(torch.zeros(L, r, m)) if r else None
        if r and name not in WRITERS:
            nn.init.uniform_(self.B, -(r**-0.5), r**-0.5)

    def forward(self, frozen: int) -> Tensor:
        """The matrices (L, m, n); no gradient reaches the terms of the first `frozen` layers."""

        def held(p: Tensor) -> Tensor:
            return torch.cat((p[:frozen].detach(), p[frozen:])) if frozen else p

        made = self.base if self.gain is None else held(self.gain)[..., None] * self.base
        return made if self.A is None else made + held(self.B).mT @ held(self.A)


class Model(GeneratedStack):
    def __init__(self, config: Config):
        super().__init__(config)
        self.adapters = nn.ModuleList(Adapter(config, name, i) for i, name in enumerate(config.generated()))
        self.on_progress(0.0)

    def on_progress(self, fraction: float) -> None:
        """Weights are made outside the compiled step, so that thawing a layer changes no graph."""
        last, until = self.config.num_layers - 1, self.config.rand_unfreeze
        self.frozen = math.ceil(last * (1 - fraction / until) - 1e-9) if fraction < until else 0

    def generate(self) -> dict[str, Tensor]:
        return {name: made(self.frozen) for name, made in zip(self.config.generated(), self.adapters, strict=True)}
