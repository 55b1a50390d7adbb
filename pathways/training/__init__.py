"""Training: the compiled step, the loop around it, checkpoints, joint training over many tasks."""
