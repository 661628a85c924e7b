"""Residual streams summed with gains per channel, and the RMS norm of the sum: one pass forward, one pass backward.

Letters: M rows, D model_dim, K terms. With u_i the terms and w_i their gains,
    mixed = sum_i w_i u_i,    normed = mixed / s,    s^2 = mean(mixed^2) + eps.
Backward, with g the gradient that mixed has by itself and through the norm,
    g = d_mixed + (d_normed - normed mean(normed d_normed)) / s,    du_i = w_i g,    dw_i = sum over rows of u_i g.
The terms are needed for dw anyway, so mixed and s are made of them again and nothing is kept but the inputs. A pre-norm
block with its residual scale and its mix of the embedding is two such sums, each with the next layer's norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TERMS, MAX_NORM_DIM = 5, 2048  # what the kernels hold in registers


def naive_mix_norm(terms: list[Tensor], gains: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: (mixed, normed), both (..., D), of K terms (..., D) and gains (K, D), as layers.py writes it."""
    mixed = sum(gain.to(term.dtype) * term for gain, term in zip(gains, terms, strict=True))
    return mixed, F.rms_norm(mixed, (mixed.size(-1),))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """In which sums over x are taken."""
    return torch.promote_types(x.dtype, torch.float32)


def norm_eps(x: Tensor) -> float:
    """The eps of F.rms_norm for x."""
    return torch.finfo(accumulation_dtype(x)).eps


@torch.library.custom_op("golf::mix_norm", mutates_args=())
def mix_norm_op(terms: list[Tensor], gains: Tensor) -> tuple[Tensor, Tensor]:
    """naive_mix_norm, the sum rounded once."""
    wide = accumulation_dtype(terms[0])
    mixed = sum(gain.to(wide) * term.to(wide) for gain, term in zip(gains, terms, strict=True))
    scale = (mixed.square().mean(dim=-1, keepdim=True) + norm_eps(terms[0])).rsqrt()
    return mixed.to(terms[0].dtype), (mixed * scale).to(terms[0].dtype)


@mix_norm_op.register_kernel("cuda")
def mix_norm_on_cuda(terms: list[Tensor], gains: Tensor) -> tuple[Tensor, Tensor]:
    from architectures.kernels.fused_norm_triton import launch_mix_norm

    return launch_mix_norm(terms, gains)


@mix_norm_op.register_fake
def mix_norm_shapes(terms: list[Tensor], gains: Tensor) -> tuple[Tensor, Tensor]:
    return terms[0].new_empty(terms[0].shape), terms[0].new_empty(terms[0].shape)


@torch.library.custom_op("golf::mix_norm_backward", mutates_args=())
def mix_norm_backward(d_mixed: Tensor, d_normed: Tensor, terms: list[Tensor], gains: Tensor) -> list[Tensor]:
    """[du_1, .., du_K, dw], in the shapes and dtypes of the terms and of gains."""
    dtype, wide = terms[0].dtype, accumulation_dtype(terms[0])
    mixed = sum(gain.to(wide) * term.to(wide) for gain, term in zip(gains, terms, strict=True))
    scale = (mixed.square().mean(dim=-1, keepdim=True) + norm_eps(terms[0])).rsqrt()
    normed, d_normed = mixed * scale, d_normed.to(wide)
    g = d_mixed.to(wide) + scale * (d_normed - normed * (normed * d_normed).mean(dim=-1, keepdim=True))
    d_gains = torch.stack([(term.to(wide) * g).flatten(0, -2).sum(dim=0) for term in terms])
    return [*((gain.to(wide) * g).to(dtype) for gain in gains), d_gains.to(gains.dtype)]


@mix_norm_backward.register_kernel("cuda")
def mix_norm_backward_on_cuda(d_mixed: Tensor, d_normed: Tensor, terms: list[Tensor], gains: Tensor) -> list[Tensor]:
    from architectures.kernels.fused_norm_triton import launch_mix_norm_backward

    return launch_mix_norm_backward(d_mixed, d_normed, terms, gains)


@mix_norm_backward.register_fake
def mix_norm_backward_shapes(d_mixed: Tensor, d_normed: Tensor, terms: list[Tensor], gains: Tensor) -> list[Tensor]:
    return [*(term.new_empty(term.shape) for term in terms), gains.new_empty(gains.shape)]


def keep_terms(ctx, inputs: tuple[list[Tensor], Tensor], output: tuple[Tensor, Tensor]) -> None:
    terms, gains = inputs
    ctx.save_for_backward(*terms, gains)


def mix_norm_gradients(ctx, d_mixed: Tensor, d_normed: Tensor) -> tuple[list[Tensor], Tensor]:
    *terms, gains = ctx.saved_tensors
    *d_terms, d_gains = mix_norm_backward(d_mixed, d_normed, terms, gains)
    return d_terms, d_gains


mix_norm_op.register_autograd(mix_norm_gradients, setup_context=keep_terms)


def mix_norm(terms: list[Tensor], gains: Tensor) -> tuple[Tensor, Tensor]:
    """naive_mix_norm in one pass, differentiable once: (mixed, normed), both (..., D).

    1 to MAX_TERMS terms (..., D) of one dtype, gains (K, D). ValueError for what does not fit.
    """
    shape, dtype = terms[0].shape, terms[0].dtype
    if not len(terms) <= MAX_TERMS or gains.shape != (len(terms), shape[-1]) or shape[-1] > MAX_NORM_DIM:
        raise ValueError(
            f"{len(terms)} terms of {tuple(shape)} and gains {tuple(gains.shape)} must be at most {MAX_TERMS} terms "
            f"(..., D) and gains (K, D), D at most {MAX_NORM_DIM}"
        )
    if any(term.shape != shape or term.dtype != dtype for term in terms):
        found = ", ".join(f"{tuple(term.shape)} {term.dtype}" for term in terms)
        raise ValueError(f"the terms must have one shape and dtype; they are {found}")
    return mix_norm_op(terms, gains)
