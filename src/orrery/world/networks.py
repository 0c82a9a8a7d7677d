"""The three networks of a model, each on the device while it is needed, as a plan says."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from orrery.errors import InputError, OrreryError, note
from orrery.files import atomic_file
from orrery.nn.control import ControlBranch
from orrery.nn.dit import DiT
from orrery.nn.offload import StreamedBlocks
from orrery.nn.text import PromptReader, TextEncoder
from orrery.nn.vae import VAE
from orrery.weights import Lora, ModelFiles, load_part, merge
from orrery.weights.store import load_tokenizer
from orrery.weights.tensors import read_tensors
from orrery.world.speed import Speed, prepare


class Networks:
    """Loads networks when they are asked for.

    Args:
        files: where the model is.
        device, dtype, vae_dtype: where and in what the networks compute.
        loras: are merged into the transformer when it is loaded.
        speed: how the transformer and its branches are made faster once they are loaded.

    `transformer`, `vae` and `text` load a network and keep it. `use` follows a placement: it lets go of a network that
    is not to stay.
    """

    def __init__(
        self,
        files: ModelFiles,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        loras: Sequence[Lora] = (),
        speed: Speed = Speed(),  # noqa: B008 - it is frozen
    ) -> None:
        self.files, self.config = files, files.config
        self.device, self.dtype, self.vae_dtype, self.speed = device, dtype, vae_dtype, speed
        self.loras = tuple(loras)
        self._loaded: dict[str, nn.Module] = {}
        self._merged: Any = None
        self._reader: PromptReader | None = None

    @property
    def transformer(self) -> DiT:
        """On the device, and stays."""
        return cast(DiT, self._keep("transformer"))

    @property
    def vae(self) -> VAE:
        """On the device, and stays."""
        return cast(VAE, self._keep("vae"))

    @property
    def text(self) -> TextEncoder:
        """On the device, and stays."""
        return cast(TextEncoder, self._keep("text"))

    @property
    def reader(self) -> PromptReader:
        """What a prompt becomes before the text encoder; needs the tokenizer alone."""
        if self._reader is None:
            try:
                self._reader = PromptReader(self.config.text, load_tokenizer(self.files.tokenizer()))
            except ValueError as error:
                raise InputError(f"{self.files.name}: {error}") from error
        return self._reader

    def load_all(self) -> None:
        """Load what is not here yet: what is wrong with the files is told now."""
        for name in ("text", "transformer", "vae"):
            self._keep(name)

    def with_loras(self, loras: Sequence[Lora]) -> None:
        """Merge these into the transformer, instead of those that were; exact whichever were merged before. A
        transformer whose weights were quantised is loaded anew."""
        if self.speed.quantise is not None:
            self._loaded.pop("transformer", None)
            self._merged, self.loras = None, tuple(loras)
            return
        if self._merged is not None:
            self._merged.undo()
            self._merged = None
        self.loras = ()  # which is true should merging fail
        if loras and (network := self._loaded.get("transformer")) is not None:
            self._merged = merge(network, loras)
        self.loras = tuple(loras)

    @contextmanager
    def use(self, name: str, placement: str = "resident", on_cpu: bool = False, resident: int = 0) -> Iterator[Any]:
        """A network, on the device while the block runs; with "resident" it stays there.

        With another placement those that stayed so far go first, and what the block was given is empty afterwards,
        whoever still holds it.

        on_cpu: the network runs on the CPU all the same. resident: blocks of the transformer that stay on the device
        with "blocks".
        """
        if placement == "resident":
            yield self._keep(name)
            return
        self.release()
        device = torch.device("cpu") if on_cpu else self.device
        streamed = name == "transformer" and placement == "blocks"
        network = self._load(name, torch.device("cpu") if streamed else device if on_cpu else self._home(name))
        if name == "transformer" and self.loras:
            merge(network, self.loras)
        prepare(network, self.speed, device)
        network = _streamed(cast(DiT, network), device, resident) if streamed else network.to(device)
        try:
            yield network
        finally:
            _empty(network)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def use_controlled(
        self, kinds: Sequence[str], placement: str = "resident", resident: int = 0
    ) -> Iterator[tuple[DiT, dict[str, ControlBranch]]]:
        """The transformer as `use` gives it, and the control branches of these kinds beside it on the device."""
        with self.use("transformer", placement, resident=resident) as transformer:
            names = {kind: f"control-{kind}" for kind in kinds}
            if placement == "resident":
                yield transformer, {kind: cast(ControlBranch, self._keep(name)) for kind, name in names.items()}
                return
            branches = {kind: cast(ControlBranch, self._load(name, self._home(name))) for kind, name in names.items()}
            for branch in branches.values():
                prepare(branch, self.speed, self.device)
                branch.to(self.device)
            try:
                yield transformer, branches
            finally:
                for branch in branches.values():
                    _empty(branch)

    def release(self) -> None:
        """Let go of every network that stayed."""
        self._loaded.clear()
        self._merged = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _keep(self, name: str) -> nn.Module:
        if name not in self._loaded:
            network = self._load(name, self._home(name))
            if name == "transformer" and self.loras:
                merged = merge(network, self.loras)
                self._merged = None if self.speed.quantise else merged
            prepare(network, self.speed, self.device)
            network.to(self.device)
            self._loaded[name] = network
        return self._loaded[name]

    def _home(self, name: str) -> torch.device:
        """Where a network is read to: what is quantised never is on a GPU with all its bytes."""
        rounded = self.speed.quantise is not None and (name == "transformer" or name.startswith("control-"))
        return torch.device("cpu") if rounded else self.device

    def _load(self, name: str, device: torch.device) -> nn.Module:
        dtype = self.vae_dtype if name == "vae" else self.dtype
        try:
            return load_part(self.files, name, device, dtype)
        except torch.cuda.OutOfMemoryError as error:
            raise OrreryError(
                f"the {name} does not fit into the memory of {device}; `orrery plan {self.files.name}` says what does"
            ) from error


def _streamed(network: DiT, device: torch.device, resident: int) -> DiT:
    """The transformer with all but `resident` blocks on the host and all else on the device."""
    network.walk = StreamedBlocks(network.blocks, device, resident)
    for name, module in network.named_children():
        if name != "blocks":
            module.to(device)
    return network


def _empty(network: nn.Module) -> None:
    """Let go of a network's weights, also those that wait on the host."""
    if isinstance(network, DiT):
        network.walk = None
    for parameter in network.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


