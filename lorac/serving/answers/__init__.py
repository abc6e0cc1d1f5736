"""Answers: tokens are decoded, parsed, streamed, and written in OpenAI's form."""
