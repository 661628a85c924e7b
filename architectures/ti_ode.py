"""Time-indexed neural ODE: one shared block, its output gated by time (hybrid of https://github.com/zaphrode/qkvflow).

    x <- x + dt m(t) * f(x),   f(x) = Attention(n(x)) + MLP(n(x)),   m(t) = 2 sigmoid(H e(t) - H' e'(t))
One f serves all layers; e(t) is a small network's embedding of t = (i + 1) / L, e'(t) its twin, equal at first, so that
m, per channel, begins at 1. TI_WHERE=all gates what attention and MLP read too. With ODE_DT=1, ODE_RES=seq and
TI_FEAT=none it is the looped block of `shared`, less its skips and without the embedding mixed back in.
Differs from the study, which proposed it and had no code: causal attention, RoPE, RMS norm and gains as in gpt; solvers
other than Euler's, a learned step and another depth in scoring; m is stored per layer, not as a network.
"""

from dataclasses import dataclass, field

from architectures.ode import OdeConfig, OdeStack
from architectures.time_gates import GateConfig, Gated, GatedStack, attention_gates, mlp_gates


@dataclass
class Config(GateConfig, OdeConfig):
    ti_where: str = field(default="out", metadata={"other": "all"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ti_where not in ("out", "all"):
            raise ValueError(f"TI_WHERE={self.ti_where} must be out or all")

    def gated(self, layer_idx: int) -> dict[str, Gated]:
        every = attention_gates(self, "mixer") | mlp_gates(self, "mlp")
        outputs = {"mixer.out.weight", "mlp.down.weight"}
        every |= {name: every[name]._replace(rows="slope") for name in outputs}
        if self.ti_where == "all":
            return every
        return {name: every[name]._replace(columns=None) for name in sorted(outputs)}

    def num_params(self) -> int:
        return super().num_params() + self.gate_params()


class Model(OdeStack, GatedStack):
    pass
