"""What of a site can be replaced: roles, plans, what fills them and what they compute."""
