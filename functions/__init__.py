"""Which functions exist, and those that run here: the file, deployments, processes, schedules, secrets, logs."""
