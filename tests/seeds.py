"""What tests of central inference share: an agent that echoes, and a server around it."""

import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rlbook.data import AgentOutput, EnvOutput
from rlbook.plumbing.central import Central
from rlbook.plumbing.inference import Inference
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.streams import StreamServer, StreamSettings, Tls
from rlbook.plumbing.transport import Schema

QUICK = StreamSettings(silence_s=20.0, connect_s=10.0)


class Echo:
    """Says back what it sees: the action is the first number of the observation, the value the
    last; the state counts the rows of an episode. Any mix-up shows as unequal integers.
    """

    said = AgentOutput

    def __init__(self) -> None:
        self.vector = np.zeros(1)
        self.batches: list[int] = []

    def initial_state(self, copies: int) -> Any:
        return (np.zeros((copies, 1)),)

    def refresh(self) -> None:
        pass

    def act(self, observation, first, state, draws):
        self.batches.append(len(observation))
        assert sum(rows for _, rows, _ in draws) == len(observation)
        (count,) = state
        count = np.where(first[:, None], 0, count) + 1
        logits = np.concatenate([count, np.broadcast_to(self.vector, count.shape)], 1)
        return AgentOutput(observation[:, 0].astype(np.int64), logits, observation[:, -1]), (count,)


def echoing(unroll_length: int = 4) -> Inference:
    """Its seed of a place is unused."""
    agent = Echo()
    return Inference(agent, agent.vector, unroll_length, lambda place, run_id: place)


def central(**changes: Any) -> Central:
    """A service of `Echo`, for two workers with three copies."""
    settings = {
        "num_workers": 2,
        "groups": 1,
        "inference_batch": 1,
        "inference_timeout_s": None,
        "unrolls_in_flight": 1_000_000,
    }
    return Central(echoing(), SimpleNamespace(**(settings | changes)))


@contextmanager
def serving(folder: Any, settings: StreamSettings = QUICK, address: str = "", **changes: Any):
    """A listening server of `central(**changes)`; its rows are Counter's, three copies."""
    with ExitStack() as stack:
        made = StreamServer(
            central(**changes), Schema((3,), "f4", 3), address or f"unix:{folder}/s", settings
        )
        yield stack.enter_context(made)


def newer(version: int) -> Vector:
    """Parameters that say their version."""
    return Vector(version, np.full(1, float(version)))


def certificate(folder: Path) -> Tls:
    """A self-signed one for localhost."""
    files = [str(folder / "certificate.pem"), str(folder / "key.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        + ["-out", files[0], "-keyout", files[1]],
        check=True,
        capture_output=True,
    )
    return Tls(files[0], files[1], "localhost")


def stacks(steps: int, copies: int = 2, planes: int = 4, seed: int = 0) -> list[EnvOutput]:
    """Rows as an emulator gives them: shifted by one frame, or zeros before an episode's first."""
    rng = np.random.default_rng(seed)
    stack, rows = rng.integers(0, 256, (copies, planes, 3, 5), np.uint8), []
    for _ in range(steps):
        first = rng.random(copies) < 0.3
        newest = rng.integers(0, 256, (copies, 1, 3, 5), np.uint8)
        stack = np.concatenate([stack[:, 1:], newest], 1)
        stack[first, :-1] = 0
        reward = rng.normal(size=copies).astype(np.float32)
        rows.append(EnvOutput(stack, reward, np.ones(copies, np.float32), first))
    return rows
