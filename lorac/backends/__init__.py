"""Backends: each defines the ops that it computes, emits programs and binds slots; none imports another's library."""
