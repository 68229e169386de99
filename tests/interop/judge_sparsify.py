"""What sparsify itself says: see `judge_sae_lens.py`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig


def main(work):
    torch.manual_seed(0)
    x = load_file(work / "x.safetensors")
    for name, folder in json.loads((work / "exports.json").read_text()).items():
        write(work / "read" / name, SparseCoder.load_from_disk(folder), x[name])
    for name, options in {
        "layers.3": {"num_latents": 60},
        "layers.2": {"multi_topk": True},
    }.items():
        config = SparseCoderConfig(**{"expansion_factor": 4, "k": 4, **options})
        sae = trained(SparseCoder(x["own"].shape[1], config), x["own"])
        sae.save_to_disk(work / "own" / name)
        write(work / "own" / name, SparseCoder.load_from_disk(work / "own" / name), x["own"])
    (work / "version.json").write_text(json.dumps(version("eai-sparsify")))


def trained(sae, x):
    """After a few steps of its own training."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(30):
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x)
        optimizer.zero_grad()
        (out.fvu + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
    return sae


@torch.no_grad()
def write(path, sae, x):
    found = sae.encode(x)
    latents = torch.zeros(len(x), sae.num_latents)
    latents.scatter_(1, found.top_indices, found.top_acts)
    path.parent.mkdir(exist_ok=True)
    x_hat = sae.decode(found.top_acts, found.top_indices)
    file = path.with_name(f"{path.name}.safetensors")
    save_file({"latents": latents, "x_hat": x_hat}, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
