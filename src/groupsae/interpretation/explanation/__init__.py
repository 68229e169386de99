"""A language model explains latents, and is judged by what its explanations foretell."""

from groupsae.interpretation.explanation.stage import explain

__all__ = ["explain"]
