"""How tasks go to actors: many short ones in one call, long ones alone, and none is lost with another's actor.

Ray is played by a clock and a list of calls; tests/test_simulation.py has the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from fedmerge import actors, actorside
from fedmerge.actors import LEAST_SECONDS, MOST_SECONDS, ActorPool
from fedmerge.actorside import Failure
from fedmerge.cluster import Resources


@dataclass(eq=False)
class Call:
    """A call of an actor, which is also its reference."""

    tasks: list[tuple[object, ...]]
    shared: tuple[object, ...]
    outcome: Callable[[], object]


@dataclass(eq=False)
class Method:
    """An actor's method."""

    call: Callable[..., Call]

    def remote(self, *arguments: object) -> Call:
        return self.call(*arguments)


class Actor:
    """Takes `seconds` for each task; "die" ends it, "die once" the first; it cannot pack what "unsendable" gives."""

    def __init__(self, ray: FakeRay) -> None:
        self.build = Method(lambda *_: Call([], (), self._built))
        self.answer = Method(self._answer)
        self._ray = ray

    def _built(self) -> None:
        if self._ray.stillborn:
            self._ray.stillborn -= 1
            raise RayActorError

    def _answer(self, tasks: list[tuple[object, ...]], *shared: object) -> Call:
        def outcome() -> object:
            names = [str(task[0]) for task in tasks]
            if "die" in names or ("die once" in names and not self._ray.killed):
                raise RayActorError
            if "unsendable" in names:
                raise RayTaskError("answer", "no text", TypeError("cannot pickle"))  # type: ignore[no-untyped-call]
            failures = [Failure("ValueError: bad", crashed=False) if name == "bad" else name.upper() for name in names]
            return self._ray.seconds * len(tasks), failures

        call = Call(tasks, shared, outcome)
        self._ray.calls.append(call)
        return call


