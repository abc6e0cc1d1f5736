"""Text that grows: ``generate`` on every target, by transformers' own rules, over caches or the host's own modules."""
