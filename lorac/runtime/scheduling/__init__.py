"""Many requests for text at once: rows that join and leave a running batch, each with adapters of its own."""
