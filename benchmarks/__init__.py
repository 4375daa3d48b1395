"""Measurements of the book's systems against peers and against the physical limit.

`python -m benchmarks` runs all of them; each is a command of its own, as in
`python -m benchmarks.solve`.
"""
