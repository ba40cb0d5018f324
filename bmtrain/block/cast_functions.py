"""Functions whose weights autocast casts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

CAST_BY_AUTOCAST = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.scaled_dot_product_attention, F.multi_head_attention_forward, torch.matmul, torch.mm, torch.bmm, torch.addmm,
    torch.baddbmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__,
    torch.Tensor.mm, torch.Tensor.bmm,
}  # fmt: skip
"""What they get outside of a forward may be gathered cast; for every other function it is gathered as it rests."""
