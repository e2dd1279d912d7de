"""What operations do to units: the rule table of `fedmerge.symmetry`.

A rule gets the trace and a node and returns the labels of the node's output; it tells the trace which weights are
indexed by which units, and marks units that are treated differently from others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedmerge.graph import Rule, RuleTable
from fedmerge.rules.attention import (
    matrix_product,
    multihead_attention,
    scaled_dot_product_attention,
    shifted_window_attention,
)
from fedmerge.rules.elements import normalization, pointwise, pooling, reduction, unchanged
from fedmerge.rules.layers import (
    batch_norm,
    convolution,
    group_norm,
    layer_norm,
    linear,
    parametric_relu,
    transposed_convolution,
)
from fedmerge.rules.movement import attribute, concatenation, movement, padding, side_by_side

_POINTWISE: tuple[Any, ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity),
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, operator.neg),
    *(operator.pow, torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.square, torch.abs),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.clamp, torch.where),
    *(functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.selu, functional.gelu),
    *(functional.silu, functional.mish, functional.sigmoid, functional.logsigmoid, functional.tanh),
    *(functional.hardtanh, functional.hardswish, functional.hardsigmoid, functional.softplus),
    *(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d),
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "pow", "square", "abs"),
    *("relu", "relu_", "sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "clamp", "masked_fill"),
    "torchvision.ops.stochastic_depth.stochastic_depth",
    "torchvision.ops.stochastic_depth.StochasticDepth",
)
_UNCHANGED = ("contiguous", "clone", "float", "double", "to", "type_as", "detach")
_POOLING = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample),
    *(functional.max_pool1d, functional.max_pool2d, functional.max_pool3d),
    *(functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
    *(functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d),
    *(functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.interpolate),
)
_MOVEMENT = (
    *(nn.Flatten, nn.Unflatten, nn.ChannelShuffle, torch.flatten, torch.stack, torch.chunk, torch.split, torch.unbind),
    *(torch.permute, torch.transpose, torch.reshape, torch.squeeze, torch.unsqueeze, torch.roll, torch.flip),
    *(torch.index_select, torch.swapaxes, torch.movedim, functional.channel_shuffle, operator.getitem),
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split"),
    *("expand", "expand_as", "repeat", "unbind", "roll", "flip", "narrow", "select", "t", "swapaxes", "movedim"),
    "torchvision.models.swin_transformer._get_relative_position_bias",
)
_PADDING = (
    *(functional.pad, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ConstantPad1d, nn.ConstantPad2d),
)

RULES: RuleTable = {
    **dict.fromkeys((nn.Linear, functional.linear), linear),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), transposed_convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), batch_norm),
    **dict.fromkeys((functional.batch_norm, torch.batch_norm, functional.instance_norm), batch_norm),
    **dict.fromkeys((nn.LayerNorm, functional.layer_norm, torch.layer_norm), layer_norm),
    **dict.fromkeys((nn.RMSNorm, functional.rms_norm), layer_norm),
    **dict.fromkeys((nn.GroupNorm, functional.group_norm, torch.group_norm), group_norm),
    **dict.fromkeys((nn.PReLU, functional.prelu), parametric_relu),
    nn.MultiheadAttention: multihead_attention,
    functional.scaled_dot_product_attention: scaled_dot_product_attention,
    "torchvision.models.swin_transformer.shifted_window_attention": shifted_window_attention,
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"), matrix_product),
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_UNCHANGED, unchanged),
    **dict.fromkeys(_POOLING, pooling),
    **dict.fromkeys((torch.mean, torch.sum, torch.var, torch.std, "mean", "sum", "var", "std"), reduction),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, torch.softmax, torch.log_softmax), normalization),
    **dict.fromkeys((functional.softmax, functional.log_softmax, functional.normalize, "softmax"), normalization),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenation),
    **dict.fromkeys(_PADDING, padding),
    **dict.fromkeys(_MOVEMENT, movement),
    "torchvision.models.swin_transformer._patch_merging_pad": side_by_side,
    **dict.fromkeys(("size", "dim", "numel", getattr), attribute),
}
"""The rules that come with fedmerge, by module class, function and method name; by qualified name where importing the
class or function would need another package."""

__all__ = ["RULES", "Rule", "RuleTable"]
