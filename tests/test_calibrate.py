import pytest
import torch
from problems import blobs
from torch import nn
from torch.func import functional_call

from fedmerge.calibrate import BATCH, MOST, calibrate, has_statistics
from fedmerge.models import create


def test_statistics_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).eval()
    images = blobs(100, seed=0).images
    result = calibrate(model, model.state_dict(), images)
    hidden = nn.functional.linear(images.flatten(1), result["1.weight"], result["1.bias"])
    torch.testing.assert_close(result["2.running_mean"], hidden.mean(0))
    torch.testing.assert_close(result["2.running_var"], hidden.var(0))


def test_the_mean_over_several_batches_is_taken() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36)).eval()
    images = blobs(3 * BATCH, seed=0).images
    result = calibrate(model, model.state_dict(), images)
    torch.testing.assert_close(result["1.running_mean"], images.flatten(1).mean(0), rtol=1e-4, atol=1e-5)


def test_images_that_lie_in_the_order_of_their_classes_have_the_variance_of_all() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36)).eval()
    images = torch.cat([blobs(2 * BATCH, seed=label, classes=(label,)).images + 3 * label for label in range(2)])
    result = calibrate(model, model.state_dict(), images)
    torch.testing.assert_close(result["1.running_mean"], images.flatten(1).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["1.running_var"], images.flatten(1).var(0), rtol=0.02, atol=0)


def test_of_many_images_as_many_as_are_needed_are_looked_at_spread_evenly() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1)).eval()
    numbers = torch.arange(5 * MOST + 3, dtype=torch.float64)[:, None]
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    result = calibrate(model.double(), model.state_dict(), numbers)
    looked_at = torch.cat(seen).flatten().sort().values
    assert len(looked_at) == MOST
    assert set(looked_at.diff().tolist()) == {5.0, 6.0}
    torch.testing.assert_close(result["1.running_mean"].item(), float(numbers.mean()), rtol=0.01, atol=0)
    torch.testing.assert_close(result["1.running_var"].item(), float(numbers.var()), rtol=0.01, atol=0)


def test_only_the_statistics_change_and_nothing_that_was_given() -> None:
    model = create("resnet20@0.25", shape=(1, 6, 6), num_classes=3, seed=0).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    momenta = [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    result = calibrate(model, state, blobs(20, seed=1).images)
    changed = {name for name in state if not torch.equal(state[name], result[name])}
    assert changed == {name for name in state if "running" in name}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert momenta == [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def test_dropout_stays_off() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(36)).eval()
    images = blobs(40, seed=2).images
    result = calibrate(model, model.state_dict(), images)
    torch.testing.assert_close(result["2.running_mean"], images.flatten(1).mean(0))


@pytest.mark.parametrize("name", ["mlp@0.1", "cnn@0.1"])
def test_a_model_without_statistics_is_returned_as_it_is(name: str) -> None:
    model = create(name, shape=(1, 6, 6), num_classes=3, seed=0)
    assert not has_statistics(model)
    result = calibrate(model, model.state_dict(), blobs(5, seed=0).images)
    assert all(torch.equal(result[name], tensor) for name, tensor in model.state_dict().items())


def test_a_single_image_cannot_be_normalised_and_changes_nothing() -> None:
    model = create("resnet20@0.25", shape=(1, 6, 6), num_classes=3, seed=0)
    result = calibrate(model, model.state_dict(), blobs(1, seed=0).images)
    assert all(torch.equal(result[name], tensor) for name, tensor in model.state_dict().items())


def test_calibration_repairs_a_merge_of_a_net_and_its_negative_shift() -> None:
    model = create("resnet20@0.25", shape=(1, 6, 6), num_classes=3, seed=0)
    images = blobs(200, seed=4).images
    state = dict(model.state_dict())
    broken = {name: tensor * 100 if name.endswith("running_var") else tensor for name, tensor in state.items()}
    good = functional_call(model, calibrate(model, state, images), (images,))
    repaired = functional_call(model, calibrate(model, broken, images), (images,))
    torch.testing.assert_close(good, repaired)
