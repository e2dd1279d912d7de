"""What data sets, models and partitions there are, each with a line that says what it is: known without any library."""

from __future__ import annotations

from collections.abc import Mapping

DATASETS: Mapping[str, str] = {
    "digits": "1,797 handwritten digits, 1x8x8, 10 classes (UCI, in scikit-learn; a fixed 20 % are for testing)",
    "mnist": "60,000 + 10,000 handwritten digits, 1x28x28, 10 classes",
    "fashion-mnist": "60,000 + 10,000 pieces of clothing, 1x28x28, 10 classes",
    "cifar10": "50,000 + 10,000 photographs of things and animals, 3x32x32, 10 classes",
    "cifar100": "50,000 + 10,000 photographs of things and animals, 3x32x32, 100 classes",
    "svhn": "73,257 + 26,032 digits of house numbers, 3x32x32, 10 classes",
    "folder:PATH": "your images, all of one size: PATH/CLASS/IMAGE, or PATH/train/… and PATH/test/… (or PATH/val/…)",
}

MODELS: Mapping[str, str] = {
    "mlp": "two hidden layers of 128 units",
    "lenet5": "LeNet-5 with ReLU and max pooling",
    "cnn": "two convolutions, two linear layers (420k parameters on 28×28)",
    "vgg11": "VGG-11 for small images, without BatchNorm",
    "vgg11-bn": "VGG-11 for small images, with BatchNorm",
    "vgg16": "VGG-16 for small images, without BatchNorm",
    "vgg16-bn": "VGG-16 for small images, with BatchNorm",
    "resnet20": "ResNet-20 for small images (270k parameters)",
    "resnet32": "ResNet-32, resnet20 with five residual blocks a stage instead of three",
    "resnet44": "ResNet-44, with seven",
    "resnet56": "ResNet-56, with nine",
    "vit": "vision transformer for small images, 4 blocks of 4 heads (140k parameters)",
    "vit8": "vit with 8 blocks",
    "NAME@WIDTH": "any of these, its layers WIDTH times as wide",
    "resnet18, …": "any classification model of torchvision, by its name there",
    "package.module:function": "your own: function(shape, num_classes) returns a torch.nn.Module",
}

PARTITIONS: Mapping[str, str] = {
    "iid": "equal random parts",
    "dirichlet": "label skew and unequal sizes: each class is dealt to the clients in shares ~ Dirichlet(alpha)",
    "dirichlet-equal": "label skew, equal sizes: each client's class mix ~ Dirichlet(alpha) until a class is used up",
    "disjoint": "each client has classes of its own; at most as many clients as classes",
    "80-20": "even clients share 80 % of one half of the classes and 20 % of the other half, odd clients the rest",
    "shards": "sorted by class, cut into equal shards; each client has 2 of them",
    "same": "every client has all images: they differ in their initialisations and the order of batches",
    "quantity": "sizes ~ Dirichlet(alpha) above the minimum, the same class shares",
}
