"""rlbook: distributed reinforcement learning, one file per system. See `chapters/` for the book."""

__version__ = "0.1.0"
