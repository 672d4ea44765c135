"""What others make of a model: dense weights that stand for the quantized ones, and the bits these take packed.

Run as a process by :mod:`.making`. Each writes ``weights.safetensors`` (block linears, fp32) and ``size.json``
(``bits_per_weight`` of the linears, with scales and zeros).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from compression_worker.checkpoints import Checkpoint, attach_folder, load_tokenizer
from compression_worker.making.inputs import architecture_of
from compression_worker.methods.gptq.grid import GridSettings, fitted
from compression_worker.store import Store
from compression_worker.tensors import checkpoint_files
from kernels.dequant_matmul.layout import unpack_gptq, unpack_zeros

Weights = dict[str, torch.Tensor]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(PEERS))
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    weights, bits = PEERS[args.name](args)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, args.out / "weights.safetensors")
    (args.out / "size.json").write_text(json.dumps({"bits_per_weight": bits}))
    return 0


def nearest(args: argparse.Namespace) -> tuple[Weights, float]:
    """Round to nearest on asymmetric grids from least to greatest."""
    settings = GridSettings(bits=args.bits, symmetric=False, clip=False)
    made = {}
    for name, weight in linears(args):
        grids = fitted(weight.T.contiguous(), args.group, settings, None)
        group = torch.arange(weight.shape[1]) // args.group
        codes = (weight.T / grids.scales[group] + grids.zeros[group]).round_().clamp_(0, grids.most)
        made[name] = grids.values(codes).T
    return made, args.bits + (16 + args.bits) / args.group


def hqq(args: argparse.Namespace) -> tuple[Weights, float]:
    """HQQ with its own defaults but for bits and group size: fp32 meta data, as it packs them by itself 16 bits each."""
    from hqq.core.quantize import Quantizer

    made = {}
    for name, weight in linears(args):
        codes, meta = Quantizer.quantize(
            weight.float(), nbits=args.bits, group_size=args.group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        made[name] = Quantizer.dequantize(codes, meta).float()
    return made, args.bits + 32 / args.group


def gptqmodel(args: argparse.Namespace) -> tuple[Weights, float]:
    """GPTQModel on as many tokens of the same text."""
    from gptqmodel import GPTQModel, QuantizeConfig

    samples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows_of(args)]
    model = GPTQModel.load(str(args.model), QuantizeConfig(bits=args.bits, group_size=args.group), device="cpu")
    model.quantize(samples, batch_size=1)
    model.save(str(args.out / "saved"))
    return saved(args.out / "saved", args.bits), args.bits + (16 + args.bits) / args.group


def saved(folder: Path, bits: int) -> Weights:
    """The weights of a folder in the usual GPTQ format, whose first version stores zeros less one."""
    said = json.loads((folder / "quantize_config.json").read_text())
    more = 0 if said.get("checkpoint_format") == "gptq_v2" else 1
    made = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            pieces = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        for name in (key.removesuffix(".qweight") for key in pieces if key.endswith(".qweight")):
            codes = unpack_gptq(pieces[f"{name}.qweight"], bits).float()
            zeros = unpack_zeros(pieces[f"{name}.qzeros"], bits).float() + more
            scales, index = pieces[f"{name}.scales"].float(), pieces[f"{name}.g_idx"].long()
            made[f"{name}.weight"] = (scales[index] * (codes - zeros[index])).T
    return made


def llm_compressor(args: argparse.Namespace) -> tuple[Weights, float]:
    """GPTQ of llm-compressor, asymmetric, which is the better of its two grids here, on as many tokens of the same text."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    windows = windows_of(args)
    grid = QuantizationArgs(num_bits=args.bits, type="int", strategy="group", group_size=args.group, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(one) for one in windows]}),
        recipe=GPTQModifier(config_groups={"linears": scheme}, ignore=["lm_head"]),
        max_seq_length=512,
        num_calibration_samples=len(windows),
    )
    return dense(args, model), args.bits + (16 + args.bits) / args.group


def auto_round(args: argparse.Namespace) -> tuple[Weights, float]:
    """AutoRound without its tuning, whose 200 passes over every block are hours on a CPU: its own search of scales."""
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tuner = AutoRound(
        model, tokenizer_of(args), bits=args.bits, group_size=args.group, sym=False, iters=0, device_map="cpu"
    )
    made, _ = tuner.quantize()
    return dense(args, made), args.bits + (16 + args.bits) / args.group


def dense(args: argparse.Namespace, model: Any) -> Weights:
    """The block linears of a model in which the library put rounded weights."""
    weights = model.state_dict()
    return {name: weights[name].float().cpu() for name, _ in linears(args)}


def tokenizer_of(args: argparse.Namespace) -> Any:
    store = Store(args.out / "store", durable=False)
    return load_tokenizer(Checkpoint.open(store, attach_folder(store, args.model)))


def windows_of(args: argparse.Namespace) -> list[list[int]]:
    """The first tokens of the text in windows of 512."""
    ids = tokenizer_of(args)(text_of(args), add_special_tokens=False, verbose=False)["input_ids"][: args.tokens]
    return [ids[start : start + 512] for start in range(0, len(ids) - 511, 512)]


def linears(args: argparse.Namespace) -> Iterator[tuple[str, torch.Tensor]]:
    """Each block linear, fp32 ``(N, K)``."""
    store = Store(args.out / "store", durable=False)
    checkpoint = Checkpoint.open(store, attach_folder(store, args.model))
    with checkpoint_files(checkpoint) as files:
        for linear in architecture_of(checkpoint).linears():
            yield linear.name, files.file(linear.name).tensor(linear.name).float()


def text_of(args: argparse.Namespace) -> str:
    raw = args.text.read_text(encoding="utf-8")
    if args.text.suffix == ".jsonl":
        return "\n".join(json.loads(line)["text"] for line in raw.splitlines() if line.strip())
    return raw


PEERS: dict[str, Callable[[argparse.Namespace], tuple[Weights, Any]]] = {
    "round to nearest": nearest,
    "HQQ": hqq,
    "llm-compressor": llm_compressor,
    "AutoRound, 0 iterations": auto_round,
    "GPTQModel": gptqmodel,
}

if __name__ == "__main__":
    sys.exit(main())
