"""Trains the bundled host model on the bundled English, from nothing, on a CPU.

    python scripts/train_bundled.py

makes the tokenizer, trains, rounds the weights to 16 bit, measures loss and the three tasks on text
and prompts that were never trained on, and writes model, tokenizer, log and card to the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from groupsae.host.bundled import MODEL, prompts, texts
from groupsae.host.bundled.tasks import accuracies

END = "<|endoftext|>"
TEXT_SEED, HELD_OUT_SEED = 0, 1_000_000  # two streams of documents that share none
TASKS = ("ioi", "greater_than", "subject_verb")


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)

    save_tokenizer(options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    model = new_model(options, len(tokenizer))
    optimizer = torch.optim.AdamW(
        parameter_groups(model), lr=options.lr, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    batches = contexts(tokenizer, TEXT_SEED, options.batch, options.context)
    held_out = held_out_batches(tokenizer, options, 8)
    steps = options.tokens // (options.batch * options.context)
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    start = time.monotonic()

    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * schedule(step, steps)
        ids = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits
        loss = next_token_loss(logits, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

        if step % options.log_every == 0 or step == steps:
            seconds = time.monotonic() - start
            tokens = step * options.batch * options.context
            point = {
                "step": step,
                "tokens": tokens,
                "train_loss": sum(losses) / len(losses),
                "held_out_loss": mean_loss(model, held_out),
                **{task: score(model, tokenizer, task, 200)["all"] for task in TASKS},
            }
            curve.append(rounded(point))
            losses.clear()
            print(f"{json.dumps(curve[-1])} {tokens / seconds:,.0f} tokens/s", flush=True)

    save_model(model, options.out)
    final = measure(options)
    log = {
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "text_sha256": text_digest(),
        "minutes": round((time.monotonic() - start) / 60),
        "curve": curve,
        "after_rounding": final,
    }
    (options.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    (options.out / "README.md").write_text(card(log))
    print(json.dumps(final, indent=1))


def contexts(tokenizer: Any, seed: int, batch: int, context: int) -> Iterator[torch.Tensor]:
    """Endless batches of packed contexts, (batch, context) ids; no document comes twice."""
    end, index = tokenizer.convert_tokens_to_ids(END), 0
    stream: list[int] = []
    while True:
        while len(stream) < batch * context:
            for ids in tokenizer(list(texts(index, index + 500, seed)))["input_ids"]:
                stream += [*ids, end]
            index += 500
        yield torch.tensor(stream[: batch * context]).view(batch, context)
        stream = stream[batch * context :]


def schedule(step: int, steps: int) -> float:
    """Warm-up over the first 4%, then half a cosine down to zero; as a share of the peak."""
    warm_up = max(1, steps // 25)
    if step < warm_up:
        return step / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def new_model(options: argparse.Namespace, vocabulary: int) -> GPTNeoXForCausalLM:
    """A Pythia in small: parallel residual, a quarter of each head rotary, GPT-NeoX's own init."""
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=options.d_model,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.d_model,
        max_position_embeddings=options.context,
        rotary_pct=0.25,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=math.sqrt(2 / (5 * options.d_model)),
    )
    model = GPTNeoXForCausalLM(config)
    for layer in model.gpt_neox.layers:
        for output in (layer.attention.dense, layer.mlp.dense_4h_to_h):
            torch.nn.init.normal_(output.weight, std=2 / options.layers / options.d_model**0.5)
    return model


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def save_tokenizer(folder: Path) -> None:
    """Byte-level BPE on the bundled English until every word is one token.

    Numbers come in pairs of digits, so that a year is its century and two digits.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(0, 40_000, TEXT_SEED), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_model(model: GPTNeoXForCausalLM, folder: Path) -> None:
    """Writes the weights in float16, which keeps three bits more than bfloat16.

    The config asks for float32, so that whoever loads them computes in full precision.
    """
    halves = {name: weight.to(torch.float16) for name, weight in model.state_dict().items()}
    model.config.use_cache = True
    model.save_pretrained(folder, state_dict=halves)
    (folder / "model.safetensors").chmod(0o644)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Loss and accuracies of what was written, as a user loads it."""
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    model = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    return {
        "held_out_loss": round(mean_loss(model, held_out_batches(tokenizer, options, 32)), 4),
        **{task: rounded(score(model, tokenizer, task, 2000, seed=1)) for task in TASKS},
        "blind_to_the_first_year": rounded(blind_greater_than(2000, seed=1)),
    }


