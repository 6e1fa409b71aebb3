"""Plans live changes of CPU and memory: pure functions of facts."""
