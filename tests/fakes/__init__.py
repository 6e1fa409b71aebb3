"""Stand-ins for what the agent talks to. Each goes through the same contract tests as the real thing."""
