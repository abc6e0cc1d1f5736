"""The interface to a target: its dialect, the backend that builds its engines, and the engine that runs a program."""
