"""Where sessions run: execution providers, what they need on a machine, and the memory that their values lie in."""
