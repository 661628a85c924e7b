"""Weights that materialize() makes from a small code: which they are, their scale, and numbers that follow from a seed.

All are made once per optimizer step, in full fp32, so that they are the same to rounding on every device.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.layers import CausalSelfAttention, LanguageModel, ModelConfig, control, full_precision
from architectures.time_index import layer_of

WRITERS = ("mixer.out", "mlp.down")  # begin at zero, so that every block begins by passing on what it gets


@dataclass
class GeneratedConfig(ModelConfig):
    """A config whose model stores something else in place of the six matrices of every block."""

    def axes(self) -> dict[str, tuple[str, str]]:
        """What the rows and what the columns of each matrix of a block stand for."""
        attention = {name: (name, "model") for name in ("query", "key", "value")} | {"out": ("model", "query")}
        attention = {f"mixer.{name}": sides for name, sides in attention.items()}
        return attention | {"mlp.up": ("hidden", "model"), "mlp.down": ("model", "hidden")}

    def axis_sizes(self) -> dict[str, int]:
        kv_dim = self.num_kv_heads * self.head_dim
        sizes = {"model": self.model_dim, "query": self.model_dim, "key": kv_dim, "value": kv_dim}
        return sizes | {"hidden": self.mlp_mult * self.model_dim}

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the matrices of a block by name, in the order of its forward pass."""
        sizes = self.axis_sizes()
        return {name: (sizes[rows], sizes[columns]) for name, (rows, columns) in self.axes().items()}

    def generated(self) -> dict[str, tuple[int, int]]:
        """Those of `matrices` that are generated."""
        return self.matrices()

    def num_generated(self) -> int:
        """How many weights are generated."""
        return self.num_layers * sum(rows * columns for rows, columns in self.generated().values())

    def kept_params(self) -> int:
        """Parameters that stay as they are in gpt: embedding, scales, mixes and gains."""
        return ModelConfig.num_params(self) - self.num_generated()


def usual_std(columns: int) -> float:
    """The standard deviation with which nn.Linear starts a matrix of so many columns."""
    return (3 * columns) ** -0.5


class GeneratedStack(LanguageModel):
    """The stack of gpt, with matrices of all blocks left to `generate`."""

    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)

    def make_blocks(self) -> nn.ModuleList:
        names = [f"{name}.weight" for name in self.config.generated()]
        return nn.ModuleList(layer_of(self.make_block(i), names) for i in range(self.config.num_layers))

    def generate(self) -> dict[str, Tensor]:
        """Every generated matrix of the block, by name, for all layers: (L, rows, columns)."""
        raise NotImplementedError(f"{type(self).__module__} must define generate")

    def materialize(self) -> dict[str, Tensor]:
        with full_precision():
            made = {name: stack.unbind() for name, stack in self.generate().items()}
        return {f"blocks.{i}.{name}.weight": w for name, layers in made.items() for i, w in enumerate(layers)}


class Scale(nn.Module):
    """Brings generated matrices to the usual scale, times a learned gain per layer and matrix that is 0 for writers."""

    def __init__(self, config: GeneratedConfig):
        super().__init__()
        self.columns = [columns for _, columns in config.matrices().values()]
        gains = torch.tensor([0.0 if name in WRITERS else 1.0 for name in config.matrices()])
        self.gains = control(nn.Parameter(gains.repeat(config.num_layers, 1)))  # (L, 6)

    def forward(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """The matrices (L, rows, columns), whatever their scale, at `usual_std` times their gains."""
        scaled = {}
        for (name, stack), columns, gain in zip(made.items(), self.columns, self.gains.T, strict=True):
            scaled[name] = F.rms_norm(stack, stack.shape[1:]) * (gain * usual_std(columns))[:, None, None]
        return scaled


def hashed(seed: int, stream: int, count: int) -> np.ndarray:
    """`count` 64-bit words that depend on seed and stream alone (SplitMix64, Steele et al. 2014,
    https://doi.org/10.1145/2660193.2660195): integer arithmetic, hence the same on every machine."""

    def mixed(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    start = mixed(mixed(np.array([seed % 2**64], dtype=np.uint64)) + np.array([stream], dtype=np.uint64))
    return mixed(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def hashed_uniform(seed: int, stream: int, *shape: int) -> Tensor:
    """fp32 numbers of mean 0 and variance 1, uniform, that follow from seed and stream."""
    words = hashed(seed, stream, math.prod(shape)) >> np.uint64(40)  # 24 bits: an fp32 holds them exactly
    centred = torch.from_numpy(words.astype(np.int32)).float() * 2**-23 - (1 - 2**-24)
    return (centred * 3**0.5).view(shape)


def hashed_signs(seed: int, stream: int, *shape: int) -> Tensor:
    """int8 signs, -1 or 1, that follow from seed and stream."""
    count = math.prod(shape)
    octets = hashed(seed, stream, -(-count // 64)).astype("<u8").view(np.uint8)
    bits = np.unpackbits(octets, count=count, bitorder="little").astype(np.int8)
    return torch.from_numpy(2 * bits - 1).view(shape)


def hadamard_matrix(size: int) -> Tensor:
    """The Walsh-Hadamard matrix of a power of two, scaled to be orthogonal: (size, size)."""
    H = torch.ones(1, 1)
    while len(H) < size:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / size**0.5
