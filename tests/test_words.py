"""A run in words: a command that repeats it, a headline that claims no more than the numbers."""

from __future__ import annotations

import shlex
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from made_runs import RESULTS, failed, result

from fedmerge.config import Config
from fedmerge.summary import summarize
from fedmerge.words import headline, repeat_command, scenario, title


def parsed(command: str) -> dict[str, Any]:
    """What the command line of `fedmerge` makes of it, written anew: the oracle of `repeat_command`."""
    words = shlex.split(command)[2:]
    options: dict[str, Any] = {}
    while words:
        name = words.pop(0).removeprefix("--")
        if name in ("label-counts", "no-label-counts"):
            options["label-counts"] = name == "label-counts"
        else:
            options[name] = words.pop(0)
    return options


CONFIGS = st.builds(
    Config,
    data=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
        lambda text: not text.startswith("--")
    ),
    clients=st.integers(2, 100),
    lr=st.floats(1e-6, 10),
    label_counts=st.booleans(),
    seed=st.integers(0, 9),
    out=st.sampled_from(["", "runs/x"]),
)


@given(CONFIGS)
def test_the_command_to_repeat_a_run_gives_its_configuration(config: Config) -> None:
    settings = {"command": "simulate", "config": config.to_mapping()}
    assert Config.from_mapping(parsed(repeat_command(settings))) == config.replace(out="")


def test_the_command_to_merge_again_names_sources_methods_and_what_the_server_uses() -> None:
    config = Config(seed=5, alpha=0.1, server_labels=10, server_limit=50, out="new").to_mapping()
    settings = {"command": "merge", "config": config, "methods": ["np"], "sources": ["my run"], "seeds": [0, 1]}
    assert repeat_command(settings) == "fedmerge merge 'my run' --server-labels 10 --server-limit 50 --methods np"
    checkpoints = settings | {"sources": ["a.safetensors", "b.safetensors"], "config": Config(alpha=0.1).to_mapping()}
    assert repeat_command(checkpoints) == "fedmerge merge a.safetensors b.safetensors --alpha 0.1 --methods np"


def test_the_command_to_repeat_a_comparison_names_methods_and_seeds_once() -> None:
    settings = {
        "command": "compare",
        "config": Config(seed=5, data="folder:my data", label_counts=False, out="runs/x").to_mapping(),
        "methods": ["fedavg", "activations+np"],
        "seeds": [0, 1, 2],
    }
    assert repeat_command(settings) == (
        "fedmerge compare --data 'folder:my data' --no-label-counts --methods fedavg,activations+np --seeds 0,1,2"
    )


def test_the_scenario_is_told_in_words() -> None:
    partition = {"label_counts": [[1200, 3], [0, 4]], "classes": ["a", "b"], "evaluation": [0] * 1797}
    config = Config(clients=2, partition="dirichlet", alpha=0.1, local_epochs="1..5", init="shared")
    assert title(config) == "digits: 2 clients, one round"
    assert scenario(config, [0, 1], partition) == (
        "2 clients hold 1,207 training images of 2 classes, divided by dirichlet (alpha 0.1), and train mlp for 1 to 5 "
        "epochs from one shared initialisation. The server owns 100 labelled images that no client has. Accuracies are "
        "on 1,797 test images of digits that neither has seen, over 2 seeds."
    )
    assert "with seed 3" in scenario(config, [3])
    assert "owns 100 images (30 labelled) that" in scenario(config.replace(server_labels=30), [3], partition)
    assert "owns 100 unlabelled images." in scenario(config.replace(server_labels=0), [3])
    assert "owns 100 labelled images." in scenario(config.replace(server_labels=100), [3])


def test_the_headline_compares_with_baseline_control_and_ensemble() -> None:
    results = [*RESULTS[:9], *(result("server-only", seed, 0.5) for seed in (0, 1, 2))]
    assert headline(summarize(results)) == [
        "activations+np is the best single model.",
        "+21.0 points (95 % interval +18.5 to +23.5, 3 seeds) against fedavg: 41.0 ± 1.0 %.",
        "+12.0 points (95 % interval +7.0 to +17.0, 3 seeds) against the best other control, server-only: "
        "50.0 ± 0.0 %.",
        "−28.0 points (95 % interval −33.0 to −23.0, 3 seeds) against the best ensemble, ensemble: 90.0 ± 0.0 %.",
    ]


def test_the_headline_says_when_a_control_wins() -> None:
    first, second, *_ = headline(summarize([result("server-only", 0, 0.9), result("weights+np", 0, 0.8)]))
    assert first == "server-only, a control, is the best single model."
    assert second == "+10.0 points (one seed: no interval) against the best aligned merge, weights+np: 80.0 %."


def test_the_headline_names_what_was_left_out() -> None:
    sentences = headline(summarize([result("mean", 0), result("mean", 1), result("np", 0, 0.9), failed("np", 1)]))
    assert sentences[-1] == "Not in the running, for they did not finish every seed: np."


def test_the_headline_of_failures_and_of_one_method_claims_nothing() -> None:
    assert headline(summarize([failed("a"), failed("b")])) == ["No method finished: there is nothing to compare."]
    assert headline(summarize([result("a+np")])) == ["a+np is the only method of this run."]
    half = summarize([result("a", 0), failed("a", 1), failed("b", 0), result("b", 1)])
    assert headline(half) == ["No single model finished every seed: there is nothing to compare."]


def test_a_run_under_flower_is_repeated_by_the_command_that_submits_it() -> None:
    settings = {"command": "flwr run", "config": {"clients": 3}}
    assert repeat_command(settings) == "fedmerge deploy run --superlink HOST:PORT --clients 3"
