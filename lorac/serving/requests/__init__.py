"""The fields of requests: the adapters, the options of generation and the form of the answers."""
