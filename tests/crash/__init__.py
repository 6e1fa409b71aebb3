"""What the agent promises about its own death, and that of all that it talks to: nothing lost, nothing done twice."""
