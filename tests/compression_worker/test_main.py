"""The command line: exit statuses, one line of error, and the JSON shapes that docs/cli.md promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compression_worker.__main__ import main
from compression_worker.catalog import METHODS
from tests.peft_adapters import make_adapter
from tests.tiny import make_tiny_pair

PROJECT = Path(__file__).parents[2]
DOCS = (PROJECT / "docs" / "cli.md").read_text(encoding="utf-8")
INSPECT = {
    "method": str,
    "config": dict,
    "source_bytes": int,
    "artifact_bytes": int,
    "true_ratio": float,
    "nominal_ratio": float,
    "bits_per_weight": float,
    "parts": list,
    "base_fingerprint": str,
    "variant_fingerprint": str,
}
METRIC = {
    "name": str,
    "value": float,
    "low": float,
    "high": float,
    "unit": str,
    "higher_is_better": bool,
    "samples": int,
}
SETTING = {"name", "type", "default", "help", "choices"}


@pytest.fixture(name="made", scope="module")
def fixture_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, variant, text.txt and the artifact of both, made by the command line itself."""
    folder = tmp_path_factory.mktemp("cli")
    make_tiny_pair(folder)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 40)
    arguments = ["--base", str(folder / "base"), "--model", str(folder / "variant"), "--out", str(folder / "artifact")]
    assert (
        main(["compress", "bitdelta", *arguments, "--set", "distill_steps=2", "--data", str(folder / "text.txt")]) == 0
    )
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(str(stop.code))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def check_shape(value: dict[str, Any], shape: dict[str, type]) -> None:
    assert value.keys() == shape.keys()
    for name, kind in shape.items():
        assert type(value[name]) is kind, name


def documented(command: str) -> set[str]:
    """The keys that docs/cli.md names in the first JSON block of a command's section."""
    section = DOCS.split(f"## {command}", 1)[1].split("\n## ", 1)[0]
    block = re.search(r"```json\n(.*?)```", section, re.DOTALL)
    assert block, command
    value = json.loads(block[1])
    return set(value[0] if isinstance(value, list) else value)


def test_inspect_has_the_documented_shape(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "inspect", made / "artifact")
    check_shape(found, INSPECT)
    assert documented("inspect") == INSPECT.keys()
    assert sum(part["bytes"] for part in found["parts"]) == found["artifact_bytes"]
    assert found["artifact_bytes"] == sum(path.stat().st_size for path in (made / "artifact").iterdir())
    assert found["true_ratio"] == found["source_bytes"] / found["artifact_bytes"]
    assert found["config"]["distill_steps"] == 2


def test_compress_answers_as_inspect_does(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--base", made / "base", "--model", made / "variant", "--out", tmp_path / "out", "--seed", 3]
    found = answer(capsys, "compress", "bitdelta", *flags, "--set", "distill_steps=0")
    check_shape(found, INSPECT)
    assert documented("compress") == INSPECT.keys()
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes())["seed"] == 3


