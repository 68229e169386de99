"""One self-contained HTML page and the paper's figures, from a run directory's artefacts."""

from __future__ import annotations

from groupsae.report.page import write_report

__all__ = ["write_report"]
