"""The gate for foreign bytes: every refusal has its code, and what it accepts the safetensors library accepts."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compression_worker import gate
from compression_worker.contracts import CompressionError


def header(**tensors: tuple[str, list[int], int, int]) -> dict[str, Any]:
    return {name: {"dtype": t[0], "shape": t[1], "data_offsets": [t[2], t[3]]} for name, t in tensors.items()}


def safetensors_bytes(head: dict[str, Any] | bytes, data: bytes) -> bytes:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def pass_gate(content: bytes) -> list[gate.TensorEntry]:
    """What an import does with the bytes of a file before it reads any data."""
    length = gate.header_length("f.safetensors", content[:512], len(content))
    return gate.parse_header("f.safetensors", content[8 : 8 + length], len(content) - 8 - length)


GOOD = header(a=("F32", [2, 3], 0, 24), b=("BF16", [], 24, 26), c=("F16", [0, 7], 26, 26))


def test_it_lists_the_tensors_in_file_order() -> None:
    entries = pass_gate(safetensors_bytes(dict(reversed(GOOD.items())) | {"__metadata__": {"format": "pt"}}, bytes(26)))
    assert [(e.name, e.dtype, e.shape, e.begin, e.end) for e in entries] == [
        ("a", "F32", (2, 3), 0, 24),
        ("b", "BF16", (), 24, 26),
        ("c", "F16", (0, 7), 26, 26),
    ]


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing at all": (b"", "truncated_file"),
    "cut inside the length": (b"\x10\0\0", "truncated_file"),
    "cut inside the header": (safetensors_bytes(GOOD, b"")[:60], "truncated_file"),
    "cut inside the data": (safetensors_bytes(GOOD, bytes(25)), "truncated_file"),
    "bytes after the data": (safetensors_bytes(GOOD, bytes(27)), "tail_bytes"),
    "a zip after the data": (safetensors_bytes(GOOD, bytes(26) + b"PK\x03\x04"), "tail_bytes"),
    "a header over 8 MB": (safetensors_bytes(b"{" + b" " * 8_000_000, b""), "header_too_large"),
    "a header of 2^63 bytes": (struct.pack("<Q", 1 << 63) + b"{}", "header_too_large"),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0.", "pickle_file"),
    "a torch zip": (b"PK\x03\x04" + bytes(40), "pickle_file"),
    "a gzip": (b"\x1f\x8b\x08" + bytes(40), "archive_file"),
    "a GGUF": (b"GGUF" + bytes(40), "archive_file"),
    "plain text": (b"version https://git-lfs.github.com/spec/v1", "bad_header"),
    "no object": (safetensors_bytes(b"{]", b""), "bad_json"),
    "not UTF-8": (safetensors_bytes(b'{"\xff":1}', b""), "not_utf8"),
    "half a surrogate pair as name": (safetensors_bytes(b'{"\\ud800":1}', b""), "not_utf8"),
    "half a surrogate pair as metadata": (
        safetensors_bytes({"__metadata__": {"a": "\ud800"}} | GOOD, bytes(26)),
        "not_utf8",
    ),
    "very deep": (safetensors_bytes(b'{"a":' + b"[" * 100_000, b""), "bad_json"),
    "no tensor": (safetensors_bytes({"__metadata__": {}}, b""), "no_tensors"),
    "the same name twice": (
        safetensors_bytes(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "duplicate_key",
    ),
    "the same field twice": (
        safetensors_bytes(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "duplicate_key",
    ),
    "an unknown field": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}, bytes(4)),
        "bad_header",
    ),
    "overlap": (safetensors_bytes(header(a=("F32", [2], 0, 8), b=("F32", [2], 4, 12)), bytes(12)), "bad_header"),
    "hole": (safetensors_bytes(header(a=("F32", [1], 0, 4), b=("F32", [1], 8, 12)), bytes(12)), "bad_header"),
    "negative size": (safetensors_bytes(header(a=("F32", [-1], 0, -4)), b""), "bad_header"),
    "negative zero": (safetensors_bytes(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""), "bad_json"),
    "fractional size": (safetensors_bytes(header(a=("F32", [1.0], 0, 4)), bytes(4)), "bad_header"),  # type: ignore[list-item]
    "true as size": (safetensors_bytes(header(a=("F32", [True], 0, 4)), bytes(4)), "bad_header"),
    "NaN as size": (
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
        "bad_json",
    ),
    "end before begin": (safetensors_bytes(header(a=("F32", [1], 4, 0)), bytes(4)), "bad_header"),
    "too few bytes for the shape": (safetensors_bytes(header(a=("F32", [2], 0, 4)), bytes(4)), "bad_header"),
    "overflow hidden by a zero": (safetensors_bytes(header(a=("F32", [1 << 63, 1 << 63, 0], 0, 0)), b""), "bad_header"),
    "a number of 5,000 digits": (safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}", b""), "bad_json"),
    "nine dimensions": (safetensors_bytes(header(a=("F32", [1] * 9, 0, 4)), bytes(4)), "bad_header"),
    "8-byte floats": (safetensors_bytes(header(a=("F64", [1], 0, 8)), bytes(8)), "wrong_dtype"),
    "1-byte integers": (safetensors_bytes(header(a=("I8", [1], 0, 1)), bytes(1)), "wrong_dtype"),
    "8-bit floats": (safetensors_bytes(header(a=("F8_E4M3", [1], 0, 1)), bytes(1)), "wrong_dtype"),
    "a path as name": (safetensors_bytes(header(**{"../../etc/passwd": ("F32", [1], 0, 4)}), bytes(4)), "bad_path"),
    "an empty name": (safetensors_bytes(header(**{"": ("F32", [1], 0, 4)}), bytes(4)), "bad_header"),
    "a line break in a name": (safetensors_bytes(header(**{"a\nb": ("F32", [1], 0, 4)}), bytes(4)), "bad_header"),
    "metadata that is no text": (safetensors_bytes({"__metadata__": {"a": 1}} | GOOD, bytes(26)), "bad_header"),
}


@pytest.mark.parametrize(("content", "code"), HOSTILE.values(), ids=HOSTILE.keys())
def test_it_refuses_a_hostile_weights_file_with_its_code(content: bytes, code: str) -> None:
    with pytest.raises(CompressionError) as refused:
        pass_gate(content)
    assert refused.value.code == code
    assert "f.safetensors" in refused.value.message


def test_a_wrong_dtype_names_the_tensor() -> None:
    with pytest.raises(CompressionError, match=r"'model\.norm\.weight'.*F64.*BF16, F16, F32"):
        pass_gate(safetensors_bytes(header(**{"model.norm.weight": ("F64", [1], 0, 8)}), bytes(8)))


def many_tensors(count: int) -> bytes:
    return safetensors_bytes(header(**{f"t{i}": ("F16", [], 2 * i, 2 * i + 2) for i in range(count)}), bytes(2 * count))


def test_twenty_thousand_tensors_are_the_limit() -> None:
    assert len(pass_gate(many_tensors(20_000))) == 20_000
    with pytest.raises(CompressionError) as refused:
        pass_gate(many_tensors(20_001))
    assert refused.value.code == "too_many_tensors"


def test_a_header_of_exactly_eight_megabytes_is_read() -> None:
    raw = json.dumps(GOOD).encode()
    assert len(pass_gate(safetensors_bytes(raw.ljust(8_000_000), bytes(26)))) == 3


sizes = st.one_of(st.integers(0, 5), st.sampled_from([-1, 1 << 31, 1 << 63, 1 << 64, 1.0, True, None, "1"]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F4", "", 7]),
        "shape": st.lists(sizes, max_size=9),
        "data_offsets": st.lists(st.one_of(st.integers(0, 40), sizes), min_size=1, max_size=3),
    }
)
names = st.one_of(st.text(max_size=6), st.sampled_from(["a", "b", "__metadata__", "../x", "model.norm.weight"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def whole_files(draw: st.DrawFn) -> bytes:
    """Mostly right files: tensors laid out one after another, then perhaps a field, a byte or the length spoiled."""
    tensors: dict[str, Any] = {}
    position = 0
    plain = st.text("abcé_", min_size=1, max_size=8)
    for name in draw(st.lists(st.one_of(plain, plain, plain, names), min_size=1, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(["F32", "F16", "BF16"]))
        size = gate.ITEM_SIZE[dtype]
        for extent in shape:
            size *= extent
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    spoil = draw(st.sampled_from(["nothing", "nothing", "field", "tail", "byte", "cut"]))
    if spoil == "field":
        tensors[draw(st.sampled_from(sorted(tensors)))] = draw(st.one_of(entries, json_values))
    raw = json.dumps(tensors).encode() + b" " * draw(st.integers(0, 8))
    content = bytearray(safetensors_bytes(raw, bytes(position + (spoil == "tail"))))
    if spoil == "byte":
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content))) if spoil == "cut" else None])


def accepted(read: Callable[[bytes], object], content: bytes) -> bool:
    try:
        read(content)
    except CompressionError:
        return False
    return True


@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        whole_files(),
        st.binary(max_size=80),
        st.dictionaries(names, entries).map(lambda h: safetensors_bytes(h, bytes(24))),
    )
)
@example(safetensors_bytes(GOOD, bytes(26)))
@example(safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', bytes(4)))
@example(safetensors_bytes(b'\xef\xbb\xbf{"a":1}', b""))
def test_the_library_reads_every_file_that_passes_and_no_file_crashes_the_gate(content: bytes) -> None:
    if accepted(pass_gate, content):
        library = {
            name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in safetensors.deserialize(content)
        }
        assert library == {e.name: (e.dtype, e.shape, e.end - e.begin) for e in pass_gate(content)}


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "vocab_size": 288}
BAD_CONFIGS = {
    "auto_map": (CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map"),
    "auto_map further in": (CONFIG | {"text_config": [{"auto_map": {}}]}, "auto_map"),
    "a billion layers": (CONFIG | {"num_hidden_layers": 10**9}, "bad_config"),
    "no layer": (CONFIG | {"num_hidden_layers": 0}, "bad_config"),
    "a fractional width": (CONFIG | {"hidden_size": 64.5}, "bad_config"),
    "no architecture": (CONFIG | {"architectures": []}, "bad_config"),
    "two architectures": (CONFIG | {"architectures": ["A", "B"]}, "bad_config"),
    "an architecture that is a path": (CONFIG | {"architectures": ["../evil"]}, "bad_config"),
    "no model type": ({"architectures": ["LlamaForCausalLM"]}, "bad_config"),
    "tied in words": (CONFIG | {"tie_word_embeddings": "yes"}, "bad_config"),
    "quantized": (CONFIG | {"quantization_config": {"bits": 4}}, "quantized_checkpoint"),
}


@pytest.mark.parametrize(("config", "code"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_it_refuses_a_config_that_cannot_be_meant(config: dict[str, Any], code: str) -> None:
    with pytest.raises(CompressionError) as refused:
        gate.check_config("config.json", json.dumps(config).encode())
    assert refused.value.code == code


@settings(max_examples=500, deadline=None)
@given(st.one_of(json_values.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40)))
@example(b"[" * 200_000)
@example(b'{"a":' * 50_000)
def test_no_bytes_crash_the_config_gate(raw: bytes) -> None:
    assert not accepted(lambda content: gate.check_config("config.json", content), raw)


FILE_NAMES = {
    "pytorch_model.bin": "pickle_file",
    "model.pt": "pickle_file",
    "weights.PTH": "pickle_file",
    "last.ckpt": "pickle_file",
    "a.pkl": "pickle_file",
    "a.joblib": "pickle_file",
    "a.npy": "pickle_file",
    "model.zip": "archive_file",
    "model.tar.gz": "archive_file",
    "modeling_llama.py": "unexpected_file",
    ".metadata": "unexpected_file",
    "..": "unexpected_file",
    "-.safetensors": "unexpected_file",
    "a b.safetensors": "unexpected_file",
    "x" * 300 + ".safetensors": "unexpected_file",
}


@pytest.mark.parametrize(("name", "code"), FILE_NAMES.items())
def test_it_refuses_a_file_by_its_name(name: str, code: str) -> None:
    with pytest.raises(CompressionError) as refused:
        gate.check_file_name(name)
    assert refused.value.code == code


def test_a_pickle_is_refused_with_the_way_to_convert_it() -> None:
    with pytest.raises(CompressionError, match="safe_serialization"):
        gate.check_file_name("pytorch_model.bin")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 7, None])
def test_an_index_with_anything_but_plain_file_names_is_refused(file: object) -> None:
    with pytest.raises(CompressionError) as refused:
        gate.check_index("index.json", json.dumps({"weight_map": {"a": file}}).encode())
    assert refused.value.code == "bad_path"
