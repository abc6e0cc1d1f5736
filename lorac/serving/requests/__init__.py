"""The fields of requests, and what of a model they ask for."""
