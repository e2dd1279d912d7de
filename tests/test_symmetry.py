import pytest
import torch
from invariance import changed_by_one_side, outputs, permutations, random_state
from torch import Tensor, fx, nn

from fedmerge.basis import rebase
from fedmerge.models import create
from fedmerge.rules import RULES
from fedmerge.spaces import Axis, UnsupportedOperation
from fedmerge.symmetry import symmetry
from fedmerge.trace import Trace

# name, shape of an image, least number of spaces (an empty answer is a wrong one)
KNOWN = [
    ("mlp", (1, 8, 8), 2),
    ("lenet5", (1, 28, 28), 4),
    ("cnn", (3, 32, 32), 3),
    ("vgg11@0.25", (3, 32, 32), 8),
    ("vgg11-bn@0.25", (3, 32, 32), 8),
    ("vgg16-bn@0.25", (3, 32, 32), 13),
    ("resnet20", (1, 28, 28), 12),
    ("resnet18", (3, 32, 32), 12),
    ("mobilenet_v2", (3, 32, 32), 25),
    ("squeezenet1_1", (3, 64, 64), 25),
]


@pytest.mark.parametrize(("name", "shape", "least"), KNOWN)
def test_permuting_all_spaces_leaves_the_outputs_unchanged(name: str, shape: tuple[int, int, int], least: int) -> None:
    generator = torch.Generator().manual_seed(1)
    model = create(name, shape=shape, num_classes=7, seed=0).double()
    spaces = symmetry(model, torch.zeros(1, *shape))
    assert len(spaces) >= least
    state = random_state(model, generator)
    images = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    before = outputs(model, state, images)
    renamed = rebase(state, spaces, permutations(spaces, generator))
    assert any(not torch.equal(renamed[name], state[name]) for name in state)
    assert (outputs(model, renamed, images) - before).abs().max() <= 1e-10 * before.abs().max()


@pytest.mark.parametrize("side", ["writers", "readers", "elementwise"])
def test_permuting_one_side_only_changes_the_outputs(side: str) -> None:
    generator = torch.Generator().manual_seed(2)
    model = create("resnet20", shape=(1, 16, 16), num_classes=3, seed=0).double()
    spaces = symmetry(model, torch.zeros(1, 1, 16, 16))
    state = random_state(model, generator)
    images = torch.randn(2, 1, 16, 16, generator=generator, dtype=torch.float64)
    before = outputs(model, state, images)
    for space in spaces:
        assert changed_by_one_side(model, state, space, side, images, before) > 1e-6


def test_resnet20_has_its_twelve_known_spaces() -> None:
    model = create("resnet20", shape=(3, 32, 32), num_classes=10, seed=0)
    spaces = symmetry(model, torch.zeros(1, 3, 32, 32))
    assert sorted(space.size for space in spaces) == [16] * 4 + [32] * 4 + [64] * 4
    streams = [space for space in spaces if len(space.writers) > 1]
    assert len(streams) == 3, "one residual stream a stage"


def test_the_writers_and_readers_of_a_linear_net_are_its_layers_in_order() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    first, second = symmetry(model, torch.zeros(1, 3))
    assert first.writers == (Axis("0.weight", 0), Axis("0.bias", 0))
    assert first.readers == (Axis("2.weight", 1),)
    assert second.readers == (Axis("4.weight", 1),)


def test_a_flatten_repeats_each_unit_once_a_position() -> None:
    model = create("cnn", shape=(1, 28, 28), num_classes=10, seed=0)
    spaces = symmetry(model, torch.zeros(1, 1, 28, 28))
    assert spaces[1].readers == (Axis("7.weight", 1, repeat=49),)


