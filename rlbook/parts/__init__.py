"""The parts that systems are built from: environments, networks, replay, unrolls."""
