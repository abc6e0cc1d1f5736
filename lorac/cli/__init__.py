"""The command line: the words of the Python interface."""
