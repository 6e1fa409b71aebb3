"""The agent under everything at once: what it accepted it does, once, and tells, whatever it is done to."""