def test_a_peft_adapter_is_compressed_as_the_variant_that_it_makes(
    made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_adapter(made / "base", tmp_path / "adapter", target_modules="all-linear")
    capsys.readouterr()
    flags = ["--base", made / "base", "--out", tmp_path / "out", "--set", "distill_steps=0"]
    found = answer(capsys, "compress", "bitdelta", *flags, "--model", tmp_path / "adapter")
    check_shape(found, INSPECT)
    assert found["source_bytes"] == (made / "base" / "model.safetensors").stat().st_size
    status, _, _ = run(capsys, "restore", tmp_path / "out", "--base", made / "base", "--out", tmp_path / "model")
    assert status == 0
    assert (tmp_path / "model" / "config.json").read_bytes() == (made / "base" / "config.json").read_bytes()
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    flags[3] = tmp_path / "again"
    status, out, err = run(capsys, "compress", "bitdelta", *flags, "--model", tmp_path / "adapter")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: '{tmp_path / 'adapter'}': the folder has 'adapter_config.json' and no ")
    assert not list(tmp_path.glob(".deltaworks-*"))


def test_verify_has_the_documented_shape(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "verify", made / "artifact", "--base", made / "base") == {"ok": True, "problems": []}
    assert documented("verify") == {"ok", "problems"}
    status, out, err = run(capsys, "verify", made / "artifact", "--base", made / "variant", "--json")
    assert status == 1
    assert json.loads(out)["ok"] is False
    assert err.count("\n") == 1


def test_restore_has_the_documented_shape(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = answer(capsys, "restore", made / "artifact", "--base", made / "base", "--out", tmp_path / "out")
    check_shape(found, {"out": str, "tensors": int, "bytes": int})
    assert documented("restore") == found.keys()


def test_an_escrow_gives_the_same_files_back(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folders = ["--base", made / "base", "--model", made / "variant", "--out", tmp_path / "escrow"]
    found = answer(capsys, "escrow", *folders)
    check_shape(found, INSPECT)
    assert documented("escrow") == INSPECT.keys()
    assert found["artifact_bytes"] == sum(path.stat().st_size for path in (tmp_path / "escrow").iterdir())
    assert answer(capsys, "inspect", tmp_path / "escrow") == found
    assert answer(capsys, "verify", tmp_path / "escrow", "--base", made / "base") == {"ok": True, "problems": []}
    restored = answer(capsys, "restore", tmp_path / "escrow", "--base", made / "base", "--out", tmp_path / "back")
    check_shape(restored, {"out": str, "tensors": int, "bytes": int})
    before = {path.name: path.read_bytes() for path in (made / "variant").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == before
    status, out, err = run(
        capsys, "restore", tmp_path / "escrow", "--base", made / "variant", "--out", tmp_path / "new"
    )
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "fingerprint" in err


def test_evaluate_has_the_documented_shape(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--base", made / "base", "--reference", made / "variant", "--data", made / "text.txt"]
    found = answer(capsys, "evaluate", made / "artifact", *flags, "--set", "window_tokens=32")
    for metric in found:
        check_shape(metric, METRIC)
    assert documented("evaluate") == METRIC.keys()
    assert {metric["name"] for metric in found} >= {"perplexity", "kl_divergence", "top1_agreement"}


def test_methods_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    methods = answer(capsys, "methods")
    assert {method["name"] for method in methods} == METHODS.keys()
    for method in methods:
        assert documented("methods") == method.keys() == {"name", "label", "summary", "paper", "settings"}
        assert all(setting.keys() == SETTING and setting["help"] for setting in method["settings"])
        for setting in method["settings"]:
            assert f"`{setting['name']}`" in DOCS, f"docs/cli.md does not name {setting['name']}"


def test_without_json_it_speaks_to_people(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "inspect", made / "artifact")
    assert status == 0
    assert "true ratio" in out
    assert "embeddings" in out
    assert run(capsys, "verify", made / "artifact")[:2] == (0, "every byte is as it was written\n")
    assert "bitdelta" in run(capsys, "methods")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "{made}/base"], "is no artifact"),
        (["restore", "{made}/artifact", "--base", "{made}/variant", "--out", "{new}"], "fingerprint"),
        (["compress", "bitdelta", "--base", "{made}/base", "--model", "{made}/variant", "--out", "{new}"], "text set"),
        (
            ["compress", "bitdelta", "--base", "{made}/nothing", "--model", "{made}/variant", "--out", "{new}"],
            "nothing",
        ),
        (
            ["compress", "bitdelta", "--base", "{made}/base", "--model", "{made}/variant", "--out", "{made}/artifact"],
            "not empty",
        ),
        (
            [
                *("compress", "bitdelta", "--base", "{made}/base", "--model", "{made}/variant", "--out", "{new}"),
                *("--set", "batch_size=0"),
            ],
            "batch_size is 0",
        ),
    ],
)
def test_what_it_refuses_costs_status_1_and_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    filled = [argument.format(made=made, new=tmp_path / "new") for argument in arguments]
    status, out, err = run(capsys, *filled)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["shrink"],
        ["compress", "zipdelta", "--base", "a", "--model", "b", "--out", "c"],
        ["compress", "bitdelta", "--base", "a", "--model", "b"],
        ["compress", "bitdelta", "--base", "a", "--model", "b", "--out", "c", "--set", "bits=1"],
        ["compress", "bitdelta", "--base", "a", "--model", "b", "--out", "c", "--set", "distill_steps=many"],
        ["compress", "bitdelta", "--base", "a", "--model", "b", "--out", "c", "--set", "distill_steps"],
        ["compress", "bitdelta", "--base", "a", "--model", "b", "--out", "c", "--seed", "-1"],
        ["evaluate", "a"],
        ["serve"],
        ["step", "--store", "a", "--import-root", "demo"],
    ],
)
def test_what_it_does_not_understand_costs_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["compress", "--help"], ["serve", "--help"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom compression_worker.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=PROJECT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout
    assert time.monotonic() - started < 30


def test_it_runs_as_a_module_without_django(made: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DJANGO")}
    done = subprocess.run(
        [sys.executable, "-m", "compression_worker", "inspect", str(made / "artifact"), "--json"],
        cwd=PROJECT,
        capture_output=True,
        env=environment,
        check=True,
    )
    check_shape(json.loads(done.stdout), INSPECT)
