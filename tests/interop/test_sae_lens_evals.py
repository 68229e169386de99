"""SAELens's own evaluation of our exports gives our figures.

It runs in this interpreter's Python where SAELens is installed, or in the one that
GROUPSAE_SAELENS_PYTHON names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupsae.config import Config
from groupsae.evaluation.reconstruction import evaluate_reconstruction
from groupsae.host.model import HostModel
from groupsae.host.tokens import special_mask
from groupsae.run import Run

CONTEXTS, BATCH = 64, 16
MODEL_CLASSES = ("AutoModelForCausalLM", "HookedTransformer")
TOLERANCE = 1e-4  # relative; the score is a ratio of small differences here


def test_saelens_evaluates_an_export_as_we_do(tmp_path: Path, tiny_config: list[str]) -> None:
    python = _python()
    run = Run(tmp_path / "run", Config.load(overrides=tiny_config))
    run.distances()
    run.groups()
    run.train()
    tokens = run.corpus.held_out().next_contexts(CONTEXTS)
    special = run.host.special_token_ids
    saes = run.export("sae-lens", tmp_path / "exported")
    report = _judged(python, tmp_path, run.host, tokens, saes)

    judged = {(each["model_class"], each["layer"], each["special"]) for each in report}
    assert len(judged) == len(report) == len(MODEL_CLASSES) * len(saes) * 2
    for name, left_out in (("excluded", special), ("counted", frozenset())):
        for row in _rows(run, tokens, left_out):
            ours = _as_there(run.host, tokens, row, left_out)
            assert abs(ours["ce_loss_with_ablation"] - ours["ce_loss_without_sae"]) > 0.01
            if name == "counted":
                assert ours["ce_loss_score"] == pytest.approx(row["ce_loss_score"], rel=TOLERANCE)
            for each in report:
                if (each["layer"], each["special"]) == (row["layer"], name):
                    theirs = {metric: each[metric] for metric in ours}
                    assert theirs == pytest.approx(ours, rel=TOLERANCE), each["model_class"]


def _rows(run: Run, tokens: Tensor, special: Collection[int]) -> list[dict[str, Any]]:
    """Our evaluation of the chosen partition's SAEs."""
    result = evaluate_reconstruction(
        run.host,
        run.corpus.held_out(),
        run.subjects()[:1],
        tokens=tokens.numel(),
        batch_contexts=BATCH,
        special=special,
    )
    return result["rows"]


def _as_there(
    host: HostModel, tokens: Tensor, row: dict[str, Any], special: Collection[int]
) -> dict[str, float]:
    """Our figures under SAELens's names.

    SAELens zeroes special tokens too, even where it neither splices nor counts them, and its mse is
    a sum over dimensions.
    """
    ce_zero = _ce_of_zeros(host, tokens, row["layer"], special)
    return {
        "ce_loss_score": (ce_zero - row["ce_spliced"]) / (ce_zero - row["ce_clean"]),
        "ce_loss_without_sae": row["ce_clean"],
        "ce_loss_with_sae": row["ce_spliced"],
        "ce_loss_with_ablation": ce_zero,
        "explained_variance": row["r2"],
        "explained_variance_legacy": row["explained_variance"],
        "mse": row["mse"] * host.d_model,
        "cossim": row["cosine"],
        "l0": row["l0"],
    }


@torch.no_grad()
def _ce_of_zeros(host: HostModel, tokens: Tensor, layer: int, special: Collection[int]) -> float:
    """Cross-entropy at the counted positions with the layer's residual stream zero at all."""
    logits = host.logits_from(layer, torch.zeros(*tokens.shape, host.d_model), tokens)
    counted = ~special_mask(tokens, special)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][counted], tokens[:, 1:][counted])
    return float(loss)


def _judged(
    python: str, work: Path, host: HostModel, tokens: Tensor, saes: dict[int, Path]
) -> list[dict[str, Any]]:
    """What SAELens says of every layer, from model classes that are this host."""
    task = {
        "host": host.name,
        "model_classes": MODEL_CLASSES,
        "saes": {layer: str(folder) for layer, folder in saes.items()},
        "batch_contexts": BATCH,
        "special": sorted(host.special_token_ids),
    }
    (work / "task.json").write_text(json.dumps(task))
    save_file({"tokens": tokens}, work / "tokens.safetensors")
    subprocess.run(
        [python, Path(__file__).parent / "judge_sae_lens_evals.py", work],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    logits = load_file(work / "logits.safetensors")
    for model_class in MODEL_CLASSES:
        torch.testing.assert_close(
            logits[model_class], host.logits(tokens[:BATCH]), rtol=1e-4, atol=1e-4
        )
    return json.loads((work / "evals.json").read_text())["evals"]


def _python() -> str:
    if importlib.util.find_spec("sae_lens") is not None:
        return sys.executable
    python = os.environ.get("GROUPSAE_SAELENS_PYTHON")
    if python is None:
        pytest.skip(
            "sae_lens is not installed here, and GROUPSAE_SAELENS_PYTHON names no Python that has "
            "it"
        )
    return python
