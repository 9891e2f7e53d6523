"""LoRA and other ways to adapt a pretrained trunk, and fine-tuning to a property."""
