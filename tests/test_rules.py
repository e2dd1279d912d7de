"""What single operations do to units, in small networks; each `symmetry` proves itself on the network's outputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from fedmerge.basis import Permutation, rebase
from fedmerge.rules import RULES
from fedmerge.spaces import Axis, Space, UnsupportedOperation
from fedmerge.symmetry import symmetry


def sizes(model: nn.Module, *shape: int) -> list[int]:
    return sorted(space.size for space in symmetry(model, torch.zeros(2, *shape)))


def axes(model: nn.Module, *shape: int) -> list[tuple[set[Axis], set[Axis], set[Axis]]]:
    spaces = symmetry(model, torch.zeros(2, *shape))
    return [(set(space.writers), set(space.readers), set(space.elementwise)) for space in spaces]


def names(found: tuple[Axis, ...]) -> set[str]:
    return {axis.name for axis in found}


class Layers(nn.Module):
    """Convolutions, plain, grouped and depthwise, and norms; called as modules or by their functions."""

    def __init__(self, functions: bool) -> None:
        super().__init__()
        self.functions = functions
        self.first, self.batch = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.groups = nn.Conv2d(8, 12, 3, groups=2), nn.GroupNorm(2, 12)
        self.depthwise = nn.Conv2d(12, 24, 1, groups=12)
        self.hidden, self.layer, self.last = nn.Linear(24, 10), nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, images: Tensor) -> Tensor:
        if not self.functions:
            hidden = self.groups(self.grouped(self.batch(self.first(images)).relu())).relu()
            hidden = self.depthwise(hidden).mean((2, 3))
            found: Tensor = self.last(self.layer(self.hidden(hidden)))
            return found
        hidden = functional.conv2d(images, self.first.weight, self.first.bias, padding=1)
        mean, variance = self.batch.running_mean, self.batch.running_var
        hidden = functional.batch_norm(hidden, mean, variance, self.batch.weight, self.batch.bias).relu()
        hidden = functional.conv2d(hidden, self.grouped.weight, self.grouped.bias, groups=2)
        hidden = functional.group_norm(hidden, 2, self.groups.weight, bias=self.groups.bias).relu()
        hidden = functional.conv2d(hidden, self.depthwise.weight, self.depthwise.bias, 1, 0, 1, 12).mean((2, 3))
        hidden = functional.linear(hidden, self.hidden.weight, bias=self.hidden.bias)
        hidden = functional.layer_norm(hidden, (10,), self.layer.weight, self.layer.bias)
        return functional.linear(hidden, self.last.weight, self.last.bias)


def test_functions_have_the_spaces_of_their_modules() -> None:
    found = axes(Layers(functions=False), 2, 6, 6)
    assert found == axes(Layers(functions=True), 2, 6, 6)
    assert [len(writers) for writers, _, _ in found] == [2] * 5


def test_units_of_grouped_convolutions_are_exchangeable_within_their_groups() -> None:
    model = Layers(functions=False)
    first, second, left, right, _ = symmetry(model, torch.zeros(1, 2, 6, 6))
    assert (first.size, second.size, left.size, right.size) == (4, 4, 6, 6)
    assert first.readers == (Axis("grouped.weight", 1, within=(0, 0, 6)),)
    assert second.readers == (Axis("grouped.weight", 1, within=(0, 6, 12)),)
    assert second.writers == (Axis("first.weight", 0, start=4), Axis("first.bias", 0, start=4))
    assert right.writers == (Axis("grouped.weight", 0, start=6), Axis("grouped.bias", 0, start=6))
    assert Axis("depthwise.weight", 0, repeat=2, start=12) in right.elementwise


def test_layers_of_ones_own_are_known_by_the_forward_pass_that_they_inherit() -> None:
    class Renamed(nn.Linear):
        pass

    class Calling(nn.Conv2d):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).relu()

    model = nn.Sequential(Calling(1, 4, 3), nn.Flatten(), Renamed(16, 5), Renamed(5, 2))
    assert sizes(model, 1, 4, 4) == [4, 5]


def test_a_weight_that_is_computed_is_refused() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, inputs: Tensor) -> Tensor:
            return functional.conv2d(inputs, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    with pytest.raises(UnsupportedOperation, match=r"node 'conv2d'.*weight is computed by 'sub'"):
        symmetry(nn.Sequential(Standardised(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.zeros(1, 1, 4, 4))
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    with pytest.raises(UnsupportedOperation, match=r"node '_0'.*'0.weight' is not in the state dict"):
        symmetry(model, torch.zeros(1, 3))


def test_a_shortcut_that_is_padded_with_zeros_keeps_the_new_units_exchangeable() -> None:
    class OptionA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 2)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.first(images).relu()
            shortcut = functional.pad(hidden[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
            found: Tensor = self.last((self.second(hidden)[:, :, ::2, ::2] + shortcut).relu().mean((2, 3)))
            return found

    assert axes(OptionA(), 1, 4, 4) == [
        (
            {
                *(Axis("first.weight", 0), Axis("first.bias", 0)),
                *(Axis("second.weight", 0, start=2), Axis("second.bias", 0, start=2)),
            },
            {Axis("second.weight", 1), Axis("last.weight", 1, start=2)},
            set(),
        ),
        (
            {Axis("second.weight", 0, index=(0, 1, 6, 7)), Axis("second.bias", 0, index=(0, 1, 6, 7))},
            {Axis("last.weight", 1, index=(0, 1, 6, 7))},
            set(),
        ),
    ]


def test_constants_of_different_value_are_not_exchangeable() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            shortcut = functional.pad(functional.pad(self.first(inputs), (2, 0)), (0, 2), value=5.0)
            found: Tensor = self.last((self.second(inputs) + shortcut).relu())
            return found

    assert sizes(Padded(), 3) == [2, 2, 4]


class Between(nn.Module):
    """Any function of hidden units between two linear layers."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.gain = nn.Parameter(torch.rand(1))

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.last(self.between(self.first(inputs)))
        return found

    def between(self, hidden: Tensor) -> Tensor:
        return hidden


