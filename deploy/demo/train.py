"""Trains the demo pair: a small Llama-shaped base on plain English, and a full fine-tune of it on Shakespeare.

``python -m deploy.demo.train --out DIR`` writes ``DIR/base`` and ``DIR/variant`` as Hugging Face folders: bfloat16
safetensors, configuration, byte-level BPE tokenizer. Needs no download: the texts are in ``deploy/demo/data``.
The defaults made the weights in this folder; one run takes about half an hour of one slow core.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.demo import texts

END = "<|endoftext|>"
CONTEXT = 256
SHAKESPEARE_SHARE = 0.25
"""Of the Shakespeare training text, how much the base already sees: enough to know its words, not its voice."""

CHAT = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
README = """---
license: apache-2.0
language: en
{lineage}---
# Deltaworks demo: {name}

{about}
It exists so that a first start of Deltaworks shows real figures; it is far too small for anything else.
Made by `python -m deploy.demo.train`; the texts it learned from, their origins and licences are in
`deploy/demo/data/README.md`.
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained."""

    steps: int
    learning_rate: float
    batch_size: int = 16
    warmup: int = 40
    weight_decay: float = 0.1


def tokenizer_train(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of our own: any bytes go in, the same bytes come out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=CONTEXT, chat_template=CHAT
    )


def model_new(vocab_size: int) -> LlamaForCausalLM:
    """About 1.2 million parameters, nine in ten of them in the linears of the blocks."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def base_documents() -> list[str]:
    """Plain English, and the first part of Shakespeare's training text."""
    shakespeare = texts.speeches(texts.shakespeare_split()[0])
    seen = shakespeare[: int(len(shakespeare) * SHAKESPEARE_SHARE)]
    passages = ["\n\n".join(seen[start : start + 8]) for start in range(0, len(seen), 8)]
    return texts.word_problems() + texts.instructions() + passages


def token_stream(tokenizer: Any, documents: list[str], generator: torch.Generator) -> torch.Tensor:
    """All documents in a random order, each followed by the end mark."""
    order = torch.randperm(len(documents), generator=generator).tolist()
    ids = [tokenizer(documents[index] + END, verbose=False)["input_ids"] for index in order]
    return torch.tensor([token for document in ids for token in document])


def batches(stream: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Random windows ``[batch_size, CONTEXT]`` of the stream."""
    for _ in range(recipe.steps):
        starts = torch.randint(len(stream) - CONTEXT, (recipe.batch_size,), generator=generator).tolist()
        yield torch.stack([stream[start : start + CONTEXT] for start in starts])


def model_train(model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> None:
    """AdamW on every tensor with a short warm-up and a cosine down to a tenth."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    started = time.monotonic()
    for step, batch in enumerate(batches(stream, recipe, generator)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


def perplexity(model: LlamaForCausalLM, tokenizer: Any, text: str, windows: int = 60) -> float:
    """Over the first ``windows`` windows of CONTEXT tokens."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = min(windows, len(ids) // CONTEXT)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in ids[: windows * CONTEXT].split(CONTEXT)]
    return math.exp(sum(losses) / len(losses))


def save(model: LlamaForCausalLM, tokenizer: Any, folder: Path, readme: str) -> None:
    """As bfloat16; ``model`` itself is rounded to what was written."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "README.md").write_text(readme)
    model.to(torch.float32)


def report(title: str, model: LlamaForCausalLM, tokenizer: Any) -> None:
    shakespeare = perplexity(model, tokenizer, texts.shakespeare_split()[1])
    problems = perplexity(model, tokenizer, "\n\n".join(texts.word_problems("word_problems_heldout")))
    print(f"{title}: held-out perplexity {shakespeare:.2f} on Shakespeare, {problems:.2f} on word problems", flush=True)


def _rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def pair_train(out: Path, base: Recipe, variant: Recipe, vocab_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    documents = base_documents()
    plays = texts.speeches(texts.shakespeare_split()[0])
    tokenizer = tokenizer_train(documents + plays, vocab_size)
    model = model_new(vocab_size)
    model_train(model, token_stream(tokenizer, documents, generator), base, generator)
    about = "A language model of 1.2 million parameters, trained on simple word problems and a little Shakespeare."
    save(model, tokenizer, out / "base", README.format(name="base", about=about, lineage=""))
    report("base", model, tokenizer)

    stream = torch.tensor(tokenizer("\n\n".join(plays), verbose=False)["input_ids"])
    model_train(model, stream, variant, generator)
    about = "The demo base, fine-tuned on Shakespeare's plays (every tensor)."
    save(model, tokenizer, out / "variant", README.format(name="variant", about=about, lineage="base_model: base\n"))
    report("variant", model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="gets the folders base and variant")
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--base-learning-rate", type=float, default=2e-3)
    parser.add_argument("--variant-steps", type=int, default=400)
    parser.add_argument("--variant-learning-rate", type=float, default=6e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="more threads change the last bits of the weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    pair_train(
        args.out,
        Recipe(steps=args.base_steps, learning_rate=args.base_learning_rate, batch_size=args.batch_size),
        Recipe(steps=args.variant_steps, learning_rate=args.variant_learning_rate, batch_size=args.batch_size),
        args.vocab_size,
        args.seed,
    )


if __name__ == "__main__":
    main()
