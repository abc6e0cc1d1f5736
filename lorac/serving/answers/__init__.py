"""Answers: tokens as text, parsed, streamed, and in the form that clients read."""
