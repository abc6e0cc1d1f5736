"""Contract between the session and a target: dialect, backend, engine, bindings, caches."""
