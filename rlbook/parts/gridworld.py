"""GridWorld: a map of cells, four moves, a floor that may be slippery. Small enough to solve
exactly, and to see.

    S start   G goal (ends)   P pit (ends)   # wall   . floor

An action names a direction. With probability ``slip`` the move goes to one of the two sides
instead (half of it each), and a move into a wall or over the edge stays where it is. Only cells
that are not walls are states, numbered row by row.

The reward belongs to the cell where one lands: ``goal_reward`` in a goal, ``pit_reward`` in a pit,
``step_reward`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlbook.parts.tabular import Floats, Ints, TabularMDP

ENV_ID = "rlbook/GridWorld-v0"
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
"""Row and column steps of the four actions: up, right, down, left."""
ARROWS = "↑→↓←"

MAPS: dict[str, tuple[str, ...]] = {
    "corridor": ("S...G",),
    "small": ("...G", ".#.P", "S..."),
    "cliff": ("............", "............", "............", "SPPPPPPPPPPG"),
    "rooms": (
        "S....#.....",
        ".....#.....",
        "...........",
        ".....#.....",
        ".....#.....",
        "#.####.....",
        ".....###.##",
        ".....#.....",
        ".....#.....",
        "...........",
        ".....#....G",
    ),
}
"""Named maps: a corridor, the 3 × 4 world of Russell and Norvig, a cliff after Sutton and Barto,
four rooms."""

COLOURS = {
    ".": (236, 239, 244),
    "S": (214, 228, 245),
    "#": (59, 66, 82),
    "G": (0, 158, 115),
    "P": (213, 94, 0),
}


class GridMap:
    """A parsed map: ``cells`` str ``[H, W]``, ``numbers`` int ``[H, W]`` (−1 on walls),
    ``positions`` int ``[S, 2]``.

    Raises ``ValueError`` for an empty or ragged map, an unknown letter, or a map without a goal or
    an open cell.
    """

    constant = True
    """Never changes: no part of an environment's state."""

    def __init__(self, rows: Sequence[str]) -> None:
        if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
            raise ValueError("rows: a map needs at least one row, and all rows of the same length")
        unknown = set("".join(rows)) - set(COLOURS)
        if unknown:
            allowed = sorted(COLOURS)
            raise ValueError(f"rows: unknown cells {sorted(unknown)}; allowed are {allowed}")
        self.cells = np.array([list(row) for row in rows])
        if "G" not in self.cells or not np.isin(self.cells, [".", "S"]).any():
            raise ValueError("rows: a map needs a goal 'G' and a cell to start from")
        self.positions: Ints = np.argwhere(self.cells != "#")
        self.numbers: Ints = np.full(self.cells.shape, -1)
        self.numbers[tuple(self.positions.T)] = np.arange(len(self.positions))

    @property
    def letters(self) -> NDArray[np.str_]:
        """The letter of each state, ``[S]``."""
        return self.cells[tuple(self.positions.T)]

    def to_grid(self, values: NDArray[Any]) -> Floats:
        """Lay ``values`` ``[S]`` out on the map ``[H, W]``, NaN on walls."""
        grid = np.full(self.cells.shape, np.nan)
        grid[tuple(self.positions.T)] = values
        return grid

    def neighbours(self) -> Ints:
        """The state reached by each of the four moves when nothing slips, ``[4, S]``: itself where
        a wall is in the way.
        """
        height, width = self.cells.shape
        target = self.positions[None] + MOVES[:, None]
        inside = ((target >= 0) & (target < (height, width))).all(axis=-1)
        target = np.where(inside[..., None], target, self.positions[None])
        landed = self.numbers[target[..., 0], target[..., 1]]
        return np.where(landed < 0, np.arange(len(self.positions)), landed)


def gridworld_mdp(
    grid: GridMap,
    *,
    slip: float = 0.0,
    step_reward: float = -0.04,
    goal_reward: float = 1.0,
    pit_reward: float = -1.0,
) -> TabularMDP:
    """The exact model of a map: four actions, at most four successors a state.

    ``slip`` is the probability, 0 to 1, that a move goes sideways. Episodes start in the 'S'
    cells, or in any floor cell when there is none. Raises ``ValueError`` for a ``slip`` out of
    range.
    """
    if not 0 <= slip <= 1:
        raise ValueError(f"slip must be between 0 and 1, got {slip}")
    sideways = np.roll(np.eye(4), 1, axis=1) + np.roll(np.eye(4), -1, axis=1)
    mixing = (1 - slip) * np.eye(4) + slip / 2 * sideways
    letters = grid.letters
    terminal = np.isin(letters, ["G", "P"])
    successors = np.where(terminal, np.arange(len(letters)), grid.neighbours())
    pay = np.select([letters == "G", letters == "P"], [goal_reward, pit_reward], step_reward)
    starts = letters == ("S" if "S" in letters else ".")
    return TabularMDP(
        successors=successors,
        probabilities=mixing[:, :, None],
        rewards=np.where(terminal, 0.0, pay[successors])[None],
        terminal=terminal,
        start=starts / starts.sum(),
    )


def random_map(
    height: int, width: int, *, walls: float = 0.2, pits: float = 0.0, seed: int = 0
) -> list[str]:
    """A map of random walls and pits (fractions of all cells) with the start top left and the goal
    bottom right.

    A wall may cut the goal off; the values are then those of a life without one. Raises
    ``ValueError`` for a map of one cell.
    """
    if height < 1 or width < 1 or height * width < 2:
        raise ValueError(f"height and width must give at least two cells, got {height} × {width}")
    draw = np.random.default_rng(seed).random((height, width))
    cells = np.select([draw < walls, draw < walls + pits], ["#", "P"], ".")
    cells[0, 0], cells[-1, -1] = "S", "G"
    return ["".join(row) for row in cells]


