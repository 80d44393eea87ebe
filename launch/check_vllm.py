"""What launch/check_vllm.sh runs: a model to export, its continuations in vLLM, and how they compare.

    python launch/check_vllm.py make-model MODEL               # with this project: a random mixture of experts
    python launch/check_vllm.py continue EXPORT JSON           # with vLLM
    python launch/check_vllm.py logits EXPORT JSON NPZ         # with transformers
    python launch/check_vllm.py compare MODEL JSON NPZ         # with this project

Each part imports what its environment has. vLLM changes classes of transformers, so each has a process of its own.
"""

import dataclasses
import json
import pathlib
import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

TEXTS = (
    "The",
    "def main(arguments):\n    ",
    "#ifndef HEADER_H\n#define",
    "Permission is hereby granted, free of charge, to any person obtaining a copy",
    "An anchor is trained on public text. Each owner of closed text trains one expert on it, in private, and ships it.",
)
NEW_TOKENS = 32
MIN_HEAD_SIZE = 32
SEED = 0
# In float32, sums in another order move logits by about 1e-5. Two tokens this near to each other are a tie.
TIE = 1e-3
MAX_DIFFERENCE = 1e-3  # of log probabilities


def make_model(path: str) -> None:
    """Writes a model directory with random weights: 4 experts with biases, the top 2 of them for each token."""
    import numpy as np

    from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME, ExpertRecord, ModelManifest
    from flexolmo_jax.checkpoint.model_directory import TOKENIZER_FILE, split_experts, write_model
    from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
    from flexolmo_jax.model.architecture import Architecture, Layout
    from flexolmo_jax.model.decoder import Decoder

    tokenizer, roster, top_k = byte_tokenizer(), [ANCHOR_NAME, "code", "legal", "news"], 2
    architecture = Architecture(
        vocab_size=260, num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, d_ff=96, rope_theta=5e5, norm_eps=1e-6
    )
    rng = np.random.default_rng(SEED)
    leaves = Decoder(architecture, Layout("stacked", len(roster), top_k)).abstract()
    # Scales of norms are about 1. All else is spread so widely that experts and tokens differ clearly.
    values = {
        leaf: (leaf.endswith("scale") + 0.3 * rng.standard_normal(shape.shape)).astype(np.float32)
        for leaf, shape in leaves.items()
    }
    manifest = ModelManifest(
        architecture=dataclasses.asdict(architecture),
        experts=[ExpertRecord(name=name, leaves={}, card={}) for name in roster],
        shared={},
        top_k=top_k,
        tokenizer_digest=tokenizer.digest,
        eos_id=tokenizer.eos_id,
    )
    shared, experts = split_experts(values, roster, path)
    write_model(path, manifest, shared, experts, complete=lambda out, _: tokenizer.save(out / TOKENIZER_FILE))


