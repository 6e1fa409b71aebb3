"""What a ZStack management server requests of a host: pure functions of the host's facts."""
