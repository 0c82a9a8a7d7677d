"""Training: one loop for the VAE and the transformer, driven by a recipe (TOML)."""