class Embeddings:
    """Text embeddings on disk, so that a second run needs no encoder: one file a prompt, named by what made it (the
    tokens, the encoder, the dtype).

    Args:
        folder: is made if need be. networks: whose text encoder it is.
    """

    def __init__(self, folder: str | os.PathLike[str], networks: Networks) -> None:
        files, self._networks = networks.files, networks
        self.folder = Path(folder)
        self._shape = (1, files.config.text.length, files.config.text.text_dim)
        self._maker = [
            json.dumps(files.config.to_json()["text"], sort_keys=True),
            files.parts["text"].identity,
            str(networks.dtype),
        ]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {self.folder}: {error.strerror}") from error

    def path(self, prompt: str) -> Path:
        """Where the embedding of a prompt is, or would be."""
        tokens = ",".join(map(str, self._networks.reader.ids(prompt)))
        key = hashlib.sha256("\0".join([*self._maker, tokens]).encode()).hexdigest()[:32]
        return self.folder / f"{key}.safetensors"

    def get(self, prompt: str) -> Tensor | None:
        """[1, L, text_dim], or None if it was never kept, or cannot be read any more: then a line says so."""
        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            embedding = read_tensors(path).get("embedding")
            if embedding is not None and embedding.shape == self._shape and bool(embedding.isfinite().all()):
                return embedding
            why = f"{path} holds no embedding of this text encoder"
        except InputError as error:
            why = str(error)
        note(f"a text embedding is made again: {why}")
        return None

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Keep [1, L, text_dim]."""
        blob = save({"embedding": embedding.detach().cpu().contiguous()}, {"prompt": prompt})
        with atomic_file(self.path(prompt)) as partial:
            partial.write_bytes(blob)
