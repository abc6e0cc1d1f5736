"""The arguments of compile(), each checked once."""
