"""Gates that are functions of time: they turn the weights of a shared block into those of a layer.

Weights do not depend on the input, so a layer's are made once per optimizer step, and the artifact holds the shared
weights and a few numbers per layer. Letters as in time_index.py.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from architectures.layers import ModelConfig, full_precision
from architectures.time_index import SharedStack, TimeConfig, TimeIndexed, TimeNet, layer_of, one_of

# Each is 1 at 0, so that a gate of zeros changes nothing; all but sigmoid, the published one, which halves.
ACTIVATIONS = {
    "2sigmoid": lambda x: 2 * x.sigmoid(),
    "sigmoid": torch.sigmoid,
    "affine": lambda x: 1 + x,
    "1+tanh": lambda x: 1 + x.tanh(),
    "exp": torch.exp,
}


class Gated(NamedTuple):
    """How time changes a tensor of a block: the names of the gates of its rows and of its columns."""

    shape: tuple[int, ...]
    rows: str | None = None
    columns: str | None = None
    log: bool = False  # the tensor is a logarithm: the gate's own is added


def attention_gates(config: ModelConfig, module: str) -> dict[str, Gated]:
    """Gates on what attention reads and on what it writes."""
    D, kv_dim = config.model_dim, config.num_kv_heads * config.head_dim
    shapes = {"query": D, "key": kv_dim, "value": kv_dim}
    reads = {f"{module}.{name}.weight": Gated((n, D), columns="attention_in") for name, n in shapes.items()}
    return reads | {f"{module}.out.weight": Gated((D, D), rows="attention_out")}


def mlp_gates(config: ModelConfig, module: str) -> dict[str, Gated]:
    """Gates on what the MLP reads, on its hidden channels and on what it writes."""
    D, hidden = config.model_dim, config.mlp_mult * config.model_dim
    return {
        f"{module}.up.weight": Gated((hidden, D), columns="mlp_in"),
        f"{module}.down.weight": Gated((D, hidden), rows="mlp_out", columns="mlp_hidden"),
    }


@dataclass
class GateConfig(TimeConfig):
    """How gates that are functions of time act on a block."""

    ti_act: str = field(default="2sigmoid", metadata={"other": "exp"})
    # channel, head (one gate for each of NUM_HEADS runs of channels), rank8 (a mask of that rank on every matrix) or
    # lora8 (a sum of that rank to every matrix)
    ti_gate: str = field(default="channel", metadata={"other": "head"})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "ti_act", ACTIVATIONS)
        if self.ti_gate not in ("channel", "head") and not self.rank:
            raise ValueError(f"TI_GATE={self.ti_gate} must be channel, head, or rank or lora and a number, like lora16")

    @property
    def rank(self) -> int | None:
        """R of a low-rank gate; None where gates are per channel or head."""
        digits = self.ti_gate.removeprefix("rank").removeprefix("lora")
        return int(digits) if digits.isdecimal() and digits != self.ti_gate else None

    def gated(self, layer_idx: int) -> dict[str, Gated]:
        """The tensors of a layer that time changes, by their name in the layer's block."""
        raise NotImplementedError(f"{type(self).__module__} must define gated")

    def gates(self) -> dict[str, int]:
        """The number of channels of every gate, by its name; a low-rank gate is named by its matrix."""
        channels: dict[str, int] = {}
        for layer_idx in range(self.num_layers):
            for name, gate in self.gated(layer_idx).items():
                if self.rank and len(gate.shape) == 2:
                    channels[name] = self.rank
                else:
                    named = zip((gate.rows, gate.columns), gate.shape, strict=False)
                    channels |= {key: n for key, n in named if key is not None}
        return channels

    def factored(self) -> dict[tuple[int, str], tuple[int, ...]]:
        """The shapes of the matrices that have a low-rank gate, by block and name."""
        layers = range(self.num_layers if self.rank else 0)
        every = {(self.block_of(i), name): gate.shape for i in layers for name, gate in self.gated(i).items()}
        return {key: shape for key, shape in every.items() if len(shape) == 2}

    def gate_size(self, channels: int) -> int:
        """How many numbers a gate of so many channels is made of."""
        by_head = self.ti_gate == "head" and channels % self.num_heads == 0
        return self.num_heads if by_head else channels

    def gate_params(self) -> int:
        """Parameters of everything that makes gates."""
        if self.ti_feat == "none":
            return 0
        factors = sum(self.rank * sum(shape) for shape in self.factored().values())
        return factors + self.time_params(sum(map(self.gate_size, self.gates().values())), num_twins=2)


