"""Remote adapters and models: on the Hugging Face hub, in a store, or on a web server."""
