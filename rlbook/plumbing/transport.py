"""What travels between env workers and a server that acts for them, as bytes; no gRPC in here.

    worker                                                       server
    Hello: who, run_id, groups × copies, schema  ───────────►    known? fits? else Refused
    Rows: group, bytes of one EnvOutput [B]      ───────────►    Track.decode: checked, not copied
    Actions: group, bytes of B actions           ◄───────────    or Rest, or Hold

The shapes and dtypes of a row are said once, in the hello; after that a row is nothing but the
bytes of its arrays. Whoever reads bytes of others checks them: what is not as it was said is
`Refused`, with the name of a gRPC status and a reason. Messages are of `seed.proto`.

Of a stack of frames only the newest is sent, after a first whole row: the rest is known already.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from google.protobuf.message import DecodeError

from rlbook.data import EnvOutput
from rlbook.parts.envs import Episode
from rlbook.plumbing import seed_pb2 as pb

PROTOCOL = 1
"""Changes when messages change their meaning."""
MAX_ENVS = 1 << 20
"""A hello that speaks of more copies is refused."""
ACTION = np.dtype("<i4")
ENDS = frozenset((0.0, 1.0))
"""What a discount may be: an episode ended there, or it did not."""


class Refused(Exception):
    """What came is not as it should be; `status` is the name of a gRPC status code."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    def __reduce__(self) -> Any:
        return Refused, (self.status, self.message)


def invalid(message: str) -> NoReturn:
    """Raises `Refused` with INVALID_ARGUMENT."""
    raise Refused("INVALID_ARGUMENT", message)


class Field(NamedTuple):
    """One array of a row."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    """Of one copy."""

    @property
    def nbytes(self) -> int:
        """Of one copy."""
        return self.dtype.itemsize * math.prod(self.shape)


class Schema:
    """How rows `[B]` lie in bytes.

    Args:
        observation_shape: of one observation.
        observation_dtype: uint8 or float32.
        copies: B.
        stacked: observations are stacks of frames `[k, H, W]` (see `parts.frames`), of which only
            the newest is sent, but for a stream's first rows.
    """

    def __init__(
        self,
        observation_shape: Sequence[int],
        observation_dtype: Any,
        copies: int,
        stacked: bool = False,
    ) -> None:
        number, shape = np.dtype("<f4"), tuple(int(size) for size in observation_shape)
        kind = np.dtype(observation_dtype).newbyteorder("<")
        # Bytes last, so that wider numbers lie where they may be read.
        self.fields = (
            Field("reward", number, ()),
            Field("discount", number, ()),
            Field("observation", kind, shape),
            Field("first", np.dtype("|b1"), ()),
        )
        self.copies = copies
        self.nbytes = copies * sum(field.nbytes for field in self.fields)
        """Of a row."""
        places, start = {}, 0
        for field in self.fields:
            places[field.name] = (copies, *field.shape), field.dtype, start
            start += copies * field.nbytes
        self._places = [places[name] for name in EnvOutput._fields]
        self._dtypes = [field.dtype for field in self.fields]
        self.newest: Schema | None = None
        """Of rows with the newest frame alone, if that is what is sent."""
        if stacked and shape[0] > 1:
            self.newest = Schema((1, *shape[1:]), observation_dtype, copies)

    @classmethod
    def of(cls, row: EnvOutput, stacked: bool = False) -> "Schema":
        """That of a row `[B]`, of stacks of frames or not."""
        observation = row.observation
        return cls(observation.shape[1:], observation.dtype, len(observation), stacked)

    @property
    def sent(self) -> "Schema":
        """That of most rows that are sent."""
        return self.newest or self

    @property
    def said(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """What a hello says of it: names, dtypes and shapes."""
        fields = [(name, dtype.str, shape) for name, dtype, shape in self.fields]
        if self.newest is not None:
            _, dtype, shape = fields[2]
            fields.append(("newest", dtype, (1, *shape[1:])))
        return fields

    def encode(self, row: EnvOutput) -> bytes:
        """The bytes of a row."""
        arrays = row.reward, row.discount, row.observation, row.first
        parts: Any = map(np.ascontiguousarray, arrays, self._dtypes)
        return b"".join(parts)

    def decode(self, data: bytes) -> EnvOutput:
        """A row that reads the bytes where they lie.

        Raises:
            Refused: of another length, or values that no environment gives.
        """
        if len(data) != self.nbytes:
            invalid(f"rows: must be {self.nbytes} bytes, got {len(data)}")
        places = self._places
        row = EnvOutput(*[np.ndarray(shape, kind, data, start) for shape, kind, start in places])
        # Python's own: for some copies quicker than arrays.
        if data[-self.copies :].translate(None, b"\0\1"):  # first lies at the end
            invalid("rows: first must be bytes of 0 or 1")
        if not ENDS.issuperset(row.discount.tolist()):
            invalid("rows: discount must be 0 or 1")
        if not math.isfinite(sum(row.reward.tolist())):
            invalid("rows: reward must be finite")
        if row.observation.dtype.kind == "f" and not np.isfinite(row.observation).all():
            invalid("rows: observation must be finite")
        return row


class Track:
    """The rows of one stream, at either end; what was sent last of each group is known to both.

    Args:
        schema: of the rows.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._begun: set[int] = set()
        self._seen: dict[int, np.ndarray] = {}
        """By group: the observation last decoded."""

    def encode(self, group: int, row: EnvOutput) -> bytes:
        """The bytes of a group's next row."""
        newest = self.schema.newest
        if newest is None or group not in self._begun:
            self._begun.add(group)
            return self.schema.encode(row)
        return newest.encode(row._replace(observation=row.observation[:, -1:]))

    def decode(self, group: int, data: bytes) -> EnvOutput:
        """A group's next row, with the whole stack of its frames. `Refused` as `Schema.decode`
        says, and where the newest frame comes before any other.
        """
        newest = self.schema.newest
        if newest is None:
            return self.schema.decode(data)
        if len(data) != newest.nbytes:
            row = self.schema.decode(data)
        elif (before := self._seen.get(group)) is None:
            invalid("rows: the first of a group must have all its frames")
        else:
            row = newest.decode(data)
            stack = np.empty_like(before)
            stack[:, :-1], stack[:, -1:] = before[:, 1:], row.observation
            stack[row.first, :-1] = 0
            row = row._replace(observation=stack)
        self._seen[group] = row.observation
        return row


