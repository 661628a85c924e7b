"""JEPA: hidden states also predict later hidden states (Assran et al. 2023, https://arxiv.org/abs/2301.08243).

With n the RMS norm, u_t = n(state of layer JEPA_CONTEXT at position t), z_t = n(state of layer JEPA_TARGET), sg a value
as a constant, and k each of JEPA_OFFSETS:
    y_tk = (z_{t+1} + .. + z_{t+k}) / k, each dimension brought to mean 0 and variance 1;  JEPA_POOL=0: z_{t+k} alone
    error = mean over t and k of |W_k n(relu(U u_t)^2) - sg(y_tk)|^2 / D
    loss = (1 - s (1 - JEPA_NATS)) nats + s JEPA_WEIGHT (error + JEPA_REG_WEIGHT reg),   JEPA_WEIGHT=0 is gpt
All states are those of the one pass that predicts tokens; later ones are labels, so scores stay causal. The error is 1
for a predictor that knows nothing. A mean common to all states fills most of their length: without it in y, the state
at t is no good guess. JEPA_SCHEDULE=fade: s falls from 1 to 0 at JEPA_UNTIL of the run; phases: it is 1 until then, and
with JEPA_NATS near 0 latents come first and tokens second. After that the loss is the nats alone, in a graph without
the rest. reg keeps the z from becoming alike; the log says whether it does, and whether the predictor learns:
    sigreg   distance of the z to a standard normal along directions a: the integral over x of
             |mean exp(i x a.z) - exp(-x^2 / 2)|^2 exp(-x^2 / 2) (LeJEPA, Balestriero and LeCun 2025,
             https://arxiv.org/abs/2511.08544)
    vicreg   mean max(0, 1 - std z_j) + COVARIANCE x squared covariances of z_j with all other z_i, mean over j (VICReg,
             Bardes et al. 2021, https://arxiv.org/abs/2105.04906)
The predictor is not stored. Differs from the papers: text in one causal pass, without masks or a slowly moving target
network; one position in JEPA_STRIDE predicts; reg is per vector, of at most REG_VECTORS.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.generated import hashed_uniform
from architectures.layers import Block, CausalSelfAttention, LanguageModel, Linear, ModelConfig, rms_norm
from architectures.time_index import one_of

COVARIANCE = 0.04  # as in the paper
REG_VECTORS, GAUGE_VECTORS = 1024, 256  # of a batch, evenly spaced
DIRECTIONS, DIRECTIONS_AT_ONCE, DIRECTION_SEED = 1024, 32, 17
KNOTS, KNOT_STEP = 8, 0.5  # of the integral's right half; at 0 there is no distance, the left is the mirror image


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "JEPA_"
    neutral: ClassVar[dict | None] = {"jepa_weight": 0.0}

    jepa_weight: float = 0.1  # nats for an error of 1
    jepa_nats: float = field(default=1.0, metadata={"other": 0.1})  # weight of the nats while s is 1
    jepa_schedule: str = field(default="fade", metadata={"other": "phases"})
    jepa_until: float = field(default=0.8, metadata={"other": 0.6})  # of the run; then cross-entropy alone
    jepa_offsets: str = field(default="8,16", metadata={"other": "8"})  # tokens ahead
    jepa_pool: bool = True  # all tokens up to there; or the one there
    jepa_context: int | None = field(default=None, metadata={"other": 0})  # layer; None = the middle
    jepa_target: int | None = field(default=None, metadata={"other": 0})  # layer; None = three quarters up
    jepa_hidden: int | None = field(default=None, metadata={"other": 8})  # width of the predictor; None = MODEL_DIM / 2
    jepa_stride: int = 4  # tokens from one position that predicts to the next
    jepa_reg: str = field(default="sigreg", metadata={"other": "vicreg"})  # or none
    jepa_reg_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "jepa_schedule", ("fade", "phases"))
        one_of(self, "jepa_reg", ("sigreg", "vicreg", "none"))
        for name in ("jepa_weight", "jepa_reg_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 0, which is off")
        if not 0 <= self.jepa_nats <= 1:
            raise ValueError(f"JEPA_NATS={self.jepa_nats} must be between 0 and 1")
        if not 0 < self.jepa_until <= 1:
            raise ValueError(f"JEPA_UNTIL={self.jepa_until} must be above 0 and at most 1; JEPA_WEIGHT=0 is off")
        for name, value in (("JEPA_STRIDE", self.jepa_stride), ("JEPA_HIDDEN", self.hidden)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, layer in (("JEPA_CONTEXT", self.context), ("JEPA_TARGET", self.target)):
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"{name}={layer} must be a layer, 0 to {self.num_layers - 1}")
        self.offsets()

    def offsets(self) -> list[int]:
        """How far ahead states are predicted, ascending."""
        words, T = self.jepa_offsets.split(","), self.train_seq_len
        found = [int(word) for word in words if word.strip().isdecimal()]
        if len(found) < len(words) or found != sorted(set(found)) or not 1 <= found[0] <= found[-1] < T:
            wanted = f"ascending numbers of tokens, 1 or more and below TRAIN_SEQ_LEN={T}, such as 8,16"
            raise ValueError(f"JEPA_OFFSETS={self.jepa_offsets} must be {wanted}")
        return found

    @property
    def context(self) -> int:
        return (self.num_layers - 1) // 2 if self.jepa_context is None else self.jepa_context

    @property
    def target(self) -> int:
        return 3 * (self.num_layers - 1) // 4 if self.jepa_target is None else self.jepa_target

    @property
    def hidden(self) -> int:
        return self.model_dim // 2 if self.jepa_hidden is None else self.jepa_hidden

    def num_params(self) -> int:
        predictor = (1 + len(self.offsets())) * self.hidden * self.model_dim
        return super().num_params() + (predictor if self.jepa_weight else 0)


class WatchedBlock(Block):
    """A block that keeps its output, in training, until the loss has read it."""

    state: Tensor | None = None  # (B, T, D)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        x = super().forward(x, x0)
        self.state = x if self.training else None
        return x


class Predictor(nn.Module):
    """From u_t to a guess of y_tk, for each k."""

    def __init__(self, config: Config):
        super().__init__()
        self.up = Linear(config.model_dim, config.hidden)
        self.ahead = nn.ModuleList(Linear(config.hidden, config.model_dim, zero_init=True) for _ in config.offsets())

    def forward(self, u: Tensor) -> list[Tensor]:
        """(B, N, D) for each offset, of u (B, N, D)."""
        h = rms_norm(F.relu(self.up(u)).square())
        return [ahead(h) for ahead in self.ahead]


def whitened(z: Tensor) -> Tensor:
    """z (B, N, D) with each dimension at mean 0 and variance 1 over B and N."""
    variance, mean = torch.var_mean(z, dim=(0, 1), correction=0)
    return (z - mean) * torch.rsqrt(variance + 1e-6)


def later_states(z: Tensor, k: int, stride: int, pool: bool) -> Tensor:
    """Of z (B, T, D), for each `stride`-th position t: the mean of the k states after it, or the k-th, (B, N, D)."""
    if not pool:
        return z[:, k::stride]
    sums = F.pad(z, (0, 0, 1, 0)).cumsum(dim=1)
    return (sums[:, k + 1 :: stride] - sums[:, 1 : z.size(1) - k + 1 : stride]) / k


def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """Mean over unit directions (M, D) of the distance of z (N, D) to a standard normal; 0.41 if all z are 0."""
    knots = KNOT_STEP * torch.arange(1, KNOTS + 1, device=z.device)
    normal = torch.exp(-knots.square() / 2)
    angles = (z @ directions.T)[..., None] * knots  # (N, M, KNOTS)
    distance = (angles.cos().mean(dim=0) - normal).square() + angles.sin().mean(dim=0).square()  # (M, KNOTS)
    return 2 * KNOT_STEP * (distance @ normal).mean()


def vicreg(z: Tensor) -> Tensor:
    """VICReg's two terms for z (N, D); 0 for uncorrelated dimensions that deviate by 1 or more."""
    N, D = z.shape
    z = z - z.mean(dim=0)
    covariances = z.T @ z / N
    variances = covariances.diagonal()
    lack = F.relu(1 - torch.sqrt(variances + 1e-4)).mean()
    return lack + COVARIANCE * (covariances.square().sum() - variances.square().sum()) / D


