"""Where the pages of the latents show one of them."""

from __future__ import annotations

from urllib.parse import quote

from groupsae.report.artefacts import Artefacts


def latent_link(
    run: Artefacts, partition: str, groups_total: int, layer: int, latent: int | None
) -> str:
    """The address of a latent's card, relative to the report; empty where there is none."""
    name = sae_name(run, partition, groups_total, layer)
    if run.browser is None or name is None or latent is None:
        return ""
    return f"{run.browser}#{quote(name)}/{latent}"


def sae_name(run: Artefacts, partition: str, groups_total: int, layer: int) -> str | None:
    """The name of a partition's SAE of a layer, where it was interpreted."""
    for subject in run.depth["subjects"] if run.depth is not None else ():
        of_subject = partition == subject["partition"]
        if of_subject and (partition == "baseline" or groups_total == subject["groups_total"]):
            name: str | None = subject["saes"].get(str(layer))
            return name
    return None