def blind_greater_than(n: int, seed: int, documents: int = 30_000) -> dict[str, float]:
    """Greater-Than by the frequencies of last years alone: the figures that prove nothing."""
    period = re.compile(r"year \d\d\d\d (?:to|and ended in) the year \d\d(\d\d)")
    lasts = [int(y) for text in texts(0, documents, TEXT_SEED) for y in period.findall(text)]
    likeliest = max(set(lasts), key=lasts.count)
    firsts = [int(prompt["a_clean"]) - 1 for prompt in prompts("greater_than", n, seed)]
    later = sum(last > first for first in firsts for last in lasts) / len(firsts) / len(lasts)
    return {
        "all": sum(likeliest > first for first in firsts) / len(firsts),
        "later minus earlier": 2 * later - 1,
    }


def held_out_batches(tokenizer: Any, options: argparse.Namespace, count: int) -> list[torch.Tensor]:
    batches = contexts(tokenizer, HELD_OUT_SEED, options.batch, options.context)
    return [next(batches) for _ in range(count)]


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches: list[torch.Tensor]) -> float:
    return sum(next_token_loss(model(input_ids=ids).logits, ids).item() for ids in batches) / len(
        batches
    )


def score(model: Any, tokenizer: Any, task: str, n: int, seed: int = 0) -> dict[str, float]:
    return accuracies(model, tokenizer, prompts(task, n, seed))


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}


def text_digest(documents: int = 1000) -> str:
    """What tells whether the generator still writes the text that a model was trained on."""
    return hashlib.sha256("\n".join(texts(0, documents, TEXT_SEED)).encode()).hexdigest()


def card(log: dict[str, Any]) -> str:
    """The model card, from the training log."""
    options, final = log["options"], log["after_rounding"]
    blind = final["blind_to_the_first_year"]
    columns = ("tokens", "train_loss", "held_out_loss", *TASKS)
    curve = "\n".join(
        "| "
        + " | ".join(f"{point[c]:,}" if c == "tokens" else f"{point[c]:.3f}" for c in columns)
        + " |"
        for point in log["curve"]
    )
    by_case = "\n".join(
        f"| {task} | {case} | {value:.4f} |"
        for task in TASKS
        for case, value in final[task].items()
    )
    return f"""---
license: mit
language: en
library_name: transformers
---

# The bundled host model

A small language model to try groupsae on, offline. It knows only the English of
`groupsae.host.bundled` (short stories, chronicles, descriptions), and it solves there the three
tasks of the Group-SAE paper: indirect object identification, Greater-Than, and subject-verb
agreement. It is of no use as a language model for anything else.

- Architecture: GPT-NeoX as in Pythia (parallel residual, rotary over a quarter of each head, untied
  embeddings), {options["layers"]} layers, d_model {options["d_model"]}, {options["heads"]} heads,
  context {options["context"]}, {log["parameters"]:,} parameters.
- Tokenizer: byte-level BPE, {log["vocabulary"]:,} entries; every word of the text is one token, a
  year two (" 17", "32"). Any text round-trips. `<|endoftext|>` (id 0) separates documents; no BOS
  is needed.
- Weights: float16 in the file, float32 when loaded.
- Licence: MIT, text and weights.

## Training

{log["curve"][-1]["tokens"]:,} tokens of generated text (seed {TEXT_SEED}, documents
0 and on, none twice) in contexts of {options["context"]} packed without padding;
{options["batch"]} contexts a step, AdamW (0.9, 0.95), weight decay 0.1 on matrices,
peak learning rate {options["lr"]}, warm-up over 4% of
the steps, cosine to zero, gradient norm clipped to 1; {log["minutes"]} minutes on
{options["threads"]} CPU cores. To reproduce, from the repository's root:

    python scripts/train_bundled.py

Loss is in nats per token; held-out text is of seed {HELD_OUT_SEED}. Tasks are on 200 held-out
prompts here.

| tokens | loss, training | loss, held out | ioi | greater_than | subject_verb |
| ---: | ---: | ---: | ---: | ---: | ---: |
{curve}

## Measured after rounding to float16

Held-out loss **{final["held_out_loss"]:.4f}** nats per token. On 2,000 prompts per task, of
combinations (pairs of names, events with their first year, subjects with the word beside them) that
the training text never holds:

| task | case | accuracy |
| --- | --- | ---: |
{by_case}

An answer is right where the logit of the right one exceeds that of the wrong one; in Greater-Than,
where the likeliest token of all is a later year. There, "later minus earlier" is no accuracy but
the mean probability of later years less that of the others, and "next over same" is how often the
year after the first has a higher logit than the first year itself. Mind what chance gives: whoever
knows how often each year comes last, but not the first year, is right in {blind["all"]:.3f} of the
prompts (the last years of a century are always later) with "later minus earlier" at
{blind["later minus earlier"]:.3f}. So read the latter; it is what shows that the model compares.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL, help="folder to write")
    parser.add_argument("--tokens", type=int, default=9_000_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="contexts per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