class GatedStack(TimeIndexed, SharedStack):
    """A stack whose layers are a few shared blocks, each tensor that `config.gated` names gated by functions of time.

    A matrix W becomes g_rows(t) * W * g_columns(t), or W * act(U c(t) V^T), or W + U c(t) V^T.
    """

    def __init__(self, config: GateConfig):
        super().__init__(config)
        if config.ti_feat == "none":
            return
        self.channels = config.gates()
        self.sizes = [config.gate_size(channels) for channels in self.channels.values()]
        self.time = TimeNet(config, sum(self.sizes), twins=True)
        self.factors = nn.ParameterDict()
        for (block_idx, name), shape in config.factored().items():
            for side, size in zip("uv", shape, strict=True):
                factor = torch.randn(size, config.rank) / shape[1] ** 0.25
                self.factors[self.factor_name(block_idx, name, side)] = nn.Parameter(factor)

    def make_blocks(self) -> nn.ModuleList:
        config = self.config
        self.base = nn.ModuleList(self.make_block(g) for g in range(config.num_blocks))
        return nn.ModuleList(self.make_layer(i) for i in range(self.num_copies))

    @property
    def num_copies(self) -> int:
        """How many layers there are at most."""
        return self.config.num_layers

    def make_layer(self, layer_idx: int) -> nn.Module:
        """The block of a layer, with buffers in place of what time changes."""
        block_idx = self.config.block_of(layer_idx)
        gated = {} if self.config.ti_feat == "none" else self.config.gated(layer_idx)
        return layer_of(self.base[block_idx], gated)

    @staticmethod
    def factor_name(block_idx: int, name: str, side: str) -> str:
        return f"{block_idx}_{name.replace('.', '_')}_{side}"

    def gates(self) -> dict[str, Tensor]:
        """Every gate by its name, (L, channels); a low-rank gate's (L, R) coefficients by its matrix."""
        act, made = ACTIVATIONS[self.config.ti_act], {}
        for (name, n), raw in zip(self.channels.items(), self.time(self.times()).split(self.sizes, -1), strict=True):
            low_rank = "." in name
            made[name] = raw if low_rank else act(raw).repeat_interleave(n // raw.size(-1), dim=-1)
        return made

    def materialize(self) -> dict[str, Tensor]:
        if self.time is None:
            return {}
        with full_precision():
            return self.generate()

    def generate(self) -> dict[str, Tensor]:
        """Every gated tensor of every layer, by its name in the stack."""
        gates = {name: gate.unbind() for name, gate in self.gates().items()}
        made = {}
        for layer_idx in range(len(self.times())):
            block_idx = self.config.block_of(layer_idx)
            for name, gate in self.config.gated(layer_idx).items():
                weight = self.base[block_idx].get_parameter(name)
                made[f"blocks.{layer_idx}.{name}"] = self.at(layer_idx, block_idx, name, gate, weight, gates)
        return made

    def at(
        self, layer_idx: int, block_idx: int, name: str, gate: Gated, weight: Tensor, gates: dict[str, tuple]
    ) -> Tensor:
        """What a tensor of a block is in a layer."""
        if name in gates:
            u, v = (self.factors[self.factor_name(block_idx, name, side)] for side in "uv")
            product = (u * gates[name][layer_idx]) @ v.T
            masks = self.config.ti_gate.startswith("rank")
            return weight * ACTIVATIONS[self.config.ti_act](product) if masks else weight + product
        if gate.log:
            return weight + gates[gate.rows][layer_idx].clamp(min=1e-3).log()
        if gate.rows is not None:
            rows = gates[gate.rows][layer_idx]
            weight = weight * (rows[:, None] if weight.ndim == 2 else rows)
        return weight if gate.columns is None else weight * gates[gate.columns][layer_idx]
