"""What dictionary_learning itself says: see `judge_sae_lens.py`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.utils import load_dictionary
from safetensors.torch import load_file, save_file

WARM = {"warmup_steps": 1}
TRAINED = {
    "standard": (StandardTrainer, {**WARM, "sparsity_warmup_steps": 2}),
    "april": (StandardTrainerAprilUpdate, {**WARM, "sparsity_warmup_steps": 2}),
    "topk": (TopKTrainer, {**WARM, "k": 4}),
    "batchtopk": (BatchTopKTrainer, {**WARM, "k": 4, "threshold_start_step": 5}),
    "batchtopk-unset": (BatchTopKTrainer, {**WARM, "k": 4}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainer,
        {**WARM, "k": 4, "threshold_start_step": 5, "group_fractions": [0.25, 0.75]},
    ),
    "jumprelu": (JumpReluTrainer, {**WARM, "sparsity_warmup_steps": 2, "bandwidth": 0.01}),
    "gated": (GatedSAETrainer, {**WARM, "sparsity_warmup_steps": 2}),
}


def main(work):
    torch.manual_seed(0)
    x = load_file(work / "x.safetensors")
    for name, folder in json.loads((work / "exports.json").read_text()).items():
        write(work / "read" / name, load_dictionary(folder, "cpu")[0], x[name])
    for name, (kind, options) in TRAINED.items():
        trainer = kind(
            steps=30,
            activation_dim=x["own"].shape[1],
            dict_size=60,
            layer=3,
            lm_name="tiny",
            submodule_name="resid_post_layer_3",
            device="cpu",
            seed=0,
            **options,
        )
        for step in range(30):
            trainer.update(step, x["own"])
        save(work / "own" / name, trainer.ae, trainer.config)
        write(work / "own" / name, load_dictionary(work / "own" / name, "cpu")[0], x["own"])
    new = AutoEncoderNew(x["own"].shape[1], 60)
    torch.nn.init.normal_(new.decoder.bias)
    config = {"dict_class": "AutoEncoderNew", "activation_dim": x["own"].shape[1], "layer": 3}
    save(work / "own" / "new", new, {**config, "dict_size": 60, "submodule_name": None})
    write(work / "own" / "new", new, x["own"])
    (work / "version.json").write_text(json.dumps(version("dictionary-learning")))


def save(folder, dictionary, config):
    """As its training does."""
    folder.mkdir(parents=True)
    state = {name: tensor.cpu() for name, tensor in dictionary.state_dict().items()}
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {}}))


@torch.no_grad()
def write(path, dictionary, x):
    latents = dictionary.encode(x)
    path.parent.mkdir(exist_ok=True)
    file = path.with_name(f"{path.name}.safetensors")
    save_file({"latents": latents, "x_hat": dictionary.decode(latents)}, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
