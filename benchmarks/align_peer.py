"""A whole merge of two networks beside align-n-merge's, in units of bare forward passes of both over the same images.

The networks are align-n-merge's own, and both tools merge the same ones: two ResNet-20, trained here for a little on
the same images of Fashion-MNIST, whose merges are evaluated on the development split, and two VGG-11 as they are
initialised, for the time alone. A merge is all from the models to one model: the choice of a reference (ours),
statistics, matching, change of basis, mean, and BatchNorm statistics. The peer is measured where `_align_n_merge.py`
finds it, in a process of its own, whose memory is as it finds it: ours holds what is freed (`fedmerge.machine`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import _align_n_merge as peer
import torch
from _measure import Row, interleaved, main, tree_seconds
from torch import Tensor, nn
from torch.nn import functional

from fedmerge import federation, models
from fedmerge.config import Config
from fedmerge.merge.best import best_client
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem, Update
from fedmerge.sgd import LocalTraining
from fedmerge.train import evaluate, fit, laid_out, predict

OURS = {"permutations": "activations", "CCA": "cca:ridges=1"}
THEIRS = {"permutations": "permute", "CCA": "cca"}
RECIPE = LocalTraining(epochs=3, batch_size=50, lr=0.05)
REPEATS = 3
FLOOR, REFERENCE = "forward passes", "of ours, the choice of the reference, which align-n-merge does without"


def benchmark(quick: bool) -> list[Row]:
    """Return the rows of each architecture."""
    data = "digits" if quick else "fashion-mnist"
    trained, held, judged = (60, 60, 60) if quick else (8_000, 2_000, 5_000)
    config = Config(data=data, split="development", partition="iid", client_examples=trained, server_examples=held)
    examples = federation.load(config)
    own, server, evaluation = map(_padded, (examples.pool, examples.server, examples.evaluation[:judged]))
    rows = _rows("resnet20", _trained("resnet20", own), server, evaluation)
    return rows if quick else rows + _rows("vgg11", [_network("vgg11", seed) for seed in (0, 1)], server)


def _rows(name: str, networks: Sequence[nn.Module], server: Examples, evaluation: Examples | None = None) -> list[Row]:
    problem = Problem(networks[0], laid_out(networks[0], server))
    states = [network.state_dict() for network in networks]
    problem.spaces  # noqa: B018 - found once, before

    updates = [Update(state, 100, client) for client, state in enumerate(states)]

    def ours(align: str) -> Mapping[str, Tensor]:
        return merge_updates(problem, updates, align=align, merge="mean", seed=0, screen="off").merged.state

    merges: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        f"ours, {what}": partial(ours, align) for what, align in OURS.items()
    }
    if peer.installed():
        theirs = peer.process(name, networks, server.images)
        merges |= {f"align-n-merge, {what}": partial(theirs, method) for what, method in THEIRS.items()}
    parts: dict[str, Callable[[], object]] = {
        FLOOR: lambda: [predict(networks[0], state, problem.data.images) for state in states],
        REFERENCE: lambda: best_client(problem, updates),
    }
    found = interleaved({**merges, **parts}, repeats=REPEATS, clock=tree_seconds)
    floor = found[FLOOR]

    def accuracy(made: Callable[[], Mapping[str, Tensor]]) -> str:
        return "" if evaluation is None else f"{100 * evaluate(networks[0], [made()], evaluation).accuracy:.1f}"

    of = f"2 × {name}, {len(server):,} images"
    each = " and ".join(filter(None, (accuracy(network.state_dict) for network in networks)))
    rows = [_row(f"{of}: {FLOOR}", floor.milliseconds, "1", each)]
    for what, merge in merges.items():
        rows.append(_row(f"{of}: {what}", found[what].milliseconds, found[what].over(floor), accuracy(merge)))
    rows.append(_row(f"{of}: {REFERENCE}", found[REFERENCE].milliseconds, found[REFERENCE].over(floor), ""))
    if not peer.installed():
        rows.append(_row(f"{of}: align-n-merge", "not installed", "", ""))
    return rows


def _network(name: str, seed: int) -> nn.Module:
    if peer.installed():
        return peer.create(name, seed).eval()
    return models.create(name, shape=(3, 32, 32), num_classes=10, seed=seed).eval()


def _trained(name: str, examples: Examples) -> list[nn.Module]:
    """Return networks of initialisations and orders of their own, trained on the same images."""
    found = []
    for seed in (0, 1):
        network = _network(name, seed)
        order = torch.Generator().manual_seed(seed)
        start = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        network.load_state_dict(fit(network, start, laid_out(network, examples), RECIPE, generator=order)[0])
        found.append(network.eval())
    return found


def _padded(examples: Examples) -> Examples:
    """Return grey images as colour ones of 32×32."""
    height, width = examples.images.shape[-2:]
    images = functional.pad(examples.images, (0, 32 - width, 0, 32 - height)).expand(-1, 3, -1, -1)
    return Examples(images.contiguous(), examples.labels)


def _row(what: str, milliseconds: str, ratio: str, accuracy: str) -> Row:
    return {"what": what, "CPU ms": milliseconds, "/ forward passes": ratio, "accuracy, %": accuracy}


if __name__ == "__main__":
    main(__doc__, benchmark)
