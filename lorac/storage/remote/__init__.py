"""Adapters and models that are elsewhere: on the Hugging Face hub, in a store, or on a web server."""
