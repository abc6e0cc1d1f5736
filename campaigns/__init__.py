"""Long seeded campaigns against the package: what must never happen is looked for, and counted."""
