"""The contract with a target: its dialect, the backend that builds engines for it, the engine that runs a program."""
