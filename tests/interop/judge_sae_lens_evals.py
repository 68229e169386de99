"""SAELens's own evaluation of exported SAEs: run as a script, where SAELens is installed.

Reads a folder: `task.json` (the host's folder, SAELens's classes for it, the exported SAE of each
layer, contexts in a batch, ids of special tokens) and `tokens.safetensors`. Writes `evals.json`,
what SAELens says of every layer with special tokens left out and with all tokens, and
`logits.safetensors`, each class's logits of the first batch.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset, load_from_disk
from sae_lens import SAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import (
    get_pretrained_model_config,
    get_pretrained_state_dict,
)
from transformers import AutoModelForCausalLM

HOOKS = {"AutoModelForCausalLM": "hf_hook_name", "HookedTransformer": "hook_name"}


def main(work):
    task = json.loads((work / "task.json").read_text())
    tokens = load_file(work / "tokens.safetensors")["tokens"]
    Dataset.from_dict({"input_ids": tokens.tolist()}).save_to_disk(work / "tokenised")
    special = {"excluded": task["special"], "counted": False}
    evals, logits = [], {}
    for model_class in task["model_classes"]:
        model = loaded(model_class, task["host"])
        logits[model_class] = model(tokens[: task["batch_contexts"]], return_type="logits")
        for layer, folder in task["saes"].items():
            sae = SAE.load_from_disk(folder)
            sae.cfg.metadata.hook_name = sae.cfg.metadata[HOOKS[model_class]]
            for name, ids in special.items():
                found = evaluated(sae, model, load_from_disk(work / "tokenised"), task, ids)
                about = {"model_class": model_class, "layer": int(layer), "special": name}
                evals.append({**about, **found})
    save_file(
        {name: each.contiguous() for name, each in logits.items()}, work / "logits.safetensors"
    )
    report = {"version": version("sae-lens"), "evals": evals}
    (work / "evals.json").write_text(json.dumps(report, indent=2))


def loaded(model_class, folder):
    """The host as SAELens wants it; its own loader takes no folder for a HookedTransformer."""
    if model_class != "HookedTransformer":
        return load_model(model_class, folder, device="cpu")
    config = get_pretrained_model_config(folder, device="cpu")
    host = AutoModelForCausalLM.from_pretrained(folder)
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        get_pretrained_state_dict(folder, config, host),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def evaluated(sae, model, dataset, task, special):
    """All of its figures, over the whole dataset, which its two passes begin anew."""
    batch = task["batch_contexts"]
    n_batches, rest = divmod(len(dataset), batch)
    assert rest == 0
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset,
        context_size=len(dataset[0]["input_ids"]),
        store_batch_size_prompts=batch,
        total_tokens=len(dataset),
    )
    metrics, _ = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        get_eval_everything_config(batch, n_batches, n_batches),
        exclude_special_tokens=special,
    )
    return {name: value for group in metrics.values() for name, value in group.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
