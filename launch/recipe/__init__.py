"""What the scripts of `launch` share: data, model, parallelism, evaluation, reports, resuming and preemption."""
