"""Seed model: random weights moved in a random subspace of SEED_DIM dimensions (Li et al. 2018, https://arxiv.org/abs/1804.08838).

    theta = theta_0 + s P phi,   P = blocks H D_3 H D_2 H D_1 on top of one another, each as high as phi is long
theta is every weight of the stack, scales and gains included; theta_0 and the signs D, others in every block, follow
from SEED_PRNG; H is the Walsh-Hadamard matrix (P as in Fastfood, Le et al. 2013, https://arxiv.org/abs/1408.3060) and s
the usual deviation of each tensor. Blocks are orthogonal, so the columns of P are too. Only phi and the embedding are
trained and stored: 4 bytes a dimension, whatever the depth. SEED_TRAIN_EMBED=0 leaves the embedding to phi too.
Differs from the paper: signs where Fastfood has Gaussian numbers and a permutation (Yu et al. 2016,
https://arxiv.org/abs/1610.09072), a scale per tensor, and writers to the residual stream that begin at 0, as in gpt.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from architectures.generated import hadamard_matrix, hashed_signs, hashed_uniform, usual_std
from architectures.layers import CausalSelfAttention, LanguageModel, ModelConfig, full_precision, is_control

LARGEST_HADAMARD = 7  # log2 of the size up to which a transform is one matrix product
CONTROL_STEP = 0.1  # s of scales, mixes and gains


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "SEED_"

    seed_dim: int = 2048  # numbers that move the weights
    seed_prng: int = 42  # from which theta_0 and P follow; SEED is that of the data and of the embedding
    seed_scale: float = 1.0  # of theta_0's matrices over the usual scale
    seed_train_embed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.seed_dim <= self.num_generated():
            raise ValueError(
                f"SEED_DIM={self.seed_dim} must be between 1 and the {self.num_generated()} weights that it moves"
            )

    @property
    def block_size(self) -> int:
        """SEED_DIM rounded up to a power of two: the rows that P has between two sets of signs."""
        return 1 << (self.seed_dim - 1).bit_length()

    def kept_params(self) -> int:
        """Parameters that are trained as in gpt: the embedding, unless it is generated, and the untied head."""
        generated = 0 if self.seed_train_embed else self.vocab_size * self.model_dim
        return self.embed_params() - generated

    def num_generated(self) -> int:
        return ModelConfig.num_params(self) - self.kept_params()

    def num_params(self) -> int:
        return self.kept_params() + self.seed_dim


class Subspace(nn.Module):
    """P: from phi to every weight, a linear map of orthogonal columns."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.num_blocks = -(-config.num_generated() // config.block_size)
        bits, factors = config.block_size.bit_length() - 1, []
        while bits > 0:
            factors.append(min(bits, LARGEST_HADAMARD))
            bits -= factors[-1]
        self.factors = [2**n for n in factors]
        for size in set(self.factors):
            self.register_buffer(f"hadamard_{size}", hadamard_matrix(size), persistent=False)
        signs = hashed_signs(config.seed_prng, 0, 3, self.num_blocks, config.block_size)
        self.register_buffer("signs", signs, persistent=False)

    def hadamard(self, x: Tensor) -> Tensor:
        """Each row of x (N, block_size) times the orthogonal Walsh-Hadamard matrix."""
        for size in self.factors:  # H is the Kronecker product of the factors: each meets one axis and moves it last
            x = (x.view(len(x), size, -1).mT @ self.get_buffer(f"hadamard_{size}")).flatten(1)
        return x

    def forward(self, phi: Tensor) -> Tensor:
        """Every weight (num_generated,) of phi (SEED_DIM,); of as large a mean square as phi padded to block_size."""
        x = nn.functional.pad(phi, (0, self.config.block_size - len(phi)))
        for signs in self.signs:
            x = self.hadamard(signs * x)
        return x.flatten()[: self.config.num_generated()]


class Model(LanguageModel):
    def __init__(self, config: Config):
        super().__init__(config)
        every = ("blocks.", "skip_weights") if config.seed_train_embed else ("blocks.", "skip_weights", "embed.")
        moved = {name: p for name, p in self.named_parameters() if name.startswith(every)}
        start = [self.theta_0(p, stream) for stream, p in enumerate(moved.values(), start=1)]
        self.register_buffer("start", torch.cat([t.flatten() for t in start]), persistent=False)
        self.shapes = {name: p.shape for name, p in moved.items()}
        self.steps = [self.step_of(p) for p in moved.values()]
        for name in moved:
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            value = getattr(module, leaf).detach()
            delattr(module, leaf)
            module.register_buffer(leaf, value, persistent=False)
        self.subspace = Subspace(config)
        self.phi = nn.Parameter(torch.zeros(config.seed_dim))

    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)

    @property
    def embed_std(self) -> float:
        return self.config.tied_embed_init_std if self.config.tie_embeddings else 1.0

    def theta_0(self, p: nn.Parameter, stream: int) -> Tensor:
        """Where a tensor begins: as in gpt if that is not random, else as the seed says, uniform as in nn.Linear."""
        if is_control(p) or not p.any():
            return p.detach()
        std = self.embed_std if p is self.embed.weight else self.config.seed_scale * usual_std(p.size(-1))
        return std * hashed_uniform(self.config.seed_prng, stream, *p.shape)

    def step_of(self, p: nn.Parameter) -> float:
        """How far a number of phi moves a tensor's weights."""
        if is_control(p):
            return CONTROL_STEP
        return max(self.embed_std, usual_std(p.size(-1))) if p is self.embed.weight else usual_std(p.size(-1))

    def materialize(self) -> dict[str, Tensor]:
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        with full_precision():
            moves = self.subspace(self.phi).split(sizes)
        parts = zip(self.shapes.items(), self.start.split(sizes), moves, self.steps, strict=True)
        return {name: (start + step * move).view(shape) for (name, shape), start, move, step in parts}
