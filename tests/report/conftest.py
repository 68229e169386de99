from __future__ import annotations

from pathlib import Path

import pytest

from groupsae.report import write_report
from tests.report.synthetic_run import write_run

HOSTILE = "</script><script>document.title='pwned'</script>&\"'"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run directory of 11 layers in 6 groups. Not to be written to."""
    return write_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a complete run whose host model and second task have markup for a name."""
    directory = write_run(
        tmp_path_factory.mktemp("hostile"),
        n_layers=4,
        chosen=2,
        host=HOSTILE,
        steps=60,
        also_groups=(1,),
        tasks=("ioi", HOSTILE),
        refused_task=HOSTILE,
        similarity=True,
        interpretation=True,
    )
    return write_report(directory)