class Introduction(NamedTuple):
    """What a worker says of itself, once it is checked."""

    worker: int
    run_id: int
    groups: int
    copies: int


def hello(
    worker: int, run_id: int, groups: Sequence[EnvOutput], token: bytes = b"", stacked: bool = False
) -> pb.FromWorker:
    """The first message of a stream, from the rows of a worker's groups."""
    schema = Schema.of(groups[0], stacked)
    return pb.FromWorker(
        hello=pb.Hello(
            protocol=PROTOCOL,
            token=token,
            worker=worker,
            run_id=run_id,
            groups=len(groups),
            copies=schema.copies,
            fields=[
                pb.Field(name=name, dtype=dtype, shape=shape) for name, dtype, shape in schema.said
            ],
        )
    )


def introduced(message: pb.FromWorker, schema: Schema, token: bytes) -> Introduction:
    """Who a first message is from.

    Args:
        message: as it came.
        schema: what rows must be.
        token: what those who may connect were told.

    Raises:
        Refused: no hello, another protocol, token or schema.
    """
    if message.WhichOneof("kind") != "hello":
        invalid("the first message of a stream must be a hello")
    said = message.hello
    if said.protocol != PROTOCOL:
        raise Refused("FAILED_PRECONDITION", f"protocol: must be {PROTOCOL}, got {said.protocol}")
    if said.token != token:
        raise Refused("UNAUTHENTICATED", "token: not the one that this server gave out")
    if not 1 <= said.groups * said.copies <= MAX_ENVS:
        invalid(f"groups, copies: {said.groups} × {said.copies} must be 1 to {MAX_ENVS}")
    if said.copies != schema.copies:
        invalid(f"copies: must be {schema.copies}, got {said.copies}")
    theirs = [(field.name, field.dtype, tuple(field.shape)) for field in said.fields[:9]]
    ours = schema.said
    if theirs != ours:
        invalid(f"fields: must be {ours}, got {theirs}")
    return Introduction(said.worker, said.run_id, said.groups, said.copies)


def rows(
    group: int, data: bytes, episodes: Sequence[Episode] = (), env_s: float = 0.0
) -> pb.FromWorker:
    """One row of one group, and the seconds that the step to it took."""
    message = pb.FromWorker()
    told = message.rows
    told.group, told.data, told.env_s = group, data, env_s
    for env, episode_return, length in episodes:
        told.episodes.add(env=env, episode_return=episode_return, length=length)
    return message


def opened(data: bytes) -> pb.FromWorker:
    """The message that some bytes are; `Refused` if they are none."""
    try:
        return pb.FromWorker.FromString(data)
    except DecodeError as error:
        invalid(f"no message of seed.proto: {error}")


def episodes_of(message: pb.Rows, copies: int) -> list[Episode]:
    """The ended episodes in a message, checked."""
    found = []
    for one in message.episodes:
        if one.env >= copies or not math.isfinite(one.episode_return):
            invalid(f"episodes: env must be below {copies}, and the return finite")
        found.append(Episode(one.env, one.episode_return, one.length))
    return found


def env_s_of(message: pb.Rows) -> float:
    """Seconds of the step to a row; `Refused` if they cannot be."""
    if not 0.0 <= message.env_s < math.inf:
        invalid(f"env_s: must be finite and at least 0, got {message.env_s}")
    return message.env_s


def actions(group: int, action: np.ndarray) -> bytes:
    """The message that answers a row."""
    message = pb.ToWorker()
    told = message.actions
    told.group, told.data = group, action.astype(ACTION).tobytes()
    return message.SerializeToString()


def actions_of(message: pb.Actions, copies: int) -> np.ndarray:
    """`[B]` int64; `Refused` if they are not as many as there are copies."""
    if len(message.data) != copies * ACTION.itemsize:
        invalid(f"actions: must be {copies}, got {len(message.data)} bytes")
    return np.frombuffer(message.data, ACTION).astype(np.int64)
