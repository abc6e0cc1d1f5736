"""A compiled model as a server."""
