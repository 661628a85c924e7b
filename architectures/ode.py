"""Layers as the steps of an ODE solver: dx/dt = f(x, t) from t = 0 to 1, one evaluation of f per layer.

Letters as in time_index.py.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from architectures.layers import MLP, CausalSelfAttention, ModelConfig, control, rms_norm
from architectures.time_index import TimeConfig, TimeIndexed, one_of

# Per evaluation in a step: its time within the step, how far along the last slope it looks, and its slope's weight.
SOLVERS = {
    "euler": ((1.0, 0.0, 1.0),),  # at the end of the step, so that layer i stands at (i + 1) / L
    "heun": ((0.0, 0.0, 1 / 2), (1.0, 1.0, 1 / 2)),
    "rk4": ((0.0, 0.0, 1 / 6), (0.5, 0.5, 1 / 3), (0.5, 0.5, 1 / 3), (1.0, 1.0, 1 / 6)),
}
STEPS = {"1": lambda L: 1.0, "1/sqrt(L)": lambda L: L**-0.5, "1/L": lambda L: 1 / L, "learn": lambda L: 1 / L}


@dataclass
class OdeConfig(TimeConfig):
    """How the equation is solved. NUM_LAYERS counts evaluations of f, whatever the solver."""

    ode_dt: str = field(default="1/L", metadata={"other": "1"})  # 1, 1/sqrt(L), 1/L; learn: per channel, 1/L at first
    ode_res: str = field(default="parallel", metadata={"other": "seq"})  # seq: the MLP sees what attention has written
    ode_solver: str = field(default="euler", metadata={"other": "heun"})
    eval_layers: int | None = field(default=None, metadata={"other": 8})  # evaluations of f in scoring; NUM_LAYERS

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "ode_dt", STEPS)
        one_of(self, "ode_res", ("parallel", "seq"))
        one_of(self, "ode_solver", SOLVERS)
        for name in ("num_layers", "eval_layers"):
            value, n = getattr(self, name), len(SOLVERS[self.ode_solver])
            if value is not None and (value < 1 or value % n):
                raise ValueError(f"{name.upper()}={value} must be a multiple of {n} for ODE_SOLVER={self.ode_solver}")
        if self.eval_layers is not None and self.ti_feat in ("table", "shuffle", "free"):
            raise ValueError(f"EVAL_LAYERS needs times between those of layers, which TI_FEAT={self.ti_feat} has not")

    @property
    def num_blocks(self) -> int:
        return 1

    def block_of(self, layer_idx: int) -> int:
        return 0

    def block_params(self) -> int:
        return super().block_params() - 2 * self.model_dim  # no mixes

    def num_params(self) -> int:
        return self.embed_params() + self.block_params() + (self.model_dim if self.ode_dt == "learn" else 0)


class Slope(nn.Module):
    """f: attention and MLP, each scaled per channel, of the normalised x."""

    def __init__(self, config: OdeConfig):
        super().__init__()
        self.sequential = config.ode_res == "seq"
        self.mixer = CausalSelfAttention(config)
        self.mlp = MLP(config)
        self.mixer_scale = control(nn.Parameter(torch.ones(config.model_dim)))
        self.mlp_scale = control(nn.Parameter(torch.ones(config.model_dim)))

    def forward(self, x: Tensor, step: Tensor | float) -> Tensor:
        """The slope at x (B, T, D), same shape; step is how far a sequential MLP follows attention."""
        slope = self.mixer(rms_norm(x), self.mixer_scale)
        x = x + step * slope if self.sequential else x
        return slope + self.mlp(rms_norm(x), self.mlp_scale)


class OdeStack(TimeIndexed):
    """A stack whose layers are evaluations of one f at different times. Scoring may take more or fewer of them."""

    def __init__(self, config: OdeConfig):
        super().__init__(config)
        # Of an evaluation in its step. Kept: made in times() from what the host knows, it would have a GPU waited for.
        within = torch.tensor([time for time, _, _ in SOLVERS[config.ode_solver]])
        self.register_buffer("within", within, persistent=False)
        if config.ode_dt == "learn":
            self.step = control(nn.Parameter(torch.full((config.model_dim,), 1 / config.num_layers)))

    def make_block(self, layer_idx: int) -> nn.Module:
        return Slope(self.config)

    @property
    def num_skips(self) -> int:
        return 0

    @property
    def num_copies(self) -> int:
        return max(self.config.num_layers, self.config.eval_layers or 0)

    @property
    def depth(self) -> int:
        """How many times f is evaluated."""
        return self.config.num_layers if self.training else self.config.eval_layers or self.config.num_layers

    def times(self) -> Tensor:
        """The time of every evaluation, (depth,)."""
        num_steps = self.depth // len(self.within)
        return ((torch.arange(num_steps, device=self.within.device)[:, None] + self.within) / num_steps).flatten()

    def step_size(self) -> Tensor | float:
        """Of one evaluation; another depth covers the same distance."""
        L = self.config.num_layers
        return (self.step if self.config.ode_dt == "learn" else STEPS[self.config.ode_dt](L)) * (L / self.depth)

    def backbone(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): explicit Runge-Kutta steps, each of which looks along its last slope only."""
        step, solver = self.step_size(), SOLVERS[self.config.ode_solver]
        step = step.to(x.dtype) if isinstance(step, Tensor) else step
        whole = step * len(solver)
        for first in range(0, self.depth, len(solver)):
            start, slope = x, None
            for i, (_, along, weight) in enumerate(solver):
                probe = start + along * whole * slope if along else start
                slope = self.blocks[first + i](probe, step)
                x = x + weight * whole * slope
        return x

    def folded_config(self, **changes) -> ModelConfig:
        depth = self.config.eval_layers
        deeper = {} if depth is None else {"num_layers": depth, "eval_layers": None, "ode_dt": "learn"}
        return super().folded_config(**deeper, **changes)

    def folded_state(self) -> dict[str, Tensor]:
        step = self.step_size()
        step = step if isinstance(step, Tensor) else torch.full((self.config.model_dim,), step)
        return super().folded_state() | {"step": step}
