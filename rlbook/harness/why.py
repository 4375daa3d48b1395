"""What bound a run, judged from its timeline and its metrics, in words.

    print(result.why())

The rule: take the kind of process of which one was busiest. Its time is work, or idle time that
has a reason: slower peers (waiting), another kind at work (then that kind is looked at instead), or
nothing that works at all, so messages (wire). The largest share is what bound the run. Work of
servers and learners is "learner"; work of processes that act is divided by the run's metrics.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from rlbook.harness.shares import Shares, driver_waits, kind_of, shares, stragglers
from rlbook.parts.timeline import Timeline

Bound = Literal["env", "inference", "learner", "wire", "waiting"]

SERVING = re.compile(r"learner|server|shard|aggregator|replay|group", re.IGNORECASE)
"""Kinds whose work is learning: they hold parameters, gradients or experience."""
INFERRING = re.compile(r"infer", re.IGNORECASE)
PARTS: dict[str, tuple[Bound, str]] = {
    "env_time_fraction": ("env", "environment steps"),
    "inference_time_fraction": ("inference", "inference"),
    "gradient_time_fraction": ("learner", "gradients"),
}
"""Metrics that divide the time of the processes that act."""
HEAVY = 1000.0
"""From so many bytes an environment step on, bytes are the first thing to save."""


class Diagnosis(NamedTuple):
    """What bound a run."""

    bound_by: Bound
    sentences: tuple[str, ...]
    """The verdict, then what it rests on."""
    advice: tuple[str, ...]
    """What to change, the likeliest first."""

    def __str__(self) -> str:
        """All of it as lines."""
        return "\n".join([*self.sentences, "What to change:", *(f"- {a}" for a in self.advice)])


def explain(
    spans: Iterable[tuple[str, str, float, float]] | None,
    metrics: Mapping[str, Any],
    config: Any = None,
) -> Diagnosis:
    """What bound a run and what to change.

    Args:
        spans: (who, what, start, end) in seconds, the driver's being waits; None or none for a run
            in one process, which its metrics alone must explain.
        metrics: last values by name (`rlbook.harness.log.METRICS`).
        config: its fields are named in the advice; others are not.

    Raises:
        ValueError: neither spans nor metrics say anything.
    """
    numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
    timeline = _without_beginnings(Timeline.of(spans or ()))
    found = _less_waits_within(shares(timeline), numbers.get("waiting_time_fraction", 0.0))
    if not found:
        return _from_metrics(numbers, config)
    kind, cause = _bottleneck(found)
    bound: Bound = cause if cause != "work" else _activity(kind, timeline, numbers)  # type: ignore[assignment]
    guess = _guessed(kind, numbers) if cause == "work" else []
    slow = stragglers(timeline)
    sentences = [_verdict(bound, kind, found[kind])]
    sentences += [_spent(name, share) for name, share in found.items()]
    sentences += [f"The driver waited {_percent(driver_waits(timeline))} of the time."]
    sentences += [
        f"{who} takes {ratio:.1f} times as long for a call as its peers."
        for who, ratio in slow.items()
    ]
    return Diagnosis(
        bound,
        (*sentences, *_division(numbers), *guess, *_traffic(numbers)),
        _advice(bound, kind, config, numbers, slow),
    )


def _less_waits_within(found: dict[str, Shares], waited: float) -> dict[str, Shares]:
    """Those who act may wait for their peers within a call; their metrics know for how long."""
    return {
        kind: share
        if SERVING.search(kind) or INFERRING.search(kind)
        else share._replace(
            work=(1 - waited) * share.work, waiting=share.waiting + waited * share.work
        )
        for kind, share in found.items()
    }


def _bottleneck(found: Mapping[str, Shares]) -> tuple[str, str]:
    """The kind that bound the run, and how: "work", "waiting" or "wire"."""
    kind = max(found, key=lambda name: found[name].busiest)
    mine = found[kind]
    if len(found) > 1 and mine.others > max(mine.work, mine.waiting, mine.wire):
        kind = max((name for name in found if name != kind), key=lambda name: found[name].union)
        mine = found[kind]
    parts = {"work": mine.work, "waiting": mine.waiting, "wire": mine.wire}
    return kind, max(parts, key=lambda name: parts[name])


def _activity(kind: str, timeline: Timeline, numbers: Mapping[str, float]) -> Bound:
    """What the work of a kind is."""
    if INFERRING.search(kind):
        return "inference"
    if SERVING.search(kind):
        return "learner"
    known = {name: numbers[name] for name in PARTS if name in numbers}
    if known:
        return PARTS[max(known, key=lambda name: known[name])][0]
    spent: dict[Bound, float] = {"env": 0.0, "inference": 0.0, "learner": 0.0}
    for span in timeline:
        if kind_of(span.who) == kind:
            learns = re.search("grad|learn|update|push|apply", span.what)
            infers = re.search("infer|forward|act$", span.what)
            part: Bound = "learner" if learns else "inference" if infers else "env"
            spent[part] += span.end - span.start
    return max(spent, key=lambda name: spent[name])


def _without_beginnings(timeline: Timeline) -> Timeline:
    """No constructors: to start processes takes seconds and says nothing of the run."""
    return Timeline.of(span for span in timeline if span.what != "__init__")


def _from_metrics(numbers: Mapping[str, float], config: Any) -> Diagnosis:
    """The diagnosis of a run without a timeline."""
    known = {name: numbers[name] for name in PARTS if name in numbers}
    idle = numbers.get("learner_idle_fraction")
    if idle is not None and idle < 0.5:
        bound: Bound = "learner"
        first = f"Bound by the learner: it was idle only {_percent(idle)} of the time."
    elif known:
        most = max(known, key=lambda name: known[name])
        bound, part = PARTS[most]
        first = f"Bound by {part}: they took {_percent(known[most])} of the time."
    else:
        raise ValueError(
            "why: the run kept no timeline and none of "
            + ", ".join([*PARTS, "learner_idle_fraction"])
            + ": nothing says what bound it"
        )
    sentences = (first, *_division(numbers), *_traffic(numbers))
    return Diagnosis(bound, sentences, _advice(bound, "", config, numbers, {}))


def _verdict(bound: Bound, kind: str, mine: Shares) -> str:
    """The first sentence."""
    who, were = (f"{kind}s", "were") if mine.processes > 1 else (kind, "was")
    if bound == "wire":
        return (
            f"Bound by the wire: for {_percent(mine.wire)} of the time the {who} {were} idle and"
            " nothing that they could wait for worked; messages were on their way."
        )
    if bound == "waiting":
        return (
            f"Bound by waiting: for {_percent(mine.waiting)} of the time the {who} {were} idle"
            " until a slower one was through."
        )
    names = {"env": "environments", "inference": "inference", "learner": "learner"}
    parts = {"env": "environment steps", "inference": "inference", "learner": "learning"}
    return (
        f"Bound by the {names[bound]}: the {who} worked {_percent(mine.work)} of the time,"
        f" the largest part of it at {parts[bound]}."
    )


def _spent(kind: str, share: Shares) -> str:
    """How one kind spent its time."""
    reasons = {
        "while slower peers worked": share.waiting,
        "while others worked": share.others,
        "while nobody did": share.wire,
    }
    idle = [f"{_percent(part)} idle {why}" for why, part in reasons.items() if part >= 0.005]
    count = f" ({share.processes} processes)" if share.processes > 1 else ""
    return f"{kind}{count}: {', '.join([f'at work {_percent(share.work)} of the time', *idle])}."


def _division(numbers: Mapping[str, float]) -> list[str]:
    """What the acting processes' work consists of."""
    parts = [f"{_percent(numbers[n])} {word}" for n, (_, word) in PARTS.items() if n in numbers]
    return [f"Of the time of those who act: {', '.join(parts)}."] if parts else []


