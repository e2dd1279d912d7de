"""Claim: with one to three hostile clients beside five honest ones, a screened merge is as good as the honest alone.

    python experiments/hostile.py                   # Fashion-MNIST, 3 attackers of each kind at most, 5 seeds
    python experiments/hostile.py --size smoke      # digits, 1 seed, less than a minute; what CI runs

The hostile clients change the update that they would have sent, or (wrong labels) train on other labels. Flower's Krum,
MultiKrum and trimmed mean are told how many clients are hostile, which ours is not, and get models that are aligned as
for ours; FedAvg gets them as they came. Accuracies are on development images cut from the training files. At full size
it writes experiments/expected/hostile.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmerge import federation, models
from fedmerge.client import train_client
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.machine import versions
from fedmerge.oneshot import merge_aligned, merge_updates, prepare
from fedmerge.problem import Examples, Problem, Update
from fedmerge.seeds import derive, generator
from fedmerge.train import evaluate

HONEST = 5
MOST_LOSS = 0.01
"""Of accuracy, mean over the seeds: how far a screened merge may be below that of the honest clients alone."""

SIZES: dict[str, tuple[Config, Sequence[int], Sequence[int], str]] = {
    "full": (
        Config(
            data="fashion-mnist",
            split="development",
            model="cnn@0.5",
            clients=8,
            client_examples=12_000,
            alpha=0.3,
            local_epochs="5",
            server_examples=500,
        ),
        (0, 1, 2, 3, 4),
        (1, 2, 3),
        "np:groups=channel:lrs=0.01",
    ),
    "smoke": (
        Config(split="development", clients=8, alpha=0.3, server_examples=200, model="mlp@0.5"),
        (0,),
        (3,),
        "np:groups=channel:lrs=0.01:steps=100",
    ),
}
ALIGNER = "activations"


def robust(hostile: int, clients: int) -> dict[str, str]:
    """Return Flower's robust aggregates that know the number of hostile clients, by a short name.

    Args:
        hostile: how many there are.
        clients: how many there are in all.
    """
    cut = min(0.49, hostile / clients)  # at each end; half or more would leave nothing
    return {
        "krum": f"flower-krum:num_malicious_nodes={hostile}",
        "multikrum": f"flower-multikrum:num_malicious_nodes={hostile}:num_nodes_to_select={clients - hostile}",
        "trimmed mean": f"flower-trimmed-mean:beta={cut:.4f}",
    }


Attack = Callable[[Update, torch.Generator], Update]


def altered(update: Update, change: Callable[[Tensor], Tensor]) -> Update:
    """Return an update with its floating-point tensors changed."""
    state = {name: change(tensor) if tensor.is_floating_point() else tensor for name, tensor in update.state.items()}
    return replace(update, state=state)


def noise(update: Update, stream: torch.Generator) -> Update:
    """Return weights drawn at random, as large as those learned."""
    return altered(update, lambda tensor: torch.randn(tensor.shape, generator=stream) * tensor.square().mean().sqrt())


ATTACKS: Mapping[str, Attack] = {
    "sign-flipped": lambda update, _: altered(update, torch.neg),
    "exploding": lambda update, _: altered(update, lambda tensor: 100 * tensor),
    "all-zeros": lambda update, _: altered(update, torch.zeros_like),
    "random-weights": noise,
}
"""What a client makes of its update; "label-flipped" and "copied" need more than that."""


def main() -> None:
    """Run the experiment at the size asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    size = parser.parse_args().size
    for name in ("fedmerge", "flwr"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    config, seeds, counts, merge = SIZES[size]
    rows = [row for seed in seeds for row in run(config.replace(seed=seed), counts, merge)]
    table = summarize(rows)
    print("\n".join(table))
    check(rows)
    if size == "full":
        content = {
            "config": config.to_mapping(changed_only=True),
            "merge": f"{ALIGNER}+{merge}",
            "seeds": list(seeds),
            "versions": {name: text for name, text in versions().items() if name != "platform"},
            "rows": rows,
            "table": table,
        }
        path = Path(__file__).parent / "expected" / "hostile.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def run(config: Config, counts: Sequence[int], merge: str) -> list[dict[str, Any]]:
    """Return the accuracies of one seed, by attack and number of hostile clients.

    Args:
        config: the federation, of which the first clients are honest.
        counts: numbers of hostile clients.
        merge: the learned merger, with options.
    """
    examples = federation.load(config)
    architecture = models.create(config.model, shape=examples.dataset.shape, num_classes=len(examples.classes), seed=0)
    problem = Problem(architecture, examples.server, config.seed, config.batch_size)
    updates = [train_client(config, examples, client, 1, None) for client in range(config.clients)]

    def accuracy(of: Sequence[Update], align: str, merge: str, screen: str = "off") -> tuple[float, list[int]]:
        outcome = merge_updates(problem, of, align=align, merge=merge, seed=derive(config.seed, "merge"), screen=screen)
        left_out = outcome.diagnostics.get("screen", {}).get("left-out", {})
        return evaluate(architecture, outcome.merged.states, examples.evaluation).accuracy, list(map(int, left_out))

    def unscreened(of: Sequence[Update], merges: Mapping[str, str]) -> dict[str, float]:
        seed = derive(config.seed, "merge")
        aligned = prepare(problem, of, align=ALIGNER, merge=merge, seed=seed, screen="off")  # once for all of them
        found = {name: merge_aligned(*aligned, merge=of_name, seed=seed) for name, of_name in merges.items()}
        return {
            name: evaluate(architecture, outcome.merged.states, examples.evaluation).accuracy
            for name, outcome in found.items()
        }

    honest, others = updates[:HONEST], updates[HONEST:]
    alone, falsely = accuracy(honest, ALIGNER, merge, "auto")
    assert not falsely, f"honest clients were left out: {falsely}"
    fedavg_alone, _ = accuracy(honest, "identity", "fedavg")
    attacks = {name: [attack(other, _stream(config, other)) for other in others] for name, attack in ATTACKS.items()}
    attacks["label-flipped"] = [label_flipped(config, examples, other.partition_id) for other in others]
    attacks["copied"] = [replace(other, state=honest[0].state) for other in others]
    rows = []
    for name, hostile in attacks.items():
        for count in counts:
            mixed = [*honest, *hostile[:count]]
            screened, left_out = accuracy(mixed, ALIGNER, merge, "auto")
            rows.append(
                {
                    "seed": config.seed,
                    "attack": name,
                    "hostile": count,
                    "fedavg": accuracy(mixed, "identity", "fedavg")[0],
                    **unscreened(mixed, {**robust(count, len(mixed)), "np": merge}),
                    "fedavg of the honest": fedavg_alone,
                    "np screened": screened,
                    "np of the honest": alone,
                    "left out": left_out,
                }
            )
    return rows


def label_flipped(config: Config, examples: Federation, client: int) -> Update:
    """Return the update of a client that has trained on the labels counted from the other end, and counts them so.

    Args:
        config: the federation's.
        examples: its data.
        client: who it is.
    """
    last = len(examples.classes) - 1
    train = examples.dataset.train
    dataset = replace(examples.dataset, train=Examples(train.images, last - train.labels))
    return train_client(config, replace(examples, dataset=dataset), client, 1, None)


def _stream(config: Config, update: Update) -> torch.Generator:
    return generator(config.seed, "attack", update.partition_id)


def check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Assert the claim: no honest client is left out, and a screened merge loses next to nothing.

    Args:
        rows: of all seeds.
    """
    for row in rows:
        assert min(row["left out"], default=HONEST) >= HONEST, f"an honest client was left out: {row}"
    groups = _groups(rows)
    worst = min(_mean(group, "np screened") - _mean(group, "np of the honest") for group in groups.values())
    assert worst >= -MOST_LOSS, f"a screened merge is {-worst:.3f} below that of the honest clients alone"
    for case, group in groups.items():
        best = max((_mean(group, name), name) for name in ("fedavg", *robust(1, 2)))
        assert _mean(group, "np screened") > best[0], f"{case}: {best[1]} is not below the screened merge"
    print(f"holds: screened merges are at most {max(0.0, -worst):.4f} below those of the honest clients alone")


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a Markdown table of accuracies in percent, means over the seeds.

    Args:
        rows: of all seeds.
    """
    names = ("fedavg", *robust(1, 2), "np", "np screened", "np of the honest")
    lines = [
        f"| attack | hostile | left out | {' | '.join(names)} |",
        "| --- | ---: | ---: " + "| ---: " * len(names) + "|",
    ]
    for (attack, count), group in _groups(rows).items():
        left_out = statistics.fmean(len(row["left out"]) for row in group)
        cells = [f"{100 * _mean(group, name):.1f}" for name in names]
        lines.append(f"| {attack} | {count} | {left_out:g} | {' | '.join(cells)} |")
    return lines


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["attack"], row["hostile"]), []).append(row)
    return groups


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


if __name__ == "__main__":
    main()
