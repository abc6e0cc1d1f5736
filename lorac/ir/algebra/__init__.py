"""What a formula is: the normal forms of a change, and how a formula is reduced to one."""
