"""The base model, its LoRAs and its text embeddings."""
