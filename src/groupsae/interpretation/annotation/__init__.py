"""How well people can read latents: a blinded sheet, and the Human Interpretability Score of it."""
