"""Sites: the places of a model that can be adapted, and the patterns that name them."""
