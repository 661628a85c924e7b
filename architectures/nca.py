"""Neural cellular automaton over tokens or over weights (Mordvintsev et al. 2020, https://distill.pub/2020/growing-ca).

NCA_MODE=state: tokens are cells, the embeddings E x their states, and one rule runs NCA_STEPS times. A cell attends to
itself and to NCA_NEIGHBOURS - 1 cells on its left (Tesfaldet et al. 2022, https://arxiv.org/abs/2211.01233), at
distances d, 2 d ...; d = 1, 2, 4 ... from step to step until a sweep spans the context, then again (NCA_DILATED=0: 1).
    s <- c0 s + c1 E x      s <- s + a Attention(n(s), n(s) at t, t - d ...)      s <- s + m W_2 relu(W_1 n(s))^2
NUM_LAYERS counts rules, which share the steps; parameters do not depend on NCA_STEPS.
NCA_MODE=weights: the matrices of gpt's NUM_LAYERS layers lie on one sheet per layer, a cell per 16 x 16 weights, which
    s_0 = n(noise + seed of layer and matrix)    s <- n(s + W_2 relu(W_1 (s, 4 neighbours, place)) / NCA_STEPS)
grows, n the RMS norm. A linear map makes a cell's tile of its last state; each matrix is scaled to a learned gain.
Stored are the rule, the map, seeds and gains, and what is no matrix; the noise follows from an integer seed.
NCA_FIRE < 1: in training a cell changes with this probability, and by as much more; in scoring all cells change.
Differs from the papers: causal; one text or network grown from a seed is the state of training, without a pool.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.generated import GeneratedConfig, GeneratedStack, Scale, hashed_signs
from architectures.layers import Block, CausalSelfAttention, Linear, ModelConfig, control, rms_norm
from architectures.time_index import one_of

TILE, CHANNELS, HIDDEN, NUM_WAVES = 16, 32, 128, 3  # of the automaton over weights
NOISE_SEED = 3


@dataclass
class Config(GeneratedConfig):
    env_prefix: ClassVar[str] = "NCA_"

    num_layers: int | None = None  # 1 rule of the automaton over tokens, or gpt's number of layers that weights are for
    nca_mode: str = field(default="state", metadata={"other": "weights"})
    nca_steps: int = 12
    nca_neighbours: int = 3  # that a token sees, itself included
    nca_dilated: bool = True
    nca_fire: float = field(default=1.0, metadata={"other": 0.5})

    def __post_init__(self) -> None:
        one_of(self, "nca_mode", ("state", "weights"))
        if self.num_layers is None:
            self.num_layers = 1 if self.nca_mode == "state" else ModelConfig.num_layers
        super().__post_init__()
        if self.nca_steps < 1:
            raise ValueError(f"NCA_STEPS={self.nca_steps} must be at least 1")
        if self.nca_mode == "state" and self.nca_steps < self.num_layers:
            raise ValueError(f"NCA_STEPS={self.nca_steps} must be at least NUM_LAYERS={self.num_layers}, one per rule")
        if self.nca_neighbours < 2:
            raise ValueError(f"NCA_NEIGHBOURS={self.nca_neighbours} must be at least 2, the cell itself and one other")
        if not 0 < self.nca_fire <= 1:
            raise ValueError(f"NCA_FIRE={self.nca_fire} must be above 0 and at most 1, which is always")

    def distance(self, step: int) -> int:
        """Between neighbours that meet in a step."""
        sweep = max(1, ((self.train_seq_len - 1) // (self.nca_neighbours - 1)).bit_length())
        return 2 ** (step % sweep) if self.nca_dilated else 1

    def num_params(self) -> int:
        if self.nca_mode == "state":
            return self.embed_params() + self.num_layers * self.block_params()
        rule = HIDDEN * (5 * CHANNELS + 4 * NUM_WAVES) + CHANNELS * HIDDEN
        seeds_and_gains = self.num_layers * len(self.matrices()) * (CHANNELS + 1)
        return self.kept_params() + rule + TILE * TILE * CHANNELS + seeds_and_gains


def fire(old: Tensor, new: Tensor, probability: float) -> Tensor:
    """Each cell's new state with this probability, overdone so that the mean is as if all fired; (..., channels)."""
    if probability == 1:
        return new
    fires = torch.rand(old.shape[:-1], device=old.device)[..., None] < probability
    return old + (new - old) * (fires / probability).to(old.dtype)


def naive_neighbour_attention(q: Tensor, k: Tensor, v: Tensor, distance: int, neighbours: int) -> Tensor:
    """Softmax attention of q (B, H, T, K) to k, v (B, H, T, K) at t, t - distance ..., one position after another."""
    outputs = []
    for t in range(q.size(2)):
        seen = [s for n in range(neighbours) if (s := t - n * distance) >= 0]
        scores = (q[:, :, t : t + 1] @ k[:, :, seen].mT / q.size(-1) ** 0.5).softmax(-1)  # (B, H, 1, seen)
        outputs.append(scores @ v[:, :, seen])
    return torch.cat(outputs, dim=2)


