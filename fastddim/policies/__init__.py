"""Robot policies: diffusion policies and their like, from a checkpoint to actions."""