def test_concatenated_units_keep_their_own_spaces() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 4, 3, padding=1)
            self.head = nn.Conv2d(7, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            head: Tensor = self.head(torch.cat([self.left(images).relu(), self.right(images).relu()], 1))
            return head.mean((2, 3))

    left, right = symmetry(Branches(), torch.zeros(1, 1, 4, 4))
    assert left.readers == (Axis("head.weight", 1, start=0),)
    assert right.readers == (Axis("head.weight", 1, start=3),)


def test_units_of_different_treatment_are_not_exchangeable() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 6), nn.Linear(6, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            left, right = self.first(inputs).chunk(2, 1)
            result: Tensor = self.second(torch.cat([left.relu(), right.tanh()], 1))
            return result

    assert [space.size for space in symmetry(Halves(), torch.zeros(1, 2))] == [3, 3]


def test_group_norm_keeps_units_within_their_groups() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
    assert [space.size for space in symmetry(model, torch.zeros(1, 1, 4, 4))] == [3, 3]


def test_layer_norm_and_scales_and_shifts_of_ones_own_move_with_the_units() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(2, 5), nn.LayerNorm(5), nn.Linear(5, 2)
            self.scale, self.shift = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(1, 5))

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.last(self.norm(self.first(inputs) * self.scale + self.shift))
            return result

    (space,) = symmetry(Scaled(), torch.zeros(1, 2))
    assert Axis("scale", 0) in space.elementwise
    assert Axis("shift", 1) in space.writers
    assert {axis.name for axis in space.elementwise} == {"scale", "norm.weight", "norm.bias"}


def test_a_module_used_twice_ties_its_units() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.last(self.middle(self.middle(self.first(inputs)).relu()).relu())
            return result

    (space,) = symmetry(Shared(), torch.zeros(1, 2))
    assert Axis("middle.weight", 0) in space.writers
    assert Axis("middle.weight", 1) in space.readers


def test_a_channel_shuffle_is_followed() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.first(images).relu()
            size, _, height, width = hidden.size()
            hidden = hidden.view(size, 2, 3, height, width).transpose(1, 2).reshape(size, 6, height, width)
            result: Tensor = self.last(hidden)
            return result.mean((2, 3))

    (space,) = symmetry(Shuffled(), torch.zeros(1, 1, 2, 2))
    assert space.readers == (Axis("last.weight", 1, index=(0, 2, 4, 1, 3, 5)),)


def test_an_unknown_operation_is_refused_by_name() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.last(torch.cumsum(self.first(inputs), 1))
            return result

    with pytest.raises(UnsupportedOperation, match=r"node 'cumsum'.*rules=.*--align identity"):
        symmetry(Sorted(), torch.zeros(1, 2))


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs if inputs.sum() > 0 else -inputs

    with pytest.raises(UnsupportedOperation, match=r"torch\.fx cannot trace Branching"):
        symmetry(Branching(), torch.zeros(1, 2))


def test_a_rule_can_be_passed_for_a_module_of_ones_own() -> None:
    class Squash(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs / (1 + inputs.abs().amax())

    model = nn.Sequential(nn.Linear(2, 4), Squash(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedOperation):
        symmetry(model, torch.zeros(1, 2))

    def squash(trace: Trace, node: fx.Node) -> Tensor:
        argument = node.args[0]
        assert isinstance(argument, fx.Node)
        trace.mark(trace.labels(argument), node.name)
        return trace.labels(argument)

    assert [space.size for space in symmetry(model, torch.zeros(1, 2), rules={**RULES, Squash: squash})] == [4]


def test_a_wrong_rule_is_found_out() -> None:
    class Ramp(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * torch.arange(inputs.shape[1])

    def wrong(trace: Trace, node: fx.Node) -> Tensor:
        argument = node.args[0]
        assert isinstance(argument, fx.Node)
        return trace.labels(argument)

    model = nn.Sequential(nn.Linear(2, 4), Ramp(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedOperation, match="are wrong"):
        symmetry(model, torch.zeros(1, 2), rules={**RULES, Ramp: wrong})
    nn.init.zeros_(model.get_parameter("2.weight"))  # as a vision transformer's head starts
    with pytest.raises(UnsupportedOperation, match="are wrong"):
        symmetry(model, torch.zeros(1, 2), rules={**RULES, Ramp: wrong})


def test_the_model_is_left_as_it_was() -> None:
    model = create("resnet20", shape=(1, 16, 16), num_classes=3, seed=0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    symmetry(model, torch.zeros(2, 1, 16, 16))
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_units_are_observed_at_their_last_node_before_pooling() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    model.append(nn.Linear(4, 2))
    (space,) = symmetry(model, torch.zeros(1, 1, 4, 4))
    assert (space.site.node, space.site.dim, space.site.index) == ("_2", 1, (0, 1, 2, 3))


def test_a_model_that_does_not_run_in_double_precision_is_refused() -> None:
    class Single(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ torch.ones(2, 2, dtype=torch.float32)

    with pytest.raises(UnsupportedOperation, match=r"does not run on an example of shape \(1, 2\) and torch.float64"):
        symmetry(Single(), torch.zeros(1, 2))