def neighbour_attention(q: Tensor, k: Tensor, v: Tensor, distance: int, neighbours: int) -> Tensor:
    """naive_neighbour_attention by shifts; k and v may have fewer heads, which neighbouring heads of q share."""
    T, groups = q.size(2), k.size(1)
    q = q.unflatten(1, (groups, -1))  # (B, G, H / G, T, K)
    times = torch.arange(T, device=q.device)

    def earlier(x: Tensor, by: int) -> Tensor:
        """(B, G, 1, T, K): what stood `by` positions before, zeros before the beginning."""
        return F.pad(x[:, :, : max(0, T - by)], (0, 0, min(by, T), 0)).unsqueeze(2)

    scores = [
        (q * earlier(k, n * distance)).sum(-1, dtype=torch.float32).masked_fill(times < n * distance, -torch.inf)
        for n in range(neighbours)
    ]
    weights = (torch.stack(scores, dim=-1) / q.size(-1) ** 0.5).softmax(-1).to(v.dtype)  # (B, G, H / G, T, neighbours)
    y = sum(weights[..., n, None] * earlier(v, n * distance) for n in range(neighbours))
    return y.flatten(1, 2)


class NeighbourAttention(CausalSelfAttention):
    """CausalSelfAttention to a few cells on the left: position t sees t, t - distance, t - 2 distance ..."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.distance, self.neighbours = 1, config.nca_neighbours  # the distance is that of the step at hand

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighbour_attention(q, k, v, self.distance, self.neighbours)


class Sheet(nn.Module):
    """The automaton over weights: a torus of cells per layer, on which the matrices lie one below another."""

    def __init__(self, config: Config):
        super().__init__()
        L, D = config.num_layers, config.model_dim
        self.matrices, self.width = config.matrices(), D
        self.steps, self.fire = config.nca_steps, config.nca_fire
        # All have a side of the model's width, which is laid across.
        self.heights = [rows if columns == D else columns for rows, columns in self.matrices.values()]
        rows, columns = -(-sum(self.heights) // TILE), -(-D // TILE)
        self.register_buffer("noise", hashed_signs(NOISE_SEED, 0, L, rows, columns, CHANNELS).float(), persistent=False)
        phases = [2 * math.pi / n * torch.arange(n, dtype=torch.float64) for n in (rows, columns)]
        angles = torch.stack([2**k * p for p in torch.meshgrid(*phases, indexing="ij") for k in range(NUM_WAVES)], -1)
        self.register_buffer("place", torch.cat((angles.sin(), angles.cos()), dim=-1).float(), persistent=False)
        matrix_of = torch.repeat_interleave(torch.arange(len(self.heights)), torch.tensor(self.heights))
        self.register_buffer("matrix_of", matrix_of[::TILE], persistent=False)  # of each row of cells
        self.seeds = control(nn.Parameter(torch.randn(L, len(self.heights), CHANNELS)))
        self.perceive = Linear(5 * CHANNELS + 4 * NUM_WAVES, HIDDEN)
        self.update = Linear(HIDDEN, CHANNELS, zero_init=True)
        self.tile = Linear(CHANNELS, TILE * TILE)

    def step(self, cells: Tensor) -> Tensor:
        """All cells (L, rows, columns, CHANNELS) once changed."""
        around = [cells.roll(shift, dim) for dim in (1, 2) for shift in (1, -1)]
        place = self.place.expand(len(cells), -1, -1, -1)
        change = self.update(F.relu(self.perceive(torch.cat((cells, *around, place), dim=-1))))
        new = rms_norm(cells + change / self.steps)
        return fire(cells, new, self.fire) if self.training else new

    def forward(self) -> dict[str, Tensor]:
        """Every matrix by name, (L, rows, columns), of no particular scale."""
        cells = rms_norm(self.noise + self.seeds[:, self.matrix_of, None])
        for _ in range(self.steps):
            cells = self.step(cells)
        tiles = self.tile(cells).unflatten(-1, (TILE, TILE)).transpose(2, 3)  # (L, rows, TILE, columns, TILE)
        sheet = tiles.flatten(3).flatten(1, 2)[:, : sum(self.heights), : self.width]
        made = zip(self.matrices.items(), sheet.split(self.heights, dim=1), strict=True)
        return {name: part if columns == self.width else part.mT for (name, (_, columns)), part in made}


class Model(GeneratedStack):
    def __init__(self, config: Config):
        super().__init__(config)
        self.over_weights = config.nca_mode == "weights"
        if self.over_weights:
            self.sheet = Sheet(config)
            self.scale = Scale(config)

    def make_blocks(self) -> nn.ModuleList:
        if self.config.nca_mode == "weights":
            return super().make_blocks()
        return nn.ModuleList(Block(NeighbourAttention(self.config), self.config) for _ in range(self.config.num_layers))

    @property
    def num_skips(self) -> int:
        return len(self.blocks) // 2 if self.config.nca_mode == "weights" else 0

    def backbone(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): the automaton over tokens, or the stack that the one over weights has made."""
        if self.over_weights:
            return super().backbone(x)
        x0, config = x, self.config
        for step in range(config.nca_steps):
            rule = self.blocks[step * len(self.blocks) // config.nca_steps]
            rule.mixer.distance = config.distance(step)
            new = rule(x, x0)
            x = fire(x, new, config.nca_fire) if self.training else new
        return x

    def generate(self) -> dict[str, Tensor]:
        return self.scale(self.sheet())

    def materialize(self) -> dict[str, Tensor]:
        return super().materialize() if self.over_weights else {}