def named_map(name: str) -> Sequence[str]:
    """A map of ``MAPS``, or "big". Raises ``ValueError`` for another name."""
    if name == "big":
        return random_map(200, 200, walls=0.2, seed=0)
    if name not in MAPS:
        raise ValueError(f"map_name {name!r} is unknown; known are {sorted([*MAPS, 'big'])}")
    return MAPS[name]


class GridWorld(gym.Env[np.int64, np.int64]):
    """``rlbook/GridWorld-v0``: observation = number of the state, action = 0 up, 1 right, 2 down,
    3 left.

    ``map_name`` is one of ``MAPS`` or "big" (200 × 200 cells, a fifth of them walls); ``rows``
    gives a map of your own instead; the other arguments are those of :func:`gridworld_mdp`. The
    exact model is in ``mdp``, the map in ``grid``. ``render_mode`` may be ``"rgb_array"``.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self,
        map_name: str = "small",
        *,
        rows: Sequence[str] | None = None,
        slip: float = 0.0,
        step_reward: float = -0.04,
        goal_reward: float = 1.0,
        pit_reward: float = -1.0,
        render_mode: str | None = None,
    ) -> None:
        if rows is None:
            rows = named_map(map_name)
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r} is unknown; allowed is 'rgb_array'")
        self.grid = GridMap(rows)
        self.mdp = gridworld_mdp(
            self.grid,
            slip=slip,
            step_reward=step_reward,
            goal_reward=goal_reward,
            pit_reward=pit_reward,
        )
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Discrete(self.mdp.num_states)
        self.action_space = gym.spaces.Discrete(self.mdp.num_actions)
        # Plain lists: reading one element of a NumPy array costs several times as much.
        self._next: list[list[int]] = self.mdp.successors.T.tolist()
        self._pay: list[list[float]] = self.mdp.rewards[0].T.tolist()
        cumulative = self.mdp.probabilities[:, :, 0].cumsum(axis=1)
        self._cumulative: list[list[float]] = cumulative.tolist()
        self._terminal: list[bool] = self.mdp.terminal.tolist()
        self._starts: list[int] = np.flatnonzero(self.mdp.start).tolist()
        self._state = self._starts[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; ``options={"state": s}`` starts in state s. Returns (state, {})."""
        super().reset(seed=seed)
        if options and "state" in options:
            self._state = int(options["state"])
            if not 0 <= self._state < self.mdp.num_states:
                raise ValueError(f"options: state must be 0 to {self.mdp.num_states - 1}")
        else:
            self._state = self._starts[int(self.np_random.integers(len(self._starts)))]
        return self._state, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Move. Returns (state, reward, terminated, False, {}); this env never truncates by
        itself.
        """
        draw, move = self.np_random.random(), 0
        cumulative = self._cumulative[action]
        while draw >= cumulative[move] and move < 3:
            move += 1
        reward = self._pay[self._state][move]
        self._state = self._next[self._state][move]
        return self._state, reward, self._terminal[self._state], False, {}

    def render(self) -> NDArray[np.uint8]:
        """The map with the player as a disc: uint8 ``[32 H, 32 W, 3]``."""
        return draw_map(self.grid, self._state)


def draw_map(grid: GridMap, state: int | None = None, size: int = 32) -> NDArray[np.uint8]:
    """Cells as coloured squares of ``size`` pixels, the player as a dark disc. Returns uint8
    ``[size·H, size·W, 3]``.
    """
    height, width = grid.cells.shape
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for letter, colour in COLOURS.items():
        image[grid.cells == letter] = colour
    image = image.repeat(size, axis=0).repeat(size, axis=1)
    image[::size] = image[:, ::size] = 255
    if state is not None:
        row, column = grid.positions[state] * size + size // 2
        y, x = np.ogrid[: height * size, : width * size]
        image[(y - row) ** 2 + (x - column) ** 2 <= (size * 0.3) ** 2] = (0, 63, 122)
    return image


def register_map(env_id: str, *, max_episode_steps: int = 500, **options: Any) -> str:
    """Give a map a Gymnasium id of its own, so that every system can be told to learn it. Returns
    ``env_id``.

    ``options`` are those of :class:`GridWorld`. An id that is taken keeps its first meaning.
    """
    if env_id not in gym.registry:
        gym.register(
            env_id,
            entry_point="rlbook.parts.gridworld:GridWorld",
            max_episode_steps=max_episode_steps,
            disable_env_checker=True,
            kwargs=options,
        )
    return env_id


def register() -> None:
    """Make the book's grids known to Gymnasium. Calling it again does nothing."""
    cliff: dict[str, Any] = {"step_reward": -1.0, "goal_reward": -1.0, "pit_reward": -100.0}
    register_map(ENV_ID, map_name="small", slip=0.2)
    register_map("rlbook/Corridor-v0", map_name="corridor")
    register_map("rlbook/Cliff-v0", map_name="cliff", **cliff)
    register_map("rlbook/Rooms-v0", map_name="rooms", slip=0.1)
    register_map("rlbook/BigGrid-v0", map_name="big", slip=0.2, max_episode_steps=5_000)
