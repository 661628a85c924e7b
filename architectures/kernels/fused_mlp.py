"""The relu^2 MLP, its activation evaluated where the product that needs it ends, forward and backward.

Letters: M rows, D model_dim, F hidden width. Without biases, and y of any width:
    act = relu(x U^T)^2,    y = act V^T,    d_hidden = (dy V) * 2 relu(x U^T) = (dy V) * 2 sqrt(act).
A root undoes the square, so act alone is written and kept: neither x U^T nor dy V reaches memory. The other products,
y, dV = dy^T act, dU = d_hidden^T x and dx = d_hidden U, are the library's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_relu2_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The definition: y (M, D') of x (M, D), up (F, D) and down (D', F)."""
    return F.linear(F.relu(F.linear(x, up)).square(), down)


def relu2_up(x: Tensor, up: Tensor) -> Tensor:
    """act (M, F)."""
    return F.linear(x, up).relu_().square()


def relu2_down_gradient(dy: Tensor, down: Tensor, act: Tensor) -> Tensor:
    """d_hidden (M, F)."""
    return (dy @ down).mul_(act.sqrt().mul_(2))


@torch.library.custom_op("golf::relu2_mlp", mutates_args=())
def relu2_mlp_op(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(y, act)."""
    act = relu2_up(x, up)
    return F.linear(act, down), act


@relu2_mlp_op.register_kernel("cuda")
def relu2_mlp_on_cuda(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    from architectures.kernels.fused_mlp_triton import launch_relu2_up

    act = launch_relu2_up(x, up)
    return F.linear(act, down), act


@relu2_mlp_op.register_fake
def relu2_mlp_shapes(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(down)), x.new_empty(len(x), len(up))


def mlp_gradients(d_hidden: Tensor, dy: Tensor, x: Tensor, up: Tensor, act: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dU, dV)."""
    return d_hidden @ up, d_hidden.mT @ x, dy.mT @ act


@torch.library.custom_op("golf::relu2_mlp_backward", mutates_args=())
def relu2_mlp_backward(dy: Tensor, x: Tensor, up: Tensor, down: Tensor, act: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mlp_gradients of the gradient of y."""
    return mlp_gradients(relu2_down_gradient(dy, down, act), dy, x, up, act)


@relu2_mlp_backward.register_kernel("cuda")
def relu2_mlp_backward_on_cuda(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, act: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from architectures.kernels.fused_mlp_triton import launch_relu2_down_gradient

    return mlp_gradients(launch_relu2_down_gradient(dy, down, act), dy, x, up, act)


@relu2_mlp_backward.register_fake
def relu2_mlp_backward_shapes(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, act: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), up.new_empty(up.shape), down.new_empty(down.shape)


def keep_activation(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def relu2_mlp_gradients(ctx, dy: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return relu2_mlp_backward(dy, *ctx.saved_tensors)


relu2_mlp_op.register_autograd(relu2_mlp_gradients, setup_context=keep_activation)


def relu2_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """naive_relu2_mlp, differentiable once: y (..., D') of x (..., D), up (F, D) and down (D', F), all of one dtype.

    ValueError for what does not fit.
    """
    if up.ndim != 2 or down.ndim != 2 or x.size(-1) != up.size(1) or len(up) != down.size(1):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, up, down))
        raise ValueError(f"x, up and down of shapes {shapes} must be (..., D), (F, D) and (D', F)")
    if not x.dtype == up.dtype == down.dtype:
        raise ValueError(f"x, up and down are {x.dtype}, {up.dtype}, {down.dtype}; make them one dtype")
    y, _ = relu2_mlp_op(x.flatten(0, -2), up, down)
    return y.view(*x.shape[:-1], len(down))
