"""The systems of the book by name, in the order of its chapters; imported only when asked for."""

SYSTEMS = {
    "mdp": "value and policy iteration: plain, vectorised, in parallel (chapter 01)",
    "td": "Monte Carlo, TD(0), SARSA, Q-learning on tables (chapter 02)",
    "dqn": "deep Q-networks: replay, target, double, dueling, n-step, prioritised (chapter 03)",
    "policy_gradient": "REINFORCE, REINFORCE with a baseline, A2C (chapter 04)",
    "ppo": "proximal policy optimisation with GAE (chapter 04)",
    "parameter_server": "A2C through a sharded parameter server: sync, async, bounded (chapter 06)",
    "gorila": "DQN with many actors, replay memories and learners (chapter 07)",
    "a3c": "asynchronous actor-learners in shared memory or with a server (chapter 08)",
    "dppo": "PPO on many workers: all-reduce with preemption, or a parameter server (chapter 09)",
    "apex": "double dueling DQN with many actors and prioritised replay (chapter 10)",
    "apex_dpg": "Ape-X for actions that are numbers: a deterministic policy, a critic (chapter 10)",
    "impala": "actors apart from learners, V-trace, one to k learners, several tasks (chapter 11)",
    "r2d2": "Ape-X with memory: sequences, stored state, burn-in, rescaled values (chapter 12)",
    "seed_rl": "IMPALA with central inference: workers without a network, gRPC (chapter 13)",
}
"""Module stem → one line about it."""
