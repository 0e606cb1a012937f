"""Scores that a vision-language model behind an OpenAI-compatible server gives: the client, and who asks what."""
