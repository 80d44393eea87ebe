"""Tokenizer and generation settings of a Hugging Face directory.

`tokenizer.json` is copied as it is. The small files around it are made from the manifest when a model is exported;
where an imported directory had others, a model directory keeps them in `hugging_face/`, and they are exported again.
"""

import json
import pathlib

from etils import epath

from flexolmo_jax.checkpoint import model_directory
from flexolmo_jax.checkpoint.manifests import ModelManifest
from flexolmo_jax.data.tokenizer import load_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.interop.config import CONFIG_FILE, Config, generation_document

KEPT = model_directory.TOKENIZER_FOLDER
FILES = model_directory.TOKENIZER_FILES


def read_tokenizer(source: pathlib.Path, config: Config) -> tuple[str, int]:
    """The tokenizer's digest ("" where there is none) and the id of EOS.

    Raises:
      UserError: no file says which token EOS is, or the tokenizer is damaged or larger than the embedding.
    """
    file = source / model_directory.TOKENIZER_FILE
    if not file.exists():
        if config.eos_id is None:
            raise UserError(f"{source / CONFIG_FILE}: lacks eos_token_id; add the id of the token that ends a document")
        return "", config.eos_id
    said = f"eos_token_id in {source / CONFIG_FILE}"
    tokenizer = load_tokenizer(file, eos_id=config.eos_id, label=str(file), eos_label=said)
    if tokenizer.vocab_size > config.architecture.vocab_size:
        raise UserError(
            f"{file}: has ids up to {tokenizer.vocab_size - 1}, and config.json a vocab_size of "
            f"{config.architecture.vocab_size}; copy the tokenizer again from the model's source"
        )
    return tokenizer.digest, tokenizer.eos_id


def unused_eos(source: pathlib.Path, config: Config) -> list[str]:
    """A line where `config.json` names several tokens as EOS, of which the first is used."""
    file, ids = source / CONFIG_FILE, config.eos_ids
    return [f"{file}: names {len(ids)} tokens as EOS; the first, {ids[0]}, is used here"] if len(ids) > 1 else []


def import_tokenizer(source: pathlib.Path, directory: epath.Path, manifest: ModelManifest) -> None:
    """Copies the tokenizer into a model directory, and what else was said of it and of generation."""
    file = source / model_directory.TOKENIZER_FILE
    if file.exists():
        (directory / model_directory.TOKENIZER_FILE).write_bytes(file.read_bytes())
    made = _documents(directory, manifest)
    for name in FILES:
        content = (source / name).read_bytes() if (source / name).is_file() else None
        if content is not None and content != made.get(name, "").encode():
            (directory / KEPT).mkdir(exist_ok=True)
            (directory / KEPT / name).write_bytes(content)


def export_tokenizer(model: epath.Path, directory: epath.Path, manifest: ModelManifest) -> bool:
    """Writes the files of a tokenizer beside exported weights; returns whether the model has one."""
    found = (model / model_directory.TOKENIZER_FILE).exists()
    if found:
        (model / model_directory.TOKENIZER_FILE).copy(directory / model_directory.TOKENIZER_FILE)
    for name, text in _documents(directory, manifest).items():
        (directory / name).write_text(text)
    for name in FILES:
        if (model / KEPT / name).exists():
            (directory / name).write_bytes((model / KEPT / name).read_bytes())
    return found


def _documents(directory: epath.Path, manifest: ModelManifest) -> dict[str, str]:
    """{file: text} as made from the manifest, and from the tokenizer.json in `directory` where there is one."""
    documents = {"generation_config.json": generation_document(manifest)}
    file = directory / model_directory.TOKENIZER_FILE
    if file.exists():
        eos = load_tokenizer(file, eos_id=manifest.eos_id, label=str(file)).backend.id_to_token(manifest.eos_id)
        documents["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": eos,
            "eos_token": eos,
            "pad_token": eos,
            "model_max_length": manifest.context_length,
            "clean_up_tokenization_spaces": False,
        }
    return {name: json.dumps(document, indent=2) + "\n" for name, document in documents.items()}
