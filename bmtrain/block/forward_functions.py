"""Functions that belong to a model's forward even when no module of ours is running."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FORWARD_FUNCTIONS = {
    F.linear, F.embedding, F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.bilinear, F.conv1d, F.conv2d,
    F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.scaled_dot_product_attention, F.prelu,
    F.embedding_bag, F.multi_head_attention_forward, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm,
    torch.einsum, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.mm,
    torch.Tensor.bmm,
}  # fmt: skip
