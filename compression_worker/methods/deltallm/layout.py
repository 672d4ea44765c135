"""How DeltaLLM lies on disk: what is stored as it is, and the factors of each follower.

``deltas.safetensors`` holds ``<weight>#A (r, K)`` and ``<weight>#B (N, r)`` of each weight that is not stored, with
``#c (1,)`` in the scaled form, or its ``#signs (ceil(K/32), N)`` int32 and ``#scale (1,)``; its line in the table is of
kind ``shared`` and names the ``anchor`` whose weight it uses. The weight is ``W_anchor + D`` or ``c W_anchor + D``,
transposed where the checkpoint keeps it so. On a packed base all other files are the base's own, less the codes of
shared weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from compression_worker.contracts import Json
from compression_worker.making.table import Weigh, sides_of
from compression_worker.methods.deltallm.config import ITEM_BYTES, LOW_RANK, SCALED, SIGN, sign_bytes

DELTAS_FILE = "deltas.safetensors"
QUANT_METHOD = "deltaworks_deltallm"
"""The name by which transformers knows how to load the artifact's folder."""
NAME = "shared-layers"
RULES = {1: "W = W_anchor + B A", 2: "W = c W_anchor + B A"}
"""By version: one that knows no ``c`` does not open what has one."""
PIECES = {LOW_RANK: ("A", "B"), SCALED: ("A", "B", "c"), SIGN: ("signs", "scale")}


def layout(base: Json | None, form: str) -> Json:
    """What the manifest says of the layout; ``base``: method, config and layout of a packed base."""
    version = 2 if form == SCALED else 1
    return {"name": NAME, "version": version, "rule": RULES[version], "base": base}


def is_known(said: Json) -> bool:
    """Whether this version reads what a manifest says of the layout."""
    return said in [layout(said.get("base"), form) for form in PIECES]


def keys(name: str, form: str) -> tuple[str, ...]:
    """The names of the pieces of the weight ``name``. No weight of a checkpoint has such a name."""
    return tuple(f"{name}#{piece}" for piece in PIECES[form])


def delta_parameters(entry: Json) -> int:
    """``r (N + K)`` of a line of kind ``shared``, and ``c``; sixteen signs count as one parameter."""
    outputs, inputs = sides_of(entry)
    if entry["form"] == SIGN:
        return -(-outputs * inputs // 16) + 1
    return int(entry["rank"]) * (outputs + inputs) + (entry["form"] == SCALED)


def delta_operations(entry: Json) -> int:
    """Multiplications and additions that a line of kind ``shared`` adds for each token; one left out takes all away."""
    outputs, inputs = sides_of(entry)
    if entry["form"] == SIGN:
        return 2 * outputs * inputs
    if not entry["rank"]:
        return -2 * outputs * inputs
    return 2 * int(entry["rank"]) * (outputs + inputs) + (outputs if entry["form"] == SCALED else 0)


def weighing(beneath: Weigh | None) -> Weigh:
    """How a line weighs: bytes by part and the weights it stands for; all but shared ones as in a packed base."""

    def weigh(entry: Json) -> tuple[Mapping[str, int], int]:
        if entry["kind"] != "shared" and beneath is not None:
            return beneath(entry)
        outputs, inputs = sides_of(entry)
        if entry["form"] == SIGN:
            return {"deltas": sign_bytes(outputs, inputs)}, outputs * inputs
        return {"deltas": ITEM_BYTES[entry["delta_dtype"]] * delta_parameters(entry)}, outputs * inputs

    return weigh
