"""From structures to batches of model inputs."""
