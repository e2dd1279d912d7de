"""Models by name: what they compute, how they start, and which names and images are refused."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedmerge.data import load
from fedmerge.models import BUILDERS, Shape, create
from fedmerge.names import MODELS
from fedmerge.settings import ConfigurationError
from fedmerge.train import LocalTraining, evaluate, fit

GREY, COLOUR, TINY = (1, 28, 28), (3, 32, 32), (1, 8, 8)

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a user's module whose function `make` has this body; return the model's name."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"users_models_{abs(hash(tmp_path))}"

    def write(body: str) -> str:
        heading = "import torch\nfrom torch import nn\n\n\ndef make(shape, num_classes):\n"
        (tmp_path / f"{name}.py").write_text(heading + textwrap.indent(textwrap.dedent(body), "    "))
        return f"{name}:make"

    return write


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("shape", [GREY, COLOUR, TINY, (3, 20, 36)], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_model_gives_logits_of_small_images(name: str, shape: Shape) -> None:
    model = create(f"{name}@0.25", shape=shape, num_classes=7, seed=0)
    assert not any(module.training for module in model.modules())
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = model(images)
    assert outputs.shape == (3, 7)
    assert outputs.isfinite().all()
    assert not torch.allclose(outputs[0], outputs[1])
    assert name in MODELS


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("mlp", GREY, (784 + 1) * 128 + (128 + 1) * 128 + (128 + 1) * 10),
        ("lenet5", GREY, (25 + 1) * 6 + (150 + 1) * 16 + (400 + 1) * 120 + (120 + 1) * 84 + (84 + 1) * 10),  # 61,706
        ("cnn", GREY, 421_642),
        ("vgg11", COLOUR, 9_220_480 + 5_130),  # torchvision's convolutions, and one linear layer
        ("vgg11-bn", COLOUR, 9_220_480 + 2_752 + 5_130),  # a scale for each channel, and a shift instead of a bias
        ("vgg16", COLOUR, 14_714_688 + 5_130),
        ("vgg16-bn", COLOUR, 14_714_688 + 4_224 + 5_130),
        ("resnet20", COLOUR, 269_722 + 2_752),  # He et al.'s, and two projected shortcuts with BatchNorm
        ("resnet32", COLOUR, 464_154 + 2_752),
        ("resnet44", COLOUR, 658_586 + 2_752),
        ("resnet56", COLOUR, 853_018 + 2_752),
        ("vit", GREY, (16 + 1 + 49) * 64 + 4 * (8 * 64**2 + 11 * 64) + 2 * 64 + (64 + 1) * 10),
    ],
)
def test_models_have_the_known_numbers_of_parameters(name: str, shape: Shape, expected: int) -> None:
    with torch.device("meta"):
        assert parameters(create(name, shape=shape, num_classes=10, seed=0)) == expected


@pytest.mark.parametrize(("width", "hidden"), [("2", 256), ("0.5", 64), ("1", 128), ("0.001", 1), ("1e-1", 13)])
def test_the_width_scales_the_hidden_layers(width: str, hidden: int) -> None:
    model = create(f"mlp@{width}", shape=TINY, num_classes=3, seed=0)
    assert parameters(model) == (64 + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * 3


@pytest.mark.parametrize("name", BUILDERS)
def test_doubling_the_width_makes_a_model_nearly_four_times_as_large(name: str) -> None:
    with torch.device("meta"):
        sizes = [parameters(create(f"{name}@{width}", shape=COLOUR, num_classes=10, seed=0)) for width in (1, 2, 4)]
    assert 1.9 < sizes[1] / sizes[0] < 4.1
    assert sizes[1] / sizes[0] < sizes[2] / sizes[1] < 4.1


@pytest.mark.parametrize("name", ["vgg11", "vgg16-bn"])
def test_vgg_starts_with_convolutions_that_keep_the_variance(name: str) -> None:
    model = create(f"{name}@0.5", shape=COLOUR, num_classes=10, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.1)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(("name", "shape"), [("cnn@0.5", GREY), ("resnet20@0.5", COLOUR), ("squeezenet1_1", COLOUR)])
def test_the_seed_alone_decides_the_weights(name: str, shape: Shape) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = create(name, shape=shape, num_classes=4, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, create(name, shape=shape, num_classes=4, seed=3))
    assert not same(first, create(name, shape=shape, num_classes=4, seed=4))


@pytest.mark.parametrize(
    ("name", "shape"), [("resnet18", GREY), ("mobilenet_v2", (4, 32, 32)), ("squeezenet1_1", (2, 32, 32))]
)
def test_torchvisions_models_take_any_channels_and_classes(name: str, shape: Shape) -> None:
    model, colour = (create(name, shape=size, num_classes=7, seed=0) for size in (shape, COLOUR))
    with torch.no_grad():
        assert model(torch.zeros(2, *shape)).shape == (2, 7)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert first.in_channels == shape[0]
    weights_a_channel = first.weight[:, 0].numel()
    assert parameters(colour) - parameters(model) == (3 - shape[0]) * weights_a_channel


@pytest.mark.slow
def test_every_classification_model_of_torchvision_takes_one_channel_and_seven_classes() -> None:
    from torchvision import models as zoo

    names = zoo.list_models(module=zoo)
    assert len(names) >= 80
    for name in names:
        shape = (1, 299, 299) if name == "inception_v3" else (1, 224, 224)
        if not name.startswith("regnet"):
            with torch.device("meta"):
                create(name, shape=shape, num_classes=7, seed=0)
        elif name.endswith("_400mf"):  # RegNets compute their widths with tensors, and differ in them alone
            create(name, shape=shape, num_classes=7, seed=0)


def test_a_users_factory_gets_the_shape_and_the_classes(write: Write) -> None:
    name = write("return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], num_classes))")
    before = torch.get_rng_state()
    first, second = (create(name, shape=(2, 3, 4), num_classes=5, seed=seed) for seed in (0, 0))
    assert parameters(first) == (24 + 1) * 5
    assert same(first, second)
    assert not same(first, create(name, shape=(2, 3, 4), num_classes=5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.training


def test_a_users_model_that_draws_in_its_forward_pass_draws_nothing_from_torchs_own(write: Write) -> None:
    name = write(
        """
        class Noisy(nn.Flatten):
            def forward(self, images):
                return torch.rand(len(images), num_classes)

        return Noisy()
        """
    )
    before = torch.get_rng_state()
    create(name, shape=TINY, num_classes=5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "returned NoneType, expected a torch.nn.Module"),
        ("return nn.Linear", "returned type, expected a torch.nn.Module"),
        ("raise ValueError('too small')", "cannot be built for 1×8×8 images: too small"),
        ("return nn.Linear('a', 2)", "cannot be built for 1×8×8 images: "),
        ("return nn.Flatten()", r"must give logits \(images, 5\), it gave \(2, 64\) for 2 images"),
        ("return nn.Identity()", r"must give logits \(images, 5\), it gave \(2, 1, 8, 8\) for 2 images"),
        (
            "return nn.Sequential(nn.Flatten(0), nn.Linear(128, 10))",
            r"must give logits \(images, 5\), it gave \(10,\) for 2 images",
        ),
        ("return nn.LSTM(8, 8)", "cannot take 1×8×8 images: "),
        ("return nn.Linear(3, 3)", "cannot take 1×8×8 images: .*shapes cannot be multiplied"),
        ("return nn.Bilinear(2, 2, 2)", r"cannot take 1×8×8 images: .*missing 1 required"),
        ("return nn.Sequential(nn.Flatten(), nn.Unflatten(7, (1,)))", "cannot take 1×8×8 images: Dimension out of"),
    ],
)
def test_a_users_factory_that_cannot_be_used_is_refused_by_name(write: Write, body: str, message: str) -> None:
    name = write(body)
    with pytest.raises(ConfigurationError, match=rf"^--model {name} {message}"):
        create(name, shape=TINY, num_classes=5, seed=0)


def test_a_model_that_asserts_the_size_of_its_images_is_refused_with_its_reason(write: Write) -> None:
    name = write(
        """
        class Picky(nn.Module):
            def forward(self, images):
                torch._assert(images.shape[2] == 224, "Wrong image height! Expected 224")

        return Picky()
        """
    )
    with pytest.raises(ConfigurationError, match="cannot take 1×8×8 images: Wrong image height! Expected 224"):
        create(name, shape=TINY, num_classes=5, seed=0)


def test_a_model_that_gives_more_than_logits_is_refused(write: Write) -> None:
    name = write(
        """
        class Two(nn.Flatten):
            def forward(self, images):
                return images, images

        return Two()
        """
    )
    with pytest.raises(ConfigurationError, match=r"must give logits \(images, 5\), it gave tuple for 2 images"):
        create(name, shape=TINY, num_classes=5, seed=0)


@pytest.mark.parametrize(
    "name", ["no_such_package.module:make", "math:make", ":make", "math:", "fedmerge.models:creat"]
)
def test_a_factory_that_cannot_be_imported_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^--model {name}: cannot import .*expected package.module:function"):
        create(name, shape=TINY, num_classes=5, seed=0)


@pytest.mark.parametrize("width", ["0", "-1", "a", "", "nan", "inf", "1000", "2@3"])
def test_a_width_that_is_no_scale_is_refused(width: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"--model mlp@{width}: the width .* between 0 and 1000, got '{width}'"
    ):
        create(f"mlp@{width}", shape=TINY, num_classes=5, seed=0)


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet-20", "resnet20"), ("resnt18", "resnet18"), ("vgg-11-bn", "vgg11-bn"), ("lenet", "lenet5")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"unknown model '{name}'; did you mean '{near}'\? Known: mlp, lenet5"
    ):
        create(name, shape=COLOUR, num_classes=5, seed=0)


def test_torchvisions_models_have_one_width() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown model 'resnet18@2'; did you mean 'resnet18'\?"):
        create("resnet18@2", shape=COLOUR, num_classes=5, seed=0)


@pytest.mark.parametrize(("name", "shape"), [("cnn", (1, 3, 3)), ("lenet5", (1, 3, 3)), ("alexnet", (3, 32, 32))])
def test_images_that_are_too_small_are_refused_with_their_size(name: str, shape: Shape) -> None:
    size = "×".join(map(str, shape))
    with pytest.raises(ConfigurationError, match=rf"^--model {name} cannot (be built for|take) {size} images: "):
        create(name, shape=shape, num_classes=5, seed=0)


def test_the_transformer_learns_from_few_images() -> None:
    digits = load("digits").train
    model = create("vit@0.5", shape=TINY, num_classes=10, seed=0)
    state, _ = fit(
        model, model.state_dict(), digits[:600], LocalTraining(epochs=5), generator=torch.Generator().manual_seed(0)
    )
    assert evaluate(model, [state], digits[600:]).accuracy > 0.6


def test_the_transformer_sees_where_its_patches_are() -> None:
    model = create("vit@0.25", shape=TINY, num_classes=3, seed=0)
    images = torch.randn(2, *TINY, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(model(images), model(images.roll(2, 3)), atol=1e-3)


def test_a_residual_block_without_weights_is_the_rectified_shortcut() -> None:
    block = next(
        module
        for module in create("resnet20", shape=COLOUR, num_classes=10, seed=0).modules()
        if type(module).__name__ == "ResidualBlock"
    )
    images = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    state = {name: torch.zeros_like(tensor) for name, tensor in block.state_dict().items()}
    outputs: Tensor = torch.func.functional_call(block, state, (images,))
    assert torch.equal(outputs, images.relu())
