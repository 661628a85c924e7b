"""Mean nats of a softcapped linear head, and its gradients, without the logits of all tokens at once.

Letters: M tokens, D model_dim, V vocab_size, R rows of a chunk.

With x = h W^T, z = softcap tanh(x / softcap) and s = sum_j exp(z_j), a token's nats are ln s - z_y. In terms of
    half = (1 - tanh(x / softcap)) / 2 = sigmoid(-2 x / softcap),
z is softcap (1 - 2 half) and the gradient is dx_j = 4 half_j (1 - half_j) (exp(z_j) / s - [j = y]).
Since |z| <= softcap, exp(z) cannot overflow, so no maximum is needed, and each tile of x gives its dx up to the factor
4 / s of its row. That factor goes to the rows of h and dh instead, and what is kept of a chunk of rows is
    slope_j = half_j (1 - half_j) exp(z_j),    slope_y = -half_y (1 - half_y) sum_{j != y} exp(z_j),
from which dh = diag(4 / (s M)) slope W and dW = slope^T diag(4 / (s M)) h. That takes the three matrix products of the
plain form; to store ln s and compute x again in the backward pass would take a fourth, or a fifth for two kernels. As
in Liger-Kernel (Hsu et al. 2024, https://arxiv.org/abs/2410.10989) the loss leaves its gradients behind: it is the
last thing computed forward and the first thing needed backward, so keeping them costs no memory at the peak.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SOFTCAP = 50.0  # exp(softcap), times V, M and activations, must stay within the range of fp32 and bf16
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}  # of R x V: within a cache; enough to fill every multiprocessor


def naive_cross_entropy(h: Tensor, weight: Tensor, target_ids: Tensor, softcap: float) -> Tensor:
    """The definition: mean over M tokens of logsumexp(z) - z[target] in nats, z = softcap tanh(h weight^T / softcap).

    h (M, D), weight (V, D), target_ids (M); the product in h's dtype, the rest in fp32 or better.
    """
    x = F.linear(h, weight.to(h.dtype)).to(torch.promote_types(h.dtype, torch.float32))
    return F.cross_entropy(softcap * torch.tanh(x / softcap), target_ids)


def chunk_slopes(h: Tensor, w: Tensor, targets: Tensor, softcap: float, with_grad: bool) -> tuple[Tensor, ...]:
    """(slope, others, half_y) of a chunk: (R, V) in h's dtype, with no meaning at the targets; (R, 1) twice.

    others is the sum of exp(z) over all words but the target. h (R, D), w (V, D), targets (R, 1).
    """
    scaled = torch.addmm(h.new_zeros(1), h, w.mT, beta=0, alpha=-2 / softcap)  # (R, V)
    half = scaled.to(torch.promote_types(h.dtype, torch.float32)).sigmoid_()
    half_y = half.gather(1, targets)
    mass = torch.mul(half, -2 * softcap).add_(softcap).exp_().scatter_(1, targets, 0.0)
    others = mass.sum(dim=1, keepdim=True)
    slope = mass.mul_(half.addcmul_(half, half, value=-1)).to(h.dtype) if with_grad else mass
    return slope, others, half_y


def chunk_nats(
    h: Tensor, w: Tensor, targets: Tensor, softcap: float, num_tokens: int, dh: Tensor | None, dw: Tensor | None, slopes
) -> Tensor:
    """Nats (R) of a chunk; its share of the mean's gradients is written to dh (R, D) and added to dw (V, D)."""
    slope, others, half_y = slopes(h, w, targets, softcap, dh is not None)
    z_y = softcap * (1 - 2 * half_y)
    total = others + z_y.exp()  # s, (R, 1)
    if dh is not None:
        slope.scatter_(1, targets, (others * half_y * (half_y - 1)).to(slope.dtype))
        scale = 4 / (total * num_tokens)
        torch.mul(slope @ w, scale, out=dh)
        scaled = (h * scale).to(h.dtype)
        if h.dtype == dw.dtype:
            dw.addmm_(slope.mT, scaled)
        else:
            dw += slope.mT @ scaled
    return (total.log() - z_y).squeeze(1)


