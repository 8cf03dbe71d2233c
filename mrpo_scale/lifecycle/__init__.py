"""Where a run starts, stops and goes on: checkpoints, resume, preemption."""