@dataclass
class FakeRay:
    """What the pool uses of Ray."""

    seconds: float = 1.0
    hanging: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    killed: int = 0
    stillborn: int = 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2}}]

    def remote(self, **_: object) -> Callable[[type], Any]:
        class Made:
            @staticmethod
            def remote(*_: object) -> Actor:
                return Actor(self)

        return lambda _: Made

    def wait(self, pending: list[Call], *, num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        assert timeout >= 0
        done = [call for call in pending if not any(task[0] in self.hanging for task in call.tasks)]
        return done[:num_returns], []

    def get(self, reference: Call) -> object:
        return reference.outcome()

    def kill(self, _: Actor) -> None:
        self.killed += 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    found = FakeRay()
    monkeypatch.setattr(actors, "running_ray", lambda _: (found, False))
    return found


def pool(tasks: list[str], shared: Sequence[tuple[object, ...]] = ()) -> ActorPool:
    made = ActorPool(Resources(), 2)
    made.load("module:class")
    for number, task in enumerate(tasks):
        made.submit(f"{number} {task}", task, shared=shared[number] if shared else ())
    return made


def all_of(made: ActorPool, count: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for _ in range(4 * count + 4):
        found |= dict(made.poll(0))
    assert len(found) == count
    return found


def sizes(ray: FakeRay) -> list[int]:
    return [len(call.tasks) for call in ray.calls]


def test_long_tasks_go_one_at_a_time_and_short_ones_together_once_it_is_known_how_short_they_are(ray: FakeRay) -> None:
    assert all_of(pool(["a"] * 10), 10) == {f"{number} a": "A" for number in range(10)}
    assert sizes(ray) == [1] * 10
    ray.calls.clear()
    ray.seconds = 0.001
    all_of(pool(["a"] * 2000), 2000)
    least, most = round(LEAST_SECONDS / 0.001), round(MOST_SECONDS / 0.001)
    assert sizes(ray)[:3] == [1, 1, most]
    assert sizes(ray)[2:] == sorted(sizes(ray)[2:], reverse=True)
    assert min(sizes(ray)[2:-1]) >= least
    assert [task[0] for call in ray.calls for task in call.tasks] == ["a"] * 2000


def test_tasks_that_share_no_value_are_not_sent_together_and_another_object_is_not_known_yet(ray: FakeRay) -> None:
    ray.seconds = 0.001
    shared = [("x",) if number % 40 < 20 else ("y",) for number in range(100)]
    made = pool(["a"] * 100, shared)
    all_of(made, 100)
    assert all(len(call.tasks) <= 20 for call in ray.calls)
    assert {call.shared for call in ray.calls} == {("x",), ("y",)}
    ray.calls.clear()
    made.load("module:other")
    made.submit("b", "b")
    made.submit("c", "c")
    all_of(made, 2)
    assert sizes(ray) == [1, 1]


def test_the_tasks_that_were_with_one_that_ended_its_actor_are_sent_again_each_alone(ray: FakeRay) -> None:
    ray.seconds = 0.001
    found = all_of(pool(["a"] * 20 + ["die", "bad", "unsendable"] + ["a"] * 60), 83)
    assert [name for name, result in found.items() if isinstance(result, Failure)] == [
        "20 die",
        "21 bad",
        "22 unsendable",
    ]
    crashed = {name: result.crashed for name, result in found.items() if isinstance(result, Failure)}
    assert crashed == {"20 die": True, "21 bad": False, "22 unsendable": False}
    assert found["22 unsendable"] == Failure("TypeError: cannot pickle", crashed=False)
    assert ray.killed == 2  # once with others, once alone


def test_a_task_whose_actor_ended_is_sent_once_more(ray: FakeRay, caplog: pytest.LogCaptureFixture) -> None:
    assert all_of(pool(["a", "die once"]), 2) == {"0 a": "A", "1 die once": "DIE ONCE"}
    assert ray.killed == 1
    assert "is sent again" in caplog.text
    found = all_of(pool(["a", "die"]), 2)
    assert isinstance(found["1 die"], Failure)
    assert found["1 die"].crashed
    assert ray.killed == 1 + 2


def test_an_actor_that_ends_while_it_starts_is_started_again_but_not_forever(ray: FakeRay) -> None:
    ray.stillborn = 3
    assert all_of(pool(["a", "b"]), 2) == {"0 a": "A", "1 b": "B"}
    ray.stillborn = 100
    found = all_of(pool(["a", "b"]), 2)
    assert all(isinstance(result, Failure) and "no Ray actor could start" in result.reason for result in found.values())


def test_a_task_that_is_cancelled_ends_its_actor_and_those_with_it_are_sent_again(ray: FakeRay) -> None:
    ray.seconds, ray.hanging = 0.001, {"hang"}
    made = pool(["a", "a", "hang", *["a"] * 60])
    found: dict[str, object] = {}
    for _ in range(20):
        found |= dict(made.poll(0))
    assert "3 a" not in found
    assert made.cancel("2 hang")
    assert ray.killed == 1
    for _ in range(80):
        found |= dict(made.poll(0))
    assert len(found) == 62
    assert not made.cancel("2 hang")


def test_a_task_whose_turn_has_not_come_is_forgotten(ray: FakeRay) -> None:
    made = pool(["a", "b", "c"])
    assert not made.cancel("1 b")
    assert all_of(made, 2) == {"0 a": "A", "2 c": "C"}
    assert ray.killed == 0


def test_an_actor_answers_each_task_and_tells_what_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # an actor sets it; this puts it back

    class Held:
        def answer(self, number: int, shared: int) -> float:
            return shared / number

    actor = actorside.actor_class()([])
    actor.held = Held()
    seconds, results = actor.answer([(1,), (0,), (2,)], 6)
    assert seconds >= 0
    assert results == [6.0, Failure("ZeroDivisionError: division by zero", crashed=False), 3.0]
