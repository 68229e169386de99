"""The host model of a plan: its sizes, without its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from groupsae.config import Config, HostConfig
from groupsae.errors import InputError

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Of d_model, in the forward's precision, that a block holds at its peak. Found: GPT-NeoX 10 to 15,
# Llama 13 to 18, GPT-2, whose activation function takes several steps on 4 d, 24.
_BLOCK_WIDTHS = 24


@dataclass(frozen=True)
class PlannedHost:
    """What a plan knows of the host model.

    Attributes:
        parameters: Weights that are held.
        block_weights: Weights of a block.
        dtype: Of the weights and of the forward.
        note: What is assumed, to be said beside the figures; empty where nothing is.
    """

    n_layers: int
    d_model: int
    parameters: int
    block_weights: int
    dtype: str
    note: str = ""

    @classmethod
    def of(cls, config: Config, *, on_cpu: bool | None = None) -> PlannedHost:
        """The host model that a config names: by `host.n_layers` and `host.d_model`, else by its
        config.json (a hub model's is downloaded, its weights are not).

        Args:
            on_cpu: Where it will run, for `host.dtype` "auto", which is float32 on the CPU and the
                checkpoint's own elsewhere; None: float32 for a host that is given by its sizes,
                else by where `host.device` is on this machine.

        Raises:
            InputError: Its config cannot be read.
        """
        asked = config.host
        if asked.n_layers is not None and asked.d_model is not None:
            return cls._of_sizes(asked, asked.n_layers, asked.d_model, on_cpu in (None, True))
        return cls._of_config_file(asked, on_cpu)

    @classmethod
    def _of_sizes(
        cls, asked: HostConfig, n_layers: int, d_model: int, is_float32: bool
    ) -> PlannedHost:
        block = 12 * d_model**2
        note = "the host as 12 d_model^2 weights a block, without embeddings"
        dtype: str = asked.dtype
        if dtype == "auto":
            dtype = "float32" if is_float32 else "bfloat16"
            note += "" if is_float32 else ", in bfloat16"
        return cls(n_layers, d_model, n_layers * block, block, dtype, note)

    @classmethod
    def _of_config_file(cls, asked: HostConfig, on_cpu: bool | None) -> PlannedHost:
        import torch
        import transformers

        from groupsae.host.bundled import MODEL
        from groupsae.host.loading import BUNDLED, resolve_device

        source = str(MODEL) if asked.name == BUNDLED else str(Path(asked.name).expanduser())
        local = Path(source).is_dir()
        try:
            config = transformers.AutoConfig.from_pretrained(
                source if local else asked.name,
                revision=asked.revision or "main",
                local_files_only=local,
                trust_remote_code=False,
            )
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            sizes = config.get_text_config(decoder=True)
            n_layers, d_model = sizes.num_hidden_layers, sizes.hidden_size
        except Exception as error:  # whatever a library raises on a name or file it cannot read
            reason = " ".join(str(error).split())
            raise InputError(
                f"host.name {asked.name!r}: its config cannot be read: {reason.rstrip('.')}. Check "
                "the name, or give host.n_layers and host.d_model"
            ) from error
        if on_cpu is None:
            on_cpu = resolve_device(asked.device).type == "cpu"
        dtype: str = asked.dtype
        if dtype == "auto":
            own = str(getattr(sizes, "dtype", None))
            dtype = "float32" if on_cpu else own.removeprefix("torch.")
        stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
        blocks = [stack for stack in stacks if len(stack) == n_layers]
        in_blocks = sum(w.numel() for w in blocks[0].parameters()) if blocks else 0
        return cls(
            n_layers,
            d_model,
            sum(weight.numel() for weight in model.parameters()),
            round(in_blocks / n_layers) or 12 * d_model**2,
            dtype if dtype in _BYTES else "float32",
        )

    def in_dtype(self, dtype: str) -> PlannedHost:
        """The same model in another precision."""
        return replace(self, dtype=dtype)

    @property
    def number_bytes(self) -> int:
        """Bytes of one number."""
        return _BYTES[self.dtype]

    @property
    def weights(self) -> int:
        """Bytes of its weights."""
        return self.parameters * self.number_bytes

    def activations(self, tokens: int) -> int:
        """Bytes that a forward of so many tokens holds at its peak: at most, but for a tenth.

        No block's streams outlive it but for the rows that are kept, which the buffer counts. With
        attention that does not hold its scores, as PyTorch's own.
        """
        copied = self.number_bytes + 4  # the rows that a group drew, and these in float32
        return tokens * self.d_model * (_BLOCK_WIDTHS * self.number_bytes + copied)
