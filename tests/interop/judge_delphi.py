"""What delphi itself reads of a latent cache that was written for it."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset
from delphi.latents.constructors import constructor
from delphi.latents.latents import LatentRecord
from safetensors.torch import save_file


class Tokenizer:
    """Of the tiny host: a token is its id."""

    def batch_decode(self, tokens):
        return [str(int(token)) for token in tokens.flatten()]


def main(work):
    options = ConstructorConfig(example_ctx_len=8, min_examples=1, n_non_activating=4)
    raw = work / "raw"
    dataset = LatentDataset(raw, SamplerConfig(), options, Tokenizer())
    dense, examples = {}, {}
    for buffer in dataset.buffers:
        found = dense.setdefault(
            buffer.module_path, torch.zeros(dataset.tokens.numel(), 40, dtype=torch.float32)
        )
        for data in buffer:
            where, activations = data.activation_data
            assert (where[:, 2] == data.latent.latent_index).all()
            found[where[:, 0] * dataset.tokens.shape[1] + where[:, 1], where[0, 2]] = (
                activations.float()
            )
            record = constructor(
                LatentRecord(data.latent),
                data.activation_data,
                options,
                dataset.tokens,
                dataset.tokenizer,
            )
            examples[str(data.latent)] = [example.max_activation for example in record.examples]
    few = {module: torch.tensor([3, 39]) for module in dataset.modules}
    selected = LatentDataset(raw, SamplerConfig(), options, Tokenizer(), latents=few)
    chosen = sorted(str(data.latent) for buffer in selected.buffers for data in buffer)
    save_file({"tokens": dataset.tokens, **dense}, work / "read.safetensors")
    report = {
        "examples": examples,
        "chosen": chosen,
        "config": dataset.cache_config,
        "version": version("eai-delphi"),
    }
    (work / "read.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
