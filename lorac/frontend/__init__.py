"""What a model is: its sites, its layers, what of it is kept when it is gone."""
