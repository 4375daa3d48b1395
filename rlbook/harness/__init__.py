"""What every run needs and no paper is about: settings, logs, checkpoints, evaluation, plots."""
