"""What a ZStack management server asks of a host: pure functions over what was read of it."""
