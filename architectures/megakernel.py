"""gpt on fused Triton kernels, each used where a race finds it faster (Hsu et al. 2024, https://arxiv.org/abs/2410.10989).

Parameters and function are gpt's; only the passes over memory differ. FUSED_KERNELS lists, joined by commas,
    ce      the head, the softcap and the loss, without the logits of all tokens (kernels/cross_entropy.py)
    norm    x = sum_i w_i u_i with RMS norm: a block's residuals, mixes and skips, in two passes (kernels/fused_norm.py)
    mlp     relu(x U^T)^2 and its gradient, evaluated where the product ends (kernels/fused_mlp.py)
    qk      one projection to q, k, v, then QK-norm, RoPE and gain in one pass (kernels/fused_qk.py)
or none. Each has a fused backward pass. auto, the default: on CUDA a step of two layers at the run's shape is timed
with and without each, in turns, and what gains a hundredth or more is used; elsewhere it is gpt, bit for bit. On a CPU
a listed kernel is its reference in PyTorch, which rounds elsewhere than gpt. Scoring is gpt's, whatever the setting.
Differs from the paper: kernels for this model's blocks, operators that torch.compile keeps in one graph, none of them
used unmeasured. A megakernel in the strict sense is one launch for a whole model, made for decoding; this is not that.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.kernels.cross_entropy import MAX_SOFTCAP
from architectures.kernels.fused_mlp import relu2_mlp
from architectures.kernels.fused_norm import MAX_NORM_DIM, mix_norm
from architectures.kernels.fused_qk import qk_norm_rope
from architectures.layers import MLP, CausalSelfAttention, LanguageModel, ModelConfig, causal_attention, scaled

FUSED = ("ce", "norm", "mlp", "qk")
LEAST_GAIN, LAPS = 1.01, 20  # of a step of two layers; of each contender


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "FUSED_"
    neutral: ClassVar[dict | None] = {"fused_kernels": "auto"}  # on CUDA up to rounding

    fused_kernels: str = field(default="auto", metadata={"other": ",".join(FUSED)})  # auto, none, or a list

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.listed():
            if name not in FUSED or self.listed().count(name) > 1:
                raise ValueError(
                    f"FUSED_KERNELS={self.fused_kernels} must be auto, none, or some of {', '.join(FUSED)} with commas "
                    f"between them, each once; {name!r} is not"
                )
            if reason := self.unfit(name):
                raise ValueError(f"FUSED_KERNELS={self.fused_kernels}: {reason}; leave out {name}")

    def listed(self) -> list[str]:
        """The kernels that the setting names."""
        return [] if self.fused_kernels in ("auto", "none") else self.fused_kernels.split(",")

    def unfit(self, name: str) -> str | None:
        """Why a kernel cannot be used at these sizes."""
        if name == "ce" and self.logit_softcap > MAX_SOFTCAP:
            return f"ce needs LOGIT_SOFTCAP={self.logit_softcap} to be at most {MAX_SOFTCAP}"
        if name == "norm" and self.model_dim > MAX_NORM_DIM:
            return f"norm needs MODEL_DIM={self.model_dim} to be at most {MAX_NORM_DIM}"
        return None


class FusedAttention(CausalSelfAttention):
    """gpt's attention; in training, if `fused`, what comes before the softmax is one product and one pass."""

    fused = False

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees positions up to t."""
        if not (self.fused and self.training):
            return super().forward(x, scale)
        B, T, D = x.shape
        weight = torch.cat((self.query.weight, self.key.weight, self.value.weight)).to(x.dtype)
        rotary = self.rotary
        tables = (rotary.cos[:T], rotary.sin[:T]) if rotary.cos.size(0) >= T else rotary.tables(T, x.device)
        cos, sin = (table.to(x.dtype) for table in tables)  # as gpt rounds them: training and scoring turn alike
        heads = qk_norm_rope(F.linear(x, weight), self.q_gain, cos, sin)  # each (B, T, heads, K)
        y = causal_attention(*(h.transpose(1, 2) for h in heads))
        return scaled(self.out, y.transpose(1, 2).reshape(B, T, D), scale)


class FusedMLP(nn.Module):
    """gpt's MLP, of the same two layers; in training, if `fused`, relu^2 is evaluated where the products end."""

    fused, takes_scale = False, True

    def __init__(self, plain: MLP):
        super().__init__()
        self.up, self.down = plain.up, plain.down

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if not (self.fused and self.training):
            return MLP.forward(self, x, scale)
        return relu2_mlp(x, self.up.matrix(x.dtype), self.down.matrix(x.dtype, scale))


