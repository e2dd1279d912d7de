"""Folding a BatchNorm and restoring it keeps the function, exactly; what cannot be folded is told apart."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.align.comparison import target
from fedmerge.architectures import ResidualBlock
from fedmerge.basis import Linear, rebase
from fedmerge.calibrate import calibrate
from fedmerge.features import moments
from fedmerge.folding import Folding, Target, fold, restore
from fedmerge.merge.average import mean_state
from fedmerge.models import create
from fedmerge.symmetry import symmetry

SHAPE = (2, 8, 8)


def random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Weights in float64 with statistics, and scales of both signs, as after any training."""
    stream = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=stream, dtype=torch.float64)
        if not tensor.is_floating_point():
            state[name] = torch.tensor(seed)
        elif name.endswith("running_var"):
            state[name] = 0.5 + noise.square()
        else:
            state[name] = noise * 0.3
    return state


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def folding(model: nn.Module) -> Folding:
    return Folding(model, symmetry(model, images(2)))


def outputs(model: nn.Module, state: dict[str, Tensor], inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = functional_call(model, state, (inputs,))
    return found


def targets(
    model: nn.Module, found: Folding, state: dict[str, Tensor], reference: dict[str, Tensor], inputs: Tensor
) -> list[Target]:
    _, of_model = moments(model, found.sites, [reference, state], 0, inputs)
    return [
        target(norm, axis, *zip(part.joint.means, part.variances, strict=True))
        for (_, norm, axis), part in zip(found.observed, of_model, strict=True)
    ]


def biased() -> nn.Module:
    """Layers with a bias before their BatchNorm, and a BatchNorm of one dimension."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(4 * 36, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
    ).eval()


MODELS = {
    "resnet20": lambda: create("resnet20@0.25", shape=SHAPE, num_classes=3, seed=0),
    "vgg11-bn": lambda: create("vgg11-bn@0.05", shape=SHAPE, num_classes=3, seed=0),
    "biased": biased,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_through_folding_and_comes_back_as_it_was(name: str) -> None:
    model = MODELS[name]().double()
    state, inputs = random_state(model, 1), images(20)
    found = folding(model)
    assert len(found.norms) == sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert all(found.dense)
    expected = outputs(model, state, inputs)
    folded = fold(state, found.norms)
    torch.testing.assert_close(outputs(model, folded, inputs), expected, rtol=1e-10, atol=1e-10)
    back = restore(folded, state, targets(model, found, state, state, inputs))
    for key, tensor in state.items():
        torch.testing.assert_close(back[key], tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_restored_in_anothers_scale_keeps_its_function(name: str) -> None:
    model = MODELS[name]().double()
    state, reference, inputs = random_state(model, 1), random_state(model, 2), images(20)
    found = folding(model)
    back = restore(fold(state, found.norms), reference, targets(model, found, state, reference, inputs))
    expected = outputs(model, state, inputs)
    torch.testing.assert_close(outputs(model, back, inputs), expected, rtol=1e-8, atol=1e-8)


def test_restored_scales_and_shifts_are_the_deviation_and_mean_against_the_references() -> None:
    model = biased().double()
    state, reference, inputs = random_state(model, 1), random_state(model, 2), images(50)
    found = folding(model)
    back = restore(fold(state, found.norms), reference, targets(model, found, state, reference, inputs))
    first = nn.Sequential(*list(model.children())[:2])
    ours, theirs = (
        outputs(first, {key: tensor for key, tensor in item.items() if key[0] in "01"}, inputs).movedim(1, 0).flatten(1)
        for item in (state, reference)
    )
    size, other = (features.std(1, correction=0) for features in (ours, theirs))
    torch.testing.assert_close(back["1.weight"], reference["1.weight"] * size / other)
    offset = reference["1.weight"].abs() * (ours.mean(1) - theirs.mean(1)) / other
    torch.testing.assert_close(back["1.bias"], reference["1.bias"] + offset)


def test_after_calibration_a_restored_models_units_have_the_spread_they_had() -> None:
    """The scales of a model whose reference is calibrated already are the deviations of its units themselves."""
    model = biased().double()
    state, inputs = random_state(model, 1), images(250)
    reference = calibrate(model, random_state(model, 2), inputs)
    found = folding(model)
    back = restore(fold(state, found.norms), reference, targets(model, found, state, reference, inputs))
    again = calibrate(model, back, inputs)
    moved = (again["1.running_mean"] - back["1.running_mean"]) / back["1.running_var"].sqrt()
    torch.testing.assert_close(moved, torch.zeros_like(moved), rtol=0, atol=1e-3)
    torch.testing.assert_close(again["1.running_var"], back["1.running_var"], rtol=1e-3, atol=1e-6)


def test_the_mean_of_restored_models_is_that_of_folded_ones_unit_by_unit() -> None:
    model = biased().double()
    states, inputs = [random_state(model, seed) for seed in (1, 2)], images(20)
    found = folding(model)
    other = restore(fold(states[1], found.norms), states[0], targets(model, found, states[1], states[0], inputs))
    mean = mean_state([states[0], other])
    folded = mean_state([fold(state, found.norms) for state in states])
    for norm in found.norms:
        ratio = mean[norm.weight].flatten(1) / folded[norm.weight].flatten(1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_a_linear_net_with_batch_norm_keeps_its_function_under_any_basis() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model = model.double().eval()
    state, inputs = random_state(model, 1), images(10)
    found = folding(model)
    change = Linear(torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    changed = rebase(fold(state, found.norms), found.spaces, [change])
    expected = outputs(model, state, inputs)
    torch.testing.assert_close(outputs(model, changed, inputs), expected, rtol=1e-9, atol=1e-9)
    ((_, norm, axis),) = found.observed
    wanted = Target(norm, axis, torch.full((4,), 2.0, dtype=torch.float64), torch.arange(4).double())
    back = restore(changed, random_state(model, 2), [wanted])
    torch.testing.assert_close(outputs(model, back, inputs), expected, rtol=1e-8, atol=1e-8)


def test_a_unit_that_the_reference_has_switched_off_does_not_divide_by_zero() -> None:
    model = biased().double()
    state, reference, inputs = random_state(model, 1), random_state(model, 2), images(20)
    reference["1.weight"][:2] = 0.0
    reference["5.weight"][:] = 0.0
    found = folding(model)
    back = restore(fold(state, found.norms), reference, targets(model, found, state, reference, inputs))
    expected = outputs(model, state, inputs)
    torch.testing.assert_close(outputs(model, back, inputs), expected, rtol=1e-7, atol=1e-7)


def test_nothing_that_is_given_is_changed() -> None:
    model = biased().double()
    state, reference = random_state(model, 1), random_state(model, 2)
    found = folding(model)
    copies = copy.deepcopy((state, reference))
    folded = fold(state, found.norms)
    kept = copy.deepcopy(folded)
    restore(folded, reference, targets(model, found, state, reference, images(5)))
    for before, after in zip((*copies, kept), (state, reference, folded), strict=True):
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


class Shared(nn.Module):
    """One BatchNorm behind two layers: it can be folded into neither."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.second(torch.relu(self.norm(self.first(images)))))
        found: Tensor = self.head(hidden.mean((2, 3)))
        return found


UNFOLDABLE = {
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
    "group norm": lambda: nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.GroupNorm(1, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    ),
    "depthwise": lambda: nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten()),
        nn.Linear(64, 3),
    ),
    "after a nonlinearity": lambda: nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    ),
    "without statistics": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 3)
    ),
    "shared": Shared,
}


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_what_cannot_be_folded_is_no_dense_space(name: str) -> None:
    found = folding(UNFOLDABLE[name]().eval())
    assert found.norms == ()
    assert found.dense == (False,)
    assert found.spaces == found.original


def test_one_space_that_can_only_be_permuted_leaves_the_others_dense() -> None:
    model = nn.Sequential(ResidualBlock(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(144, 3)).eval()
    found = folding(model)
    assert [norm.name for norm in found.norms] == ["0.bn1"]
    assert sorted(found.dense) == [False, True]
