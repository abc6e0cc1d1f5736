"""Where sessions run: execution providers, their needs on a machine, and the memory that values lie in."""