def speedup(plain: Callable[[], Tensor], fused: Callable[[], Tensor], laps: int = LAPS) -> float:
    """How many times as fast as `plain` the work `fused` is: the median ratio of their seconds, lap by lap in turns."""
    seconds = []
    for work in (plain, fused) * (2 + laps):  # the first two compile
        start = time.perf_counter()
        work().sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return median(a / b for a, b in zip(seconds[4::2], seconds[5::2], strict=True))


class Model(LanguageModel):
    def __init__(self, config: Config):
        super().__init__(config)
        for block in self.blocks:
            block.mlp = FusedMLP(block.mlp)
        self.use(config.listed())
        if config.fused_kernels == "auto":
            self.streamed = None

    def make_mixer(self, layer_idx: int) -> nn.Module:
        return FusedAttention(self.config)

    def use(self, kernels: Iterable[str]) -> None:
        """Train with these kernels and without the others."""
        self.streamed: bool | None = "ce" in kernels  # None: by gpt's rule
        self.summed = "norm" in kernels
        for block in self.blocks:
            block.mlp.fused, block.mixer.fused = "mlp" in kernels, "qk" in kernels

    def has_fused_loss(self) -> bool:
        return super().has_fused_loss() if self.streamed is None else self.streamed

    def backbone(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): gpt's stack; if `summed`, what lies between its layers is summed with the norm."""
        if not (self.summed and self.training):
            return super().backbone(x)
        x0, ones = x, torch.ones_like(self.blocks[0].mixer_scale)
        stream, skips, num_skips = [(ones, x)], [], self.num_skips  # what is to be summed: pairs of gain and term
        for i, block in enumerate(self.blocks):
            if i >= num_skips and skips:
                scale = self.skip_weights[i - num_skips]
                stream = stream + [(scale * gain, term) for gain, term in skips.pop()]
            stay, again = block.resid_mix
            stream = [(stay * gain, term) for gain, term in stream] + [(again, x0)]
            x, normed = mix_norm([term for _, term in stream], torch.stack([gain for gain, _ in stream]))
            x, normed = mix_norm([x, block.mixer(normed)], torch.stack((ones, block.mixer_scale)))
            stream = [(ones, x), (block.mlp_scale, block.mlp(normed))]
            if i < num_skips:
                skips.append(stream)
        return x + block.mlp_scale.to(x.dtype) * stream[1][1]

    def choose_kernels(self, rows: int, compiled: bool, agree: Callable[[Tensor], Tensor]) -> str:
        """Settle what auto stands for at `rows` sequences a pass, by a race on CUDA; a line for the log, or "".

        agree adds a tensor up over the ranks, which thereby choose alike. Called once the model is on its device.
        """
        if self.config.fused_kernels != "auto" or not self.embed.weight.is_cuda:
            return ""
        return self.race_kernels(rows, compiled, agree)

    def race_kernels(self, rows: int, compiled: bool, agree: Callable[[Tensor], Tensor]) -> str:
        """One kernel after the other is tried beside those that have won; the winners, and every kernel's speedup."""
        chosen, found, best = [], [], self.contender([], rows, compiled)
        for name in (name for name in FUSED if not self.config.unfit(name)):
            rival, why = self.contender([*chosen, name], rows, compiled), ""
            try:
                gain = speedup(best, rival)
            except Exception as error:  # whatever a compiler or a device refuses a kernel with, it stays off
                gain, why = -math.inf, f" ({type(error).__name__})"  # on one rank is off on all
            total, ranks = agree(torch.tensor([gain, 1.0], device=self.embed.weight.device)).tolist()
            found.append(f"{name} {max(0.0, total / ranks):.3f}x{why}")
            if total / ranks >= LEAST_GAIN:
                chosen, best = [*chosen, name], rival
        self.use(chosen)
        return f"{','.join(chosen) or 'none'} ({', '.join(found)})"

    def contender(self, kernels: list[str], rows: int, compiled: bool) -> Callable[[], Tensor]:
        """A training pass, forward and backward, of two layers of this model's shape with these kernels."""
        weight, T = self.embed.weight, self.config.train_seq_len
        names = ",".join(kernels) or "none"
        config = replace(self.config, num_layers=min(2, self.config.num_layers), fused_kernels=names)
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            model = type(self)(config).to(weight.device)
            ids = torch.randint(config.vocab_size, (rows, T + 1), device=weight.device)
        model.compute_dtype, params = self.compute_dtype, list(model.parameters())
        loss = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
        input_ids, target_ids = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        return lambda: torch.autograd.grad(loss(input_ids, target_ids), params)[0]
