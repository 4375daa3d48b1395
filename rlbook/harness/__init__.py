"""What every run needs and no paper is about: configuration, logs, checkpoints, evaluation, plots."""
