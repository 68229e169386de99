"""Static pages in which the latents of a run are searched, read, compared and marked."""

from groupsae.interpretation.browser.writer import About, write_browser, write_scores

__all__ = ["About", "write_browser", "write_scores"]
