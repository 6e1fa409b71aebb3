"""The benchmark: `make bench`. Owns what is measured, how, and against what; see `__main__` for the order of it.

load        one process of its own: clients that keep their connections, and the receiver of the callbacks
subject     the agent that is measured: its CPU time, memory, start, idleness
measures    the measurements: what each does, and what it says that it did
report      targets, the table with the ratio to each, the JSON file
"""
