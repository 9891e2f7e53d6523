"""One engine for pretraining, fine-tuning and the bridge."""
