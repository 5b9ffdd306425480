"""The mechanism of training: configuration, schedules, the loop, metrics, checkpoints. Stages are in `recipes`."""