def test_a_norm_of_ones_own_is_followed() -> None:
    class Normalised(Between):
        def between(self, hidden: Tensor) -> Tensor:
            centred = hidden - hidden.mean(-1, keepdim=True)
            scaled = centred * torch.rsqrt(hidden.var(dim=-1, keepdim=True) + 1e-5)
            return scaled * (1 + self.weight) * self.gain + self.bias

    ((_, readers, elementwise),) = axes(Normalised(), 3)
    assert readers == {Axis("last.weight", 1)}
    assert elementwise == {Axis("weight", 0)}


@pytest.mark.parametrize("function", [torch.softmax, functional.normalize, functional.log_softmax])
def test_units_that_are_normalised_together_are_exchangeable_within_their_part(function: Any) -> None:
    class Softmax(Between):
        def between(self, hidden: Tensor) -> Tensor:
            found: Tensor = function(hidden.reshape(hidden.shape[0], 2, 3), dim=-1)
            return found.flatten(1)

    assert sizes(Softmax(), 3) == [3, 3]


def test_units_that_are_read_more_often_are_a_space_of_their_own() -> None:
    class Twice(Between):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 2)

        def between(self, hidden: Tensor) -> Tensor:
            return torch.cat([hidden, hidden[:, :2]], 1)

    assert sizes(Twice(), 3) == [2, 4]


def test_a_gate_of_one_unit_meets_all_units_alike() -> None:
    class Gated(Between):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gate = nn.Linear(6, 5), nn.Linear(5, 1)

        def between(self, hidden: Tensor) -> Tensor:
            return hidden * torch.sigmoid(self.gate(self.inner(hidden).relu()))

    assert sizes(Gated(), 3) == [5, 6]


def test_a_unit_that_is_singled_out_is_not_exchangeable() -> None:
    class Chosen(Between):
        def between(self, hidden: Tensor) -> Tensor:
            return hidden * hidden[:, :1]

    assert sizes(Chosen(), 3) == [5]


def test_units_of_which_each_part_is_scaled_differently_stay_in_their_part() -> None:
    class Parts(Between):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Parameter(torch.rand(2, 1))

        def between(self, hidden: Tensor) -> Tensor:
            return (hidden.reshape(-1, 2, 3) * self.scales).flatten(1)

    assert sizes(Parts(), 3) == [3, 3]


def test_weights_shared_by_parts_tie_the_parts() -> None:
    class Tied(Between):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(3)

        def between(self, hidden: Tensor) -> Tensor:
            found: Tensor = self.norm(hidden.reshape(-1, 2, 3))
            return found.flatten(1)

    (space,) = symmetry(Tied(), torch.zeros(2, 3))
    assert space.writers[0] == Axis("first.weight", 0, repeat=2, index=(0, 3, 1, 4, 2, 5))
    assert {axis.name for axis in space.elementwise} == {"norm.weight", "norm.bias"}


def test_slopes_of_units_move_with_them() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 2))
    first, second = symmetry(model, torch.zeros(2, 3))
    assert first.elementwise == (Axis("1.weight", 0),)
    assert second.elementwise == ()


