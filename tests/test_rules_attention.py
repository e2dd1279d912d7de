"""Attention as a module, as a function and by hand; each `symmetry` proves itself on the network's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmerge.features import features_of, observer
from fedmerge.spaces import Axis
from fedmerge.symmetry import symmetry


def names(found: tuple[Axis, ...]) -> set[str]:
    return {axis.name for axis in found}


class Attention(nn.Module):
    """A patch embedding with class token and positions, attention written in one of three ways, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.rand(8))
        if kind == "module":
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        else:
            self.packed, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, patches: Tensor) -> Tensor:
        hidden = torch.cat([self.token.expand(patches.shape[0], -1, -1), self.embed(patches)], 1) + self.positions
        hidden = hidden + self.scale * self.attend(self.norm(hidden))
        found: Tensor = self.head(hidden[:, 0])
        return found

    def attend(self, hidden: Tensor) -> Tensor:
        if self.kind == "module":
            found: Tensor = self.attention(hidden, hidden, hidden, need_weights=False)[0]
            return found
        size, length, width = hidden.shape
        query, key, value = self.packed(hidden).reshape(size, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "function":
            found = functional.scaled_dot_product_attention(query, key, value)
        else:
            found = torch.softmax(query @ key.transpose(-2, -1) * width**-0.5, -1) @ value
        result: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize("kind", ["module", "function", "by hand"])
def test_attention_has_the_stream_and_the_units_of_its_heads(kind: str) -> None:
    model = Attention(kind)
    spaces = symmetry(model, torch.zeros(2, 4, 5))
    assert sorted(space.size for space in spaces) == [4, 4, 4, 4, 8]
    stream = spaces[0]
    packed, out = (
        ("attention.in_proj_weight", "attention.out_proj.weight")
        if kind == "module"
        else (
            "packed.weight",
            "out.weight",
        )
    )
    assert {Axis("token", 2), Axis("positions", 2), Axis(out, 0), Axis("embed.weight", 0)} <= set(stream.writers)
    assert set(stream.readers) == {Axis(packed, 1), Axis("head.weight", 1)}
    assert set(stream.elementwise) == {Axis("norm.weight", 0), Axis("norm.bias", 0), Axis("scale", 0)}
    values = [space for space in spaces if Axis(out, 1, start=4) in space.readers]
    assert [space.writers[0] for space in values] == [Axis(packed, 0, start=20)]
    rows = {index for space in spaces[1:] for axis in space.axes if axis.name == packed for index in range(24)}
    assert len(rows) == 24


def test_queries_and_keys_of_a_head_move_together() -> None:
    spaces = symmetry(Attention("module"), torch.zeros(2, 4, 5))
    (second,) = [space for space in spaces if Axis("attention.in_proj_weight", 0, start=4) in space.writers]
    assert second.writers == tuple(Axis(f"attention.in_proj_{part}", 0, start=4) for part in ("weight", "bias"))
    assert second.readers == tuple(Axis(f"attention.in_proj_{part}", 0, start=12) for part in ("weight", "bias"))
    assert second.site.weight == "attention.in_proj_weight"
    assert second.site.bias == "attention.in_proj_bias"
    assert second.site.index == (4, 5, 6, 7)


class Crossed(nn.Module):
    """Attention from one sequence to another, with all of the module's options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(3, options.get("kdim", 6))
        self.attention = nn.MultiheadAttention(6, 2, **options)
        self.last = nn.Linear(6, 2)
        self.register_buffer("mask", torch.tensor([[0.0, -1.0, 2.0]] * 2))

    def forward(self, inputs: Tensor) -> Tensor:
        start, end = inputs[:2], inputs[2:]
        memory = self.second(end)
        found, averaged = self.attention(self.first(start), memory, memory, attn_mask=self.mask)
        result: Tensor = self.last(found) + averaged.sum()
        return result


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 4, "vdim": 4}, {"add_zero_attn": True}])
def test_attention_between_two_sequences_reads_each_with_its_own_block(options: dict[str, Any]) -> None:
    model = Crossed(**options)
    spaces = {space.writers[0].name: space for space in symmetry(model, torch.zeros(5, 2, 3))}
    if "kdim" in options:
        assert spaces["first.weight"].readers == (Axis("attention.q_proj_weight", 1),)
        assert names(spaces["second.weight"].readers) == {"attention.k_proj_weight", "attention.v_proj_weight"}
    else:
        packed = "attention.in_proj_weight"
        assert spaces["first.weight"].readers == (Axis(packed, 1, within=(0, 0, 6)),)
        assert spaces["second.weight"].readers == tuple(Axis(packed, 1, within=(0, at, at + 6)) for at in (6, 12))


def test_appended_keys_and_values_belong_to_the_units() -> None:
    spaces = symmetry(Crossed(add_bias_kv=True), torch.zeros(5, 2, 3))
    assert [space.size for space in spaces if "attention.bias_k" in names(space.readers)] == [3, 3]
    assert [space.size for space in spaces if "attention.bias_v" in names(space.writers)] == [3, 3]


def test_a_transformer_layer_of_torch_is_opened() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2))
    assert sorted(space.size for space in symmetry(model, torch.zeros(2, 4, 3))) == [4, 4, 4, 4, 8, 12]


def test_a_token_beside_units_becomes_theirs_whatever_meets_them_next() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.token, self.scale = nn.Parameter(torch.rand(1, 1, 4)), nn.Parameter(torch.rand(4))

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.cat([self.token.expand(inputs.shape[0], -1, -1), self.first(inputs)], 1) * self.scale
            found: Tensor = self.last(hidden.mean(1))
            return found

    (space,) = symmetry(Scaled(), torch.zeros(2, 5, 3))
    assert Axis("token", 2) in space.writers
    assert space.elementwise == (Axis("scale", 0),)


def test_units_that_mask_attention_are_fixed() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask, self.first, self.last = nn.Linear(3, 5), nn.Linear(3, 4), nn.Linear(5, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            mask, hidden = self.mask(inputs), self.first(inputs)
            found = functional.scaled_dot_product_attention(hidden, inputs.repeat(1, 1, 2)[..., :4], inputs, mask)
            result: Tensor = found + self.last(mask).sum(-1, keepdim=True)
            return result

    assert symmetry(Masked(), torch.zeros(2, 5, 3)) == ()


def test_a_site_inside_of_an_operation_is_the_projection_that_it_computes() -> None:
    model = Attention("module").double()
    patches = torch.randn(2, 4, 5, dtype=torch.float64)
    space = next(space for space in symmetry(model, patches) if space.site.weight is not None)
    module = observer(model, [space])
    state = model.state_dict()
    (value,) = module(patches)
    rows = list(space.site.index)
    expected = value.flatten(0, 1) @ state["attention.in_proj_weight"][rows].T + state["attention.in_proj_bias"][rows]
    torch.testing.assert_close(features_of(value, space, state), expected)
