"""What the systems are told on one large GPU and 16 cores: the presets `one_gpu`.

Tuned for Atari on one H200 (141 GB) and 16 cores, by arithmetic, not by trial: no such computer was
in reach when they were written, and results/ says which records exist. Where cores are fewer, set
`num_actors` (`num_workers`) to two fewer than there are. What decides:

- A step of Pong took 0.24 ms of the core that it was tried on, so that 14 such cores step about
  58,000 times a second if they do nothing else. SEED RL's workers do nothing else. Actors that act
  by themselves need 0.2 ms more for the convolutions of a row, and 1.5 ms for the deep network's.
- A stack of frames is 28 KB, of which 7 KB are new. Replay memories keep each frame once for each
  chunk or sequence that it comes in: 8.8 KB a transition of Ape-X's (56 KB of whole stacks), 0.49
  MB a sequence of R2D2's (1.84 MB). At 128 GiB the memories below leave room: for a checkpoint, as
  much again in Ray's object store, and once more beside R2D2's.
- `log_every_env_steps` is some tenths of a second of training; checkpoints with a replay memory of
  frames take minutes, so that there is one at the end alone, and only with a run folder.
- Evaluations, of 100 games side by side, are made on the cores, hence `torch_threads`.
"""

from typing import Any

GPU: dict[str, Any] = {
    "env_id": "ALE/Pong-v5",
    "device": "auto",
    "precision": "bfloat16",
    "torch_threads": 8,
    "log_every_env_steps": 20_000,
    "checkpoint_every_s": 3_600.0,
}
"""All of them."""

ACTOR_CRITIC: dict[str, Any] = {
    "total_env_steps": 20_000_000,
    "unroll_length": 20,
    "unrolls_per_batch": 4,
    "lambda_": 1.0,
    "discount": 0.99,
    "loss_reduction": "sum",
    "optimizer": "adam",
    "learning_rate": 6e-4,
    "entropy_cost": 0.01,
    "max_gradient_norm": 40.0,
}
"""IMPALA's values for Atari (table G.1) but for Adam, whose steps hang less on the batch's size,
and a step size that stays."""

IMPALA: dict[str, Any] = {
    **GPU,
    **ACTOR_CRITIC,
    "num_actors": 14,
    "num_envs": 16,  # a batch is 4 unrolls of 320 rows; the lag about 14 · 2 / 4 updates
    "unrolls_in_flight": 2,
    "updates_in_flight": 2,
}

SEED_RL: dict[str, Any] = {
    **GPU,
    **ACTOR_CRITIC,
    "num_workers": 14,
    "groups": 2,  # one steps while the other waits for its actions
    "num_envs": 32,  # 7 ms a step: more than the way to the server and back
    "inference_batch": 128,
    "num_inference": 2,
    "unrolls_in_flight": 2,
}

APEX: dict[str, Any] = {
    **GPU,
    "total_env_steps": 20_000_000,
    "num_actors": 12,
    "num_envs": 16,
    "unroll_length": 25,  # chunks of 400 transitions
    "num_replays": 2,
    "replay_capacity": 2_000_000,  # 16.4 GiB; 105 GiB of whole stacks
    "learning_starts": 20_000,
    "samples_per_insert": 2.0,
    "rate_tolerance": 16_384,
    "batch_size": 512,
    "updates_per_call": 4,
    "broadcast_period": 8,
    "target_period": 2_500,
    "n_step": 3,
    "optimizer": "rmsprop",
    "learning_rate": 2.5e-4 / 4,
    "optimizer_epsilon": 1.5e-7,
    "max_gradient_norm": 40.0,
}
"""The paper's, with shorter waits for the first update. An actor sends 9 KB a step; what is drawn
travels as whole stacks, 113 KB for each step taken."""

R2D2: dict[str, Any] = {
    **GPU,
    "total_env_steps": 20_000_000,
    "num_actors": 12,
    "num_envs": 16,
    "sequence_length": 40,
    "sequence_overlap": 20,
    "burn_in_length": 20,  # 20 was tried in the paper too
    "unroll_length": 20,
    "discount": 0.997,
    "batch_size": 64,
    "updates_per_call": 1,
    "broadcast_period": 4,
    "samples_per_insert": 1.5,
    "replay_capacity": 50_000,  # 22.6 GiB; 86 GiB of whole stacks
    "learning_starts": 1_000,
    "learning_rate": 1e-4,
    "optimizer_epsilon": 1e-3,
    "target_period": 1_000,
    "lstm_size": 512,
    "num_replays": 2,
}
"""The paper's with sequences of half the length: a batch is 31 MB of frames on its way, and 117 MB
of stacks on the GPU."""

DPPO: dict[str, Any] = {
    **GPU,
    "total_env_steps": 20_000_000,
    "num_workers": 12,
    "num_envs": 16,
    "unroll_length": 64,
    "epochs": 3,
    "minibatch_size": 3_072,  # 256 samples of each worker
    "discount": 0.99,
    "gae_lambda": 0.95,
    "clip": 0.1,
    "learning_rate": 5e-4,
    "value_cost": 0.5,
    "entropy_cost": 0.01,
}
"""PPO's values for Atari (Schulman et al., 2017, table 5) but for a larger batch and step size. All
workers share the GPU, so that their sums go through the host, by gloo."""
