"""Queries, keys and values out of one projection: heads normed and rotated in one pass forward, one pass backward.

Letters: B batch, T time, H query heads, G key and value heads, K numbers of a head, first and second its halves.

qkv holds all heads of a token side by side: H queries, G keys, G values. Of a query or key, with x = head / s and
s^2 = mean(head^2) + eps, and c, s_t cosine and sine of the position's angles,
    out = gain (first c + second s_t ; second c - first s_t)        first, second of x; gain 1 for keys
(RoPE, Su et al. 2021, https://arxiv.org/abs/2104.09864, with QK-norm). Backward, the rotation is undone:
    dx = (d_first c - d_second s_t ; d_first s_t + d_second c),    d_gain = sum over tokens of dx . x,
    d_head = gain (dx - x mean(x dx)) / s.
Values are copied, so that all three come from one projection and their gradients go back as one tensor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from architectures.kernels.fused_norm import accumulation_dtype, norm_eps


def naive_qk_norm_rope(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in qkv's dtype as layers.py writes it: q (B, T, H, K), k and v (B, T, G, K).

    qkv (B, T, (H + 2 G) K), gain (H), cos and sin (T, K / 2).
    """
    heads = qkv.unflatten(-1, (-1, 2 * cos.size(1)))
    H = len(gain)
    G = (heads.size(2) - H) // 2
    q, k, v = heads.split((H, G, G), dim=2)
    x = torch.cat((q, k), dim=2)
    first, second = F.rms_norm(x, x.shape[-1:]).chunk(2, dim=-1)
    cos, sin = (table.to(x.dtype)[:, None] for table in (cos, sin))
    x = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    return x[:, :, :H] * gain.to(x.dtype)[:, None], x[:, :, H:], v


def head_counts(qkv: Tensor, gain: Tensor, cos: Tensor) -> tuple[int, int, int]:
    """(H, G, K)."""
    H, K = len(gain), 2 * cos.size(1)
    return H, (qkv.size(-1) // K - H) // 2, K


def unit_heads(qkv: Tensor, H: int, G: int, K: int) -> tuple[Tensor, Tensor]:
    """(queries and keys (B, T, H + G, K) over their root mean square, 1 over it), in accumulation_dtype."""
    heads = qkv.unflatten(-1, (H + 2 * G, K))[:, :, : H + G].to(accumulation_dtype(qkv))
    scale = (heads.square().mean(dim=-1, keepdim=True) + norm_eps(qkv)).rsqrt()
    return heads * scale, scale


@torch.library.custom_op("golf::qk_norm_rope", mutates_args=())
def qk_norm_rope_op(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """naive_qk_norm_rope, rounded once."""
    H, G, K = head_counts(qkv, gain, cos)
    first, second = unit_heads(qkv, H, G, K)[0].chunk(2, dim=-1)
    cos, sin = cos[:, None].to(first.dtype), sin[:, None].to(first.dtype)
    turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    q = (turned[:, :, :H] * gain.to(first.dtype)[:, None]).to(qkv.dtype)
    v = qkv.unflatten(-1, (H + 2 * G, K))[:, :, H + G :].clone(memory_format=torch.contiguous_format)
    return q, turned[:, :, H:].to(qkv.dtype).contiguous(), v


@qk_norm_rope_op.register_kernel("cuda")
def qk_norm_rope_on_cuda(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from architectures.kernels.fused_qk_triton import launch_qk_norm_rope

    return launch_qk_norm_rope(qkv, gain, cos, sin)


@qk_norm_rope_op.register_fake
def qk_norm_rope_shapes(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    H, G, K = head_counts(qkv, gain, cos)
    q, k, v = (qkv.new_empty(*qkv.shape[:2], heads, K) for heads in (H, G, G))
    return q, k, v


@torch.library.custom_op("golf::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """(d_qkv, d_gain)."""
    H, G, K = head_counts(qkv, gain, cos)
    x, scale = unit_heads(qkv, H, G, K)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second = torch.cat((dq, dk), dim=2).to(x.dtype).chunk(2, dim=-1)
    dx = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    d_gain = (dx * x)[:, :, :H].sum(dim=(0, 1, 3))
    d_heads = scale * (dx - x * (dx * x).mean(dim=-1, keepdim=True))
    d_heads = torch.cat((d_heads[:, :, :H] * gain.to(x.dtype)[:, None], d_heads[:, :, H:]), dim=2)
    return torch.cat((d_heads.to(qkv.dtype), dv), dim=2).flatten(2), d_gain.to(gain.dtype)


@qk_norm_rope_backward.register_kernel("cuda")
def qk_norm_rope_backward_on_cuda(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    from architectures.kernels.fused_qk_triton import launch_qk_norm_rope_backward

    return launch_qk_norm_rope_backward(dq, dk, dv, qkv, gain, cos, sin)


@qk_norm_rope_backward.register_fake
def qk_norm_rope_backward_shapes(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), gain.new_empty(gain.shape)


def keep_projection(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def qk_norm_rope_gradients(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    return *qk_norm_rope_backward(dq, dk, dv, *ctx.saved_tensors), None, None


qk_norm_rope_op.register_autograd(qk_norm_rope_gradients, setup_context=keep_projection)


def qk_norm_rope(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """naive_qk_norm_rope in one pass, differentiable once in qkv and gain. ValueError for what does not fit."""
    H, G, K = head_counts(qkv, gain, cos)
    if qkv.ndim != 3 or cos.shape != sin.shape or len(cos) != qkv.size(1) or G < 1 or qkv.size(2) != (H + 2 * G) * K:
        shapes = ", ".join(str(tuple(t.shape)) for t in (qkv, gain, cos, sin))
        raise ValueError(f"qkv, gain, cos, sin of shapes {shapes} must be (B, T, (H + 2 G) K), (H), (T, K / 2) twice")
    return qk_norm_rope_op(qkv, gain, cos, sin)
