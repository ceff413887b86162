"""What a training run is made of: state, steps, losses, optimizers, schedules, the loop, checkpoints."""
