"""What a trained model is for: predictions, embeddings, and the report of a run."""
