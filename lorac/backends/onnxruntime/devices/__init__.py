"""The devices of sessions: execution providers, their requirements, and the memory of values."""
