"""What a worker is made of: how it shares its slots, calls functions, delivers results and records what came of it."""
