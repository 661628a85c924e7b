"""Layers that run more than once: which, how often and from when on; for any stack of blocks with U-Net skips.

A Config mixes in RecurrenceConfig and a Model RecurrentStack; make_mixer, make_block or make_blocks stay the
architecture's own. Weights, artifact and random numbers are those of the stack without recurrence.
"""

from dataclasses import dataclass, field

from torch import Tensor

from architectures.layers import LanguageModel, ModelConfig
from architectures.time_index import one_of


@dataclass
class RecurrenceConfig(ModelConfig):
    """Which layers repeat. RECUR_REPEATS=1 is off."""

    recur_layers: str | None = field(default=None, metadata={"other": "0,1"})  # "3,4"; None = the two in the middle
    recur_repeats: int = 2  # how often each of them runs, the first time included
    recur_order: str = field(default="segment", metadata={"other": "layer"})  # 3 4 3 4, or 3 3 4 4
    recur_start: float = field(default=0.0, metadata={"other": 1.0})  # fraction of the run before it begins; 1 = never

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "recur_order", ("segment", "layer"))
        if self.recur_repeats < 1:
            raise ValueError(f"RECUR_REPEATS={self.recur_repeats} must be at least 1, which is off")
        if not 0 <= self.recur_start <= 1:
            raise ValueError(f"RECUR_START={self.recur_start} must be between 0, from the start, and 1, never")
        self.repeated_layers()

    def repeated_layers(self) -> list[int]:
        """The layers that repeat, ascending."""
        L = self.num_layers
        if self.recur_layers is None:
            return [i for i in (L // 2 - 1, L // 2) if i >= 0]  # the last that feeds a skip and the first that gets one
        words = self.recur_layers.split(",")
        layers = [int(word) for word in words if word.strip().isdecimal()]
        if len(layers) < len(words) or layers != sorted(set(layers)) or layers[-1] >= L:
            raise ValueError(
                f"RECUR_LAYERS={self.recur_layers} must be ascending layer numbers from 0 to {L - 1}, such as 0,1"
            )
        return layers

    def layer_order(self) -> list[int]:
        """The layers in the order in which they run once recurrence has begun."""
        layers, order = self.repeated_layers(), []
        for i in range(self.num_layers):
            order.append(i)
            if self.recur_order == "layer" and i in layers:
                order += [i] * (self.recur_repeats - 1)
            if self.recur_order == "segment" and i == layers[-1]:
                order += layers * (self.recur_repeats - 1)
        return order


class RecurrentStack(LanguageModel):
    """A stack in which some layers repeat. A skip belongs to its layers: it is added at every pass, from the last one.

    `repeating` is what on_progress sets; a model that was never told runs as at the end of a run.
    """

    def __init__(self, config: RecurrenceConfig):
        super().__init__(config)
        self.layer_order = config.layer_order()
        self.on_progress(1.0)

    @property
    def progress_switches(self) -> tuple[float, ...]:
        config = self.config
        begins = config.recur_repeats > 1 and 0 < config.recur_start < 1
        return (*super().progress_switches, *([config.recur_start] if begins else []))

    def on_progress(self, fraction: float) -> None:
        super().on_progress(fraction)
        self.repeating = self.config.recur_start <= fraction and self.config.recur_start < 1

    def backbone(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): the blocks in layer_order(), the second half fed from the first in mirror order."""
        x0, outputs, num_skips = x, {}, self.num_skips
        for i in self.layer_order if self.repeating else range(len(self.blocks)):
            source = 2 * num_skips - 1 - i
            if num_skips <= i and source >= 0:
                x = self.join_skip(i - num_skips, x, outputs[source])
            x = self.blocks[i](x, x0)
            if i < num_skips:
                outputs[i] = x
        return x
