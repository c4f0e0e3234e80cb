"""The life of a run: folder, processes, checkpoints, W&B, signals."""