def _guessed(kind: str, numbers: Mapping[str, float]) -> list[str]:
    """That the verdict rests on names alone, where it does."""
    if SERVING.search(kind) or INFERRING.search(kind) or any(name in numbers for name in PARTS):
        return []
    return [
        f"What the {kind} works at is guessed from its methods' names: the run has none of"
        f" {', '.join(PARTS)}."
    ]


def _traffic(numbers: Mapping[str, float]) -> list[str]:
    """What crosses the wire."""
    per_step = numbers.get("bytes_per_env_step")
    if per_step is None:
        return []
    rate = per_step * numbers.get("env_steps_per_s", 0.0) / 1e6
    return [f"Each environment step costs {per_step:,.0f} bytes on the wire: {rate:,.1f} MB/s."]


def _advice(
    bound: Bound, kind: str, config: Any, numbers: Mapping[str, float], slow: Mapping[str, float]
) -> tuple[str, ...]:
    """What to change, the likeliest first; settings are named where the config has them."""

    def setting(name: str, text: str) -> list[str]:
        value = getattr(config, name, None)
        return [] if value is None else [f"{text}: `{name}` (now {value})"]

    serving = SERVING.search(kind) is not None
    heavy = numbers.get("bytes_per_env_step", 0.0) >= HEAVY
    # One system has two learners, of which one replays.
    replays = hasattr(config, "samples_per_insert") and getattr(config, "learner", "") != "vtrace"
    lists = {
        "env": [
            *setting("num_envs", "more copies that step together cost less each"),
            *setting("num_workers", "more workers, as long as cores are free"),
            *setting("num_actors", "more actors, as long as cores are free"),
            "a faster environment: a vector entry point, fewer wrappers, arrays without copies",
        ],
        "inference": [
            *setting("num_envs", "more copies in one forward pass"),
            *setting("hidden_sizes", "a smaller network"),
            "inference for all actors in one batch, on a GPU if there is one",
        ],
        "learner": [
            *(setting("num_shards", "more shards that share the work") if serving else []),
            *([] if serving else setting("num_workers", "more workers that share the gradients")),
            *setting("num_learners", "more learners that share each batch"),
            *(
                setting("samples_per_insert", "fewer draws of each step from replay")
                if replays  # longer unrolls are drawn as often
                else setting("unroll_length", "fewer and larger gradients, of longer unrolls")
            ),
            *setting("hidden_sizes", "a smaller network"),
            "a GPU for the gradients, or a faster optimiser step",
        ],
        "wire": [
            *(setting("compression", "fewer bytes a gradient") if heavy else []),
            *setting("calls_in_flight", "more calls on their way at once"),
            *setting("unrolls_in_flight", "more unrolls on their way, and more lag"),
            *setting("unroll_length", "fewer and larger messages, of longer unrolls"),
            *setting("num_envs", "more environment steps for each message"),
            *([] if heavy else setting("compression", "fewer bytes a gradient")),
        ],
        "waiting": [
            *(f"mend or leave out {who}: it does the same work slower" for who in slow),
            *setting("update_rule", "let nobody wait for the slowest: async or bounded"),
            "equal work for all, or less for the slower ones",
        ],
    }
    return tuple(lists[bound]) or ("fewer, larger messages",)


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"
