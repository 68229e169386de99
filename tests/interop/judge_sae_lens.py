"""What SAELens itself says: run as a script, where SAELens is installed, on a folder of tasks.

Writes, below that folder, the latents and reconstructions of exported SAEs (`read/`), SAEs that it
has trained for a few steps and saved (`own/`) with theirs, and the library's version.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from safetensors.torch import load_file, save_file

TRAINED = {
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 4}),
    "jumprelu": (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        {"jumprelu_init_threshold": 0.05},
    ),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 4}),
}


def main(work):
    torch.manual_seed(0)
    x = load_file(work / "x.safetensors")
    for name, folder in json.loads((work / "exports.json").read_text()).items():
        write(work / "read" / name, SAE.load_from_disk(folder), x[name])
    own = x["own"]
    for name, (kind, config, options) in TRAINED.items():
        sae = trained(kind(config(d_in=own.shape[1], d_sae=60, **options)), own)
        sae.save_inference_model(work / "own" / name)
        write(work / "own" / name, SAE.load_from_disk(work / "own" / name), own)
    unusual(work, own)
    (work / "version.json").write_text(json.dumps(version("sae-lens")))


def trained(sae, x):
    """After a few steps of its own training."""
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(30):
        coefficients = {
            name: getattr(value, "value", value) for name, value in sae.get_coefficients().items()
        }
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients=coefficients,
                dead_neuron_mask=None,
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return sae


def unusual(work, x):
    """Kinds that its trainers do not make, with random weights."""
    sizes = {"d_in": x.shape[1], "d_sae": 60}
    metadata = SAEMetadata(hook_name="blocks.4.hook_resid_pre")
    for name, sae in {
        "no-input-bias": StandardSAE(
            StandardSAEConfig(**sizes, apply_b_dec_to_input=False, metadata=metadata)
        ),
        "rescaled": TopKSAE(
            TopKSAEConfig(**sizes, k=4, rescale_acts_by_decoder_norm=True, metadata=metadata)
        ),
    }.items():
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        sae.save_model(work / "own" / name)
        write(work / "own" / name, sae, x)
    old = work / "own" / "old"  # as before SAELens 6
    TopKSAE(TopKSAEConfig(**sizes, k=4)).save_model(old)
    config = {
        **sizes,
        **{"dtype": "float32", "hook_point": "blocks.3.hook_resid_post", "prepend_bos": True},
        **{"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
        **{"normalize_activations": False, "apply_b_dec_to_input": True},
    }
    (old / "cfg.json").write_text(json.dumps(config))
    write(old, SAE.load_from_disk(old), x)


@torch.no_grad()
def write(path, sae, x):
    latents = sae.encode(x)
    path.parent.mkdir(exist_ok=True)
    file = path.with_name(f"{path.name}.safetensors")
    save_file({"latents": latents, "x_hat": sae.decode(latents)}, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
