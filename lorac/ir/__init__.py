"""The intermediate representation: sites, slots, normal forms of changes, calls, and the graphs that hold them."""
