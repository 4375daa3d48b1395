"""Atari as the papers have it: the emulator's own vector, with every setting written out.

    210 × 160 colours, 60 a second ─► grey, maximum of two, 84 × 84 ─► one in four ─► the last four

What an observation shows is checked by the tests against the emulator itself: planes 1 to 3 of a
row are planes 0 to 2 of the next, and where a game begins, planes 0 to 2 are zeros.
"""

import difflib
import os
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

PREPROCESSING = {
    "frameskip": 4,
    "maxpool": True,
    "grayscale": True,
    "img_height": 84,
    "img_width": 84,
    "stack_num": 4,
    "noop_max": 30,
    "max_num_frames_per_episode": 108_000,
    "repeat_action_probability": 0.0,
    "full_action_space": False,
    "use_fire_reset": False,
}
"""Of Mnih et al. (2015), and of IMPALA's (table G.1), Ape-X's and R2D2's runs; written out, so that
no default of the emulator's can change it. No-ops are single frames; the limit is of frames too."""


def make_atari(
    env_id: str, num_envs: int, mode: AutoresetMode, options: dict[str, Any]
) -> gym.vector.VectorEnv:
    """A vector of `num_envs` copies of an Atari game.

    Args:
        env_id: as `ALE/Pong-v5`.
        num_envs: B.
        mode: NEXT_STEP or SAME_STEP.
        options: of `AtariVectorEnv`, in place of ours.

    Raises:
        ValueError: no emulator here, no such game, or DISABLED autoreset.
    """
    try:
        import ale_py
        from ale_py.vector_env import AtariVectorEnv
    except ModuleNotFoundError as error:
        raise ValueError(
            f"env_id: {env_id} needs the Atari emulator: pip install 'rlbook[atari]'"
        ) from error
    if mode is AutoresetMode.DISABLED:
        raise ValueError(f"autoreset_mode: {env_id} knows next_step and same_step alone")
    gym.register_envs(ale_py)
    if env_id not in gym.registry:
        close = difflib.get_close_matches(env_id, list(gym.registry), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"env_id: there is no Atari game {env_id!r}{hint}")
    game = gym.spec(env_id).kwargs["game"]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    fixed: dict[str, Any] = {"episodic_life": False, "reward_clipping": False}
    fixed |= {"autoreset_mode": mode, "num_threads": int(threads) if threads.isdecimal() else 0}
    return AtariVectorEnv(game, num_envs, **{**PREPROCESSING, **fixed, **options})


def is_stacked(options: dict[str, Any]) -> bool:
    """Whether observations are stacks of grey frames, `[k, H, W]`, with these options."""
    return bool({**PREPROCESSING, **options}["grayscale"])