def effective_dimensions(z: Tensor) -> Tensor:
    """(sum of variances along the principal axes)^2 / (sum of their squares) of z (N, D): 1 on a line, D at most."""
    z = z - z.mean(dim=0)
    gram = z @ z.T
    return gram.trace().square() / gram.square().sum()


def spaced(z: Tensor, most: int) -> Tensor:
    """At most so many of z (N, D), evenly spaced."""
    return z[:: -(-len(z) // most)]


class Model(LanguageModel):
    def __init__(self, config: Config):
        super().__init__(config)
        self.predictor = None
        if config.jepa_weight:
            self.predictor = Predictor(config)
            directions = F.normalize(hashed_uniform(DIRECTION_SEED, 0, DIRECTIONS, config.model_dim), dim=1)
            self.register_buffer("directions", directions, persistent=False)
            self.register_buffer("share", torch.ones(()), persistent=False)  # s; a Python number would be compiled in
        self.on_progress(0.5)  # until told, as in the middle of a run

    @property
    def gauge_names(self) -> tuple[str, ...]:
        """Also the least deviation of a dimension of z, and its effective dimensions."""
        return ("nats", "jepa_error", "jepa_deviation", "jepa_dimensions") if self.config.jepa_weight else ()

    def make_block(self, layer_idx: int) -> nn.Module:
        watched = self.config.jepa_weight and layer_idx in (self.config.context, self.config.target)
        return (WatchedBlock if watched else Block)(CausalSelfAttention(self.config), self.config)

    @property
    def progress_switches(self) -> tuple[float, ...]:
        return (self.config.jepa_until,) if self.predictor is not None and self.config.jepa_until < 1 else ()

    def on_progress(self, fraction: float) -> None:
        until = self.config.jepa_until
        self.predicting = self.predictor is not None and fraction < until
        if self.predicting:
            self.share.fill_(1 - fraction / until if self.config.jepa_schedule == "fade" else 1.0)

    def take_states(self) -> list[Tensor]:
        """The states (B, T, D) that the pass has left behind: the context's and the target's."""
        watched = [self.blocks[i] for i in (self.config.context, self.config.target)]
        states = [block.state for block in watched]
        for block in watched:
            block.state = None
        return states

    def auxiliary(self, input_ids: Tensor, context: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(error + JEPA_REG_WEIGHT reg, the gauges but nats), fp32, from states (B, T, D)."""
        config, z, errors = self.config, rms_norm(target.float()), []
        guesses = self.predictor(rms_norm(context[:, :: config.jepa_stride]))
        for k, guess in zip(config.offsets(), guesses, strict=True):
            y = whitened(later_states(z.detach(), k, config.jepa_stride, config.jepa_pool))
            errors.append(F.mse_loss(guess[:, : y.size(1)].float(), y))
        error, z = torch.stack(errors).mean(), spaced(z.flatten(0, 1), REG_VECTORS)
        with torch.no_grad():
            gauges = [error, z.std(dim=0).min(), effective_dimensions(spaced(z, GAUGE_VECTORS))]
        if config.jepa_reg == "none" or not config.jepa_reg_weight:
            return error, gauges
        if config.jepa_reg == "vicreg":
            return error + config.jepa_reg_weight * vicreg(z), gauges
        # A batch has its directions, whatever drew numbers before it, compiled or not.
        first = (input_ids.sum() + torch.arange(DIRECTIONS_AT_ONCE, device=z.device)) % DIRECTIONS
        return error + config.jepa_reg_weight * sigreg(z, self.directions[first]), gauges

    def training_loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Mean nats, and in training, until JEPA_UNTIL, what the latents cost."""
        nats = super().training_loss(input_ids, target_ids)
        if self.predictor is None:
            return nats
        states = self.take_states()
        if not (self.training and self.predicting):
            return nats
        cost, gauges = self.auxiliary(input_ids, *states)
        self.show(nats, *gauges)
        return (1 - self.share * (1 - self.config.jepa_nats)) * nats + self.share * self.config.jepa_weight * cost

    @torch.no_grad()
    def folded(self) -> LanguageModel:
        """gpt with these weights: without the predictor."""
        if self.predictor is None:
            return self
        return self.rebuilt(dataclasses.replace(self.config, jepa_weight=0.0))
