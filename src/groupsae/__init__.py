"""Train one sparse autoencoder per group of similar layers of a language model."""

__version__ = "0.1.0"
