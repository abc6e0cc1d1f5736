"""The intermediate representation: sites, slots, normal forms, the dialect, and the graphs that hold them."""