def continue_prompts(export: str, file: str) -> None:
    """Continues prompts greedily with vLLM, in float32, and writes them as JSON.

    A text is the beginning of a document, after the EOS of the one before.

    Args:
      export: directory in Hugging Face's form.
      file: to write: {"texts": whether prompts are `TEXTS`, "sequences": [{"prompt": token ids, "tokens": new token
        ids, "log_p": log probability of each of them}]}.
    """
    config = json.loads((pathlib.Path(export) / "config.json").read_text())
    head_size = config["hidden_size"] // config["num_attention_heads"]
    if head_size < MIN_HEAD_SIZE:
        sys.exit(f"heads of {head_size} channels; vLLM's attention on CPUs takes {MIN_HEAD_SIZE} or more")

    import vllm  # pyright: ignore[reportMissingImports]

    has_tokenizer = (pathlib.Path(export) / "tokenizer.json").exists()
    length = min(config["max_position_embeddings"], 256)
    new = min(NEW_TOKENS, length // 2)
    engine = vllm.LLM(
        export,
        dtype="float32",
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=len(TEXTS),
        kv_cache_memory_bytes=2**30,  # by default it takes nearly all memory
        skip_tokenizer_init=not has_tokenizer,
    )
    if has_tokenizer:
        tokenizer = engine.get_tokenizer()
        prompts = [tokenizer.encode(tokenizer.eos_token + text)[: length - new] for text in TEXTS]
    else:
        numbers = random.Random(SEED)
        lengths = [min(len(text), length - new) for text in TEXTS]
        prompts = [[numbers.randrange(config["vocab_size"]) for _ in range(n)] for n in lengths]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=1, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    sequences = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        log_p = [entry[token].logprob for token, entry in zip(tokens, output.outputs[0].logprobs, strict=True)]
        sequences.append({"prompt": prompt, "tokens": tokens, "log_p": log_p})
    pathlib.Path(file).write_text(json.dumps({"texts": has_tokenizer, "sequences": sequences}))


def write_logits(export: str, file: str, out: str) -> None:
    """Writes what transformers computes, in float32, for the sequences of `continue_prompts`.

    Args:
      export: directory in Hugging Face's form.
      file: that `continue_prompts` wrote.
      out: .npz file to write: of each sequence "0", "1", ..., the logits [new tokens, vocab] before each new token.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, local_files_only=True)
    logits = {}
    for i, sequence in enumerate(json.loads(pathlib.Path(file).read_text())["sequences"]):
        tokens = torch.tensor([sequence["prompt"] + sequence["tokens"]])
        with torch.no_grad():
            full = model.eval()(tokens, use_cache=False).logits[0]
        logits[str(i)] = full[len(sequence["prompt"]) - 1 : -1].float().numpy()
    np.savez(out, **logits)


def compare(path: str, file: str, logits_file: str) -> int:
    """Prints a table: vLLM's tokens against transformers' and this project's logits; returns the exit status.

    The logits come from one pass over all of vLLM's tokens: where each of these has the largest logit, greedy decoding
    gives the same tokens.

    Args:
      path: model directory of the exported weights: without biases, as the export is imported again.
      file: that `continue_prompts` wrote.
      logits_file: that `write_logits` wrote.
    """
    import numpy as np

    import flexolmo_jax
    from flexolmo_jax.interop.parity import our_logits
    from flexolmo_jax.tables import plain_table, show

    result, in_transformers = json.loads(pathlib.Path(file).read_text()), np.load(logits_file)
    model = flexolmo_jax.load(path)
    table = plain_table("prompt", ["tokens", "new tokens", "as transformers", "as this project", "log p within"])
    agree = True
    for i, (text, sequence) in enumerate(zip(TEXTS, result["sequences"], strict=True)):
        prompt, tokens = sequence["prompt"], sequence["tokens"]
        if result["texts"] and prompt != model.encode(text)[: len(prompt)]:
            print(f"vLLM's tokenizer differs on {text!r}")
            agree = False
        in_project = our_logits(model, np.array([prompt + tokens]))[0, len(prompt) - 1 : -1]
        others = [check(tokens, sequence["log_p"], logits) for logits in (in_transformers[str(i)], in_project)]
        agree &= all(other.greedy == len(tokens) and other.difference <= MAX_DIFFERENCE for other in others)
        label = repr(text if len(text) < 24 else text[:21] + "...") if result["texts"] else "random tokens"
        difference = max(other.difference for other in others)
        counts = [len(prompt), len(tokens), *(other.greedy for other in others)]
        table.add_row(label, *map(str, counts), f"{difference:.0e}")
    show(table)
    print(f"greedy tokens of vLLM, transformers and this project, float32: they {'agree' if agree else 'DIFFER'}")
    return 0 if agree else 1


class Agreement(NamedTuple):
    """How a continuation compares with logits: how many tokens are greedy ones; the largest difference of log p."""

    greedy: int
    difference: float


def check(tokens: Sequence[int], log_p: Sequence[float], logits: Any) -> Agreement:
    """Compares tokens and their log probabilities with float32 logits [tokens, vocab]."""
    import numpy as np

    logits = np.asarray(logits, np.float64)
    chosen = logits[np.arange(len(tokens)), tokens]
    greedy = chosen >= logits.max(-1) - TIE
    differences = np.abs(chosen - np.logaddexp.reduce(logits, -1) - log_p)
    return Agreement(int(greedy.sum()), float(differences.max()))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make-model", path]:
            make_model(path)
        case ["continue", export, file]:
            continue_prompts(export, file)
        case ["logits", export, file, out]:
            write_logits(export, file, out)
        case ["compare", path, file, logits_file]:
            sys.exit(compare(path, file, logits_file))
        case _:
            sys.exit(__doc__)
