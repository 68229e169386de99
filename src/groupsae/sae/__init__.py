"""The autoencoder: tensors in, tensors out. Knows no language model."""

from groupsae.sae.autoencoder import SAE, SAEConfig, directory_name
from groupsae.sae.sparsity import Latents, topk

__all__ = ["SAE", "Latents", "SAEConfig", "directory_name", "topk"]
