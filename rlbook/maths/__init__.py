"""Equations as pure functions: no configuration, no device, no process inside.

Import the module that you need, e.g. ``from rlbook.maths import returns``; this file imports
nothing, so that a process that needs only `rlbook.maths.priorities` (numpy) never loads torch.
"""