def test_a_parameter_of_several_rows_may_serve_several_spaces() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.shifts = nn.Parameter(torch.rand(2, 4))

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = (self.first(inputs) + self.shifts[0]).relu()
            found: Tensor = self.last((self.second(hidden) + self.shifts[1]).relu())
            return found

    first, second = symmetry(Rows(), torch.zeros(2, 3))
    assert Axis("shifts", 1, within=(0, 0, 1)) in first.writers
    assert Axis("shifts", 1, within=(0, 1, 2)) in second.writers


def test_a_matrix_that_is_multiplied_from_the_right_reads_and_writes() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.rand(3, 4)), nn.Parameter(torch.rand(4, 2))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs @ self.first).relu() @ self.second

    assert axes(Product(), 3) == [({Axis("first", 1)}, {Axis("second", 0)}, set())]


def test_tokens_that_nothing_was_added_to_are_units_as_well() -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompts, self.mix, self.last = nn.Parameter(torch.rand(1, 3, 4)), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            found: Tensor = self.last(self.mix(self.prompts.expand(inputs.shape[0], -1, -1)).relu().mean(1))
            return found * inputs.sum(1, keepdim=True)

    assert axes(Prompted(), 2)[0] == ({Axis("prompts", 2)}, {Axis("mix.weight", 1)}, set())


def test_constants_that_are_read_are_inputs_and_those_that_are_added_move() -> None:
    class Constants(Between):
        def __init__(self) -> None:
            super().__init__()
            self.table: Tensor
            self.points: Tensor
            self.register_buffer("table", torch.rand(4, 6))
            self.register_buffer("points", torch.rand(7, 3))

        def between(self, hidden: Tensor) -> Tensor:
            found: Tensor = hidden + self.table[0] + self.first(self.points).relu().mean(0)
            return found

    ((writers, _, _),) = axes(Constants(), 3)
    assert Axis("table", 1) in writers


def test_one_tensor_of_two_names_moves_under_both() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[4].weight = model[2].weight
    (space,) = symmetry(model, torch.zeros(2, 3))
    assert {Axis("2.weight", 0), Axis("4.weight", 0)} <= set(space.writers)
    renamed = rebase(model.state_dict(), [space], [_roll(space)])
    assert torch.equal(renamed["2.weight"], renamed["4.weight"])


def test_units_in_an_order_that_a_constant_gives_are_followed() -> None:
    class Reordered(Between):
        def __init__(self) -> None:
            super().__init__()
            self.order: Tensor
            self.register_buffer("order", torch.tensor([5, 3, 1, 0, 2, 4]))

        def between(self, hidden: Tensor) -> Tensor:
            return hidden[:, self.order]

    (space,) = symmetry(Reordered(), torch.zeros(2, 3))
    assert space.readers == (Axis("last.weight", 1, index=(3, 2, 4, 1, 5, 0)),)


def test_an_autoencoder_of_transposed_convolutions_is_followed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 1, 1))
    assert sizes(model, 1, 5, 5) == [4, 5]


def test_all_outputs_of_a_model_are_fixed_and_proven() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 5)

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            hidden = self.first(inputs).relu()
            return {"left": self.left(hidden), "right": self.right(hidden)}

    assert sizes(Two(), 3) == [4]


@pytest.mark.parametrize(
    ("reason", "function"),
    [
        ("belongs to a unit of both factors", lambda hidden: (hidden[..., None] @ hidden[:, None]).sum(-1)),
        ("lie along dimension 2, expected 1", lambda hidden: functional.avg_pool1d(hidden[:, None], 1)[:, 0]),
        ("reduces all dimensions", lambda hidden: hidden / hidden.sum()),
        ("different dimensions", lambda hidden: (hidden[..., None] * hidden[:, None]).sum(-1)),
        ("is a vector", lambda hidden: hidden * (hidden[0] @ hidden[0])),
    ],
)
def test_what_units_cannot_be_followed_through_is_refused_with_its_reason(reason: str, function: Any) -> None:
    class Refused(Between):
        def between(self, hidden: Tensor) -> Tensor:
            found: Tensor = function(hidden)
            return found

    with pytest.raises(UnsupportedOperation, match=rf"(?s)node '.*{reason}.*rules="):
        symmetry(Refused(), torch.zeros(2, 3))


def test_rules_are_found_by_qualified_name() -> None:
    class Wavy(Between):
        def between(self, hidden: Tensor) -> Tensor:
            return torch.sin(hidden) + math.pi

    with pytest.raises(UnsupportedOperation, match=r"node 'sin'.*RULES, torch\.sin: rule"):
        symmetry(Wavy(), torch.zeros(2, 3))
    rules = {**RULES, "torch.sin": RULES[torch.tanh]}
    assert [space.size for space in symmetry(Wavy(), torch.zeros(2, 3), rules=rules)] == [6]


def _roll(space: Space) -> Permutation:
    return Permutation(torch.arange(space.size).roll(1))
