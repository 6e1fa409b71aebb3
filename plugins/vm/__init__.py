"""Planning of live CPU and memory changes: pure functions over facts."""
