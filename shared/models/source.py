"""A checkpoint without its weights: where it is, its config, tokenizer, chat template and digest. Imports no torch.

The gateway needs no more than this; loader.py adds tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.messages import ModelFacts
from shared.models.families import parse_config
from shared.models.index import TensorInfo, check_tensors, read_index, read_json
from shared.models.layout import expected_tensors
from shared.models.spec import ModelSpec

DEMO = Path(__file__).parents[2] / "models" / "demo"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json"]
HUB_FILES += ["tokenizer_config.json", "chat_template.jinja"]


Stamp = tuple[int, int, int]
"""Bytes, time of the last change in ns, and inode: another one, and a file holds other weights."""


def stamp(path: Path) -> Stamp:
    """Raises OSError."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


@dataclass(frozen=True)
class ModelSource:
    """A checked checkpoint: every tensor that serving needs is there with the right shape and dtype."""

    path: Path
    name: str
    """The directory's name, or the hub id."""
    config: Mapping[str, Any] = field(repr=False)
    spec: ModelSpec = field(repr=False)
    digest: str
    """Hex hash of config, tensor index and tokenizer (not of the weights: that would read them all)."""
    generation_config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any] = field(repr=False)
    chat_template: str | None = field(repr=False)
    tokenizer_file: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    stamps: Mapping[str, Stamp] = field(repr=False)
    """Of the files that hold tensors."""

    def check_file(self, file: str) -> None:
        """Raises ModelError when a file of tensors is not what it was when the checkpoint was opened."""
        path = self.path / file
        if not path.exists() or stamp(path) != self.stamps[file]:
            raise ModelError(str(path), "was changed while it was in use: start the services again")

    def facts(self) -> ModelFacts:
        return ModelFacts(
            name=self.name,
            digest=self.digest,
            layers=len(self.spec.layers),
            moe_layers=self.spec.moe_layers,
            experts=self.spec.router.experts,
            top_k=self.spec.router.top_k,
        )


def open_source(model: str) -> ModelSource:
    """Find and check a checkpoint: a Hugging Face directory, a hub id, or "" for the embedded demo.

    Reads JSON files and safetensors headers only. Raises ModelError, and UnsupportedModel for other architectures.
    """
    path, name = _locate(model)
    config = read_json(path / "config.json")
    generation = _optional_json(path / "generation_config.json")
    spec = parse_config(config, generation, str(path / "config.json"))
    tensors = read_index(path)
    check_tensors(tensors, expected_tensors(spec), str(path), spec.fp8_block)
    tokenizer_file = path / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ModelError(str(tokenizer_file), "is missing; other tokenizer files are not supported")
    tokenizer_config = _optional_json(path / "tokenizer_config.json")
    return ModelSource(
        path=path,
        name=name,
        config=config,
        spec=spec,
        digest=_digest(config, tensors, tokenizer_file),
        generation_config=generation,
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(path, tokenizer_config),
        tokenizer_file=tokenizer_file,
        tensors=tensors,
        stamps={file: stamp(path / file) for file in {info.file for info in tensors.values()}},
    )


def _locate(model: str) -> tuple[Path, str]:
    path = Path(model).expanduser() if model else DEMO
    if path.is_dir():
        return path, path.resolve().name
    if path.exists() or not model or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(str(path), "is not a directory" if path.exists() else "no such directory")
    return _download(model), model


def _download(model: str) -> Path:
    """The hub's snapshot; from its cache alone when HF_HUB_OFFLINE is set or the hub is out of reach."""
    from huggingface_hub import snapshot_download  # half a second to import: only who asks for a hub id pays
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise ModelError(model, f"is neither a directory nor a hub id: {error}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(model, "is neither a directory here nor a model that you may read on the hub") from error
    except LocalEntryNotFoundError as error:
        problem = "is not a directory, not (completely) in the hub's cache, and the hub is offline or out of reach"
        raise ModelError(model, problem) from error
    except OSError as error:  # base of the hub's HTTP errors, and of a full disk
        raise ModelError(model, f"could not be fetched from the hub: {error}") from error


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _digest(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], tokenizer_file: Path) -> str:
    hashed = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    hashed.update(json.dumps(sorted(tensors.items())).encode())
    hashed.update(tokenizer_file.read_bytes())
    return hashed.hexdigest()


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the entry in tokenizer_config.json: a text, or a list of which "default" counts."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    entry = tokenizer_config.get("chat_template")
    if isinstance(entry, list):
        named = {t.get("name"): t.get("template") for t in entry if isinstance(t, dict)}
        entry = named.get("default")
    if entry is not None and not isinstance(entry, str):
        raise ModelError(str(path / "tokenizer_config.json"), "chat_template has to be a text or a list of named texts")
    return entry