def chunked_cross_entropy(
    h: Tensor, weight: Tensor, target_ids: Tensor, softcap: float, with_grad: bool, rows: int, slopes=chunk_slopes
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dh, dW) of naive_cross_entropy, `rows` tokens at a time; without with_grad dh and dW are empty.

    dW is summed over the chunks in fp32 and has weight's dtype; `slopes` computes a chunk as chunk_slopes does.
    """
    M, w = len(h), weight.to(h.dtype).contiguous()
    wide = torch.promote_types(h.dtype, torch.float32)
    dh = torch.empty_like(h) if with_grad else h.new_empty(0)
    dw = torch.zeros_like(w, dtype=wide) if with_grad else weight.new_empty(0)
    target_ids, nats = target_ids.contiguous(), []
    for start in range(0, M, rows):
        part = slice(start, start + rows)
        grads = (dh[part], dw) if with_grad else (None, None)
        nats.append(chunk_nats(h[part], w, target_ids[part, None], softcap, M, *grads, slopes))
    return torch.cat(nats).mean(), dh, dw.to(weight.dtype)


def chunk_rows(vocab_size: int, device: torch.device, multiple: int) -> int:
    """Rows of a chunk on a device, a multiple of `multiple`."""
    rows = CHUNK_ELEMENTS["cuda" if device.type == "cuda" else "cpu"] // vocab_size
    return max(rows // multiple, 1) * multiple


@torch.library.custom_op("golf::softcapped_cross_entropy", mutates_args=())
def cross_entropy_with_grads(
    h: Tensor, weight: Tensor, target_ids: Tensor, softcap: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """chunked_cross_entropy as one operator, which torch.compile does not look into."""
    rows = chunk_rows(len(weight), h.device, multiple=16)
    return chunked_cross_entropy(h.contiguous(), weight, target_ids, softcap, with_grad, rows)


@cross_entropy_with_grads.register_kernel("cuda")
def cross_entropy_on_cuda(
    h: Tensor, weight: Tensor, target_ids: Tensor, softcap: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; in bf16 a chunk's slopes come from one Triton kernel, and its products from cuBLAS."""
    from architectures.kernels.cross_entropy_triton import LOGIT_TILE, tiled_slopes

    slopes = tiled_slopes if h.dtype == torch.bfloat16 else chunk_slopes
    rows = chunk_rows(len(weight), h.device, LOGIT_TILE["BLOCK_R"])
    return chunked_cross_entropy(h.contiguous(), weight, target_ids, softcap, with_grad, rows, slopes)


@cross_entropy_with_grads.register_fake
def cross_entropy_shapes(
    h: Tensor, weight: Tensor, target_ids: Tensor, softcap: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = h.new_empty((), dtype=torch.promote_types(h.dtype, torch.float32))
    if not with_grad:
        return loss, h.new_empty(0), weight.new_empty(0)
    return loss, h.new_empty(h.shape), weight.new_empty(weight.shape)


def keep_grads(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dh, dw = output
    ctx.mark_non_differentiable(dh, dw)
    ctx.save_for_backward(dh, dw)


def scale_grads(ctx, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise ValueError("softcapped_cross_entropy has no second derivative; use naive_cross_entropy for create_graph")
    dh, dw = ctx.saved_tensors
    return dh * grad_loss, dw * grad_loss, None, None, None


cross_entropy_with_grads.register_autograd(scale_grads, setup_context=keep_grads)


def softcapped_cross_entropy(h: Tensor, weight: Tensor, target_ids: Tensor, softcap: float) -> Tensor:
    """naive_cross_entropy, streamed: the scalar mean nats, differentiable in h (M, D) and weight (V, D).

    h in fp32 or bf16. ValueError for shapes that do not fit, for fp16, and for a softcap above MAX_SOFTCAP.
    """
    if h.ndim != 2 or weight.ndim != 2 or h.size(1) != weight.size(1) or target_ids.shape != h.shape[:1]:
        raise ValueError(
            f"h {tuple(h.shape)}, weight {tuple(weight.shape)} and target_ids {tuple(target_ids.shape)} must be "
            "(M, D), (V, D) and (M)"
        )
    if h.dtype == torch.float16:
        raise ValueError("h is float16, which cannot hold exp(softcap); use bfloat16 or float32")
    if not 0 < softcap <= MAX_SOFTCAP:
        raise ValueError(f"softcap={softcap} must be above 0 and at most {MAX_SOFTCAP}; use naive_cross_entropy")
    with_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return cross_entropy_with_grads(h, weight, target_ids, softcap, with_grad)[0]
