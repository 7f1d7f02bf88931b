"""The command line's contract: data on stdout and everything else on stderr, the documented exit codes and JSON, errors
of one line with a hint, files written whole or not at all, and no surprise for pipes, terminals and interrupts.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import llmfp
from llmfp.cli import COMMANDS, cli
from llmfp.kernels import BACKENDS
from llmfp.kernels import select as select_backend
from tests.checkpoints import BACKEND, build, entry, framed, write_model

ROOT = Path(llmfp.__file__).parents[1]
LLMFP = [sys.executable, "-m", "llmfp"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", layers=3).write(tmp_path_factory.mktemp("cli") / "small-llama")


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **changes}


def reading(command: str) -> list[str]:
    return ["--backend", BACKEND] if command in ("scan", "plan") else []


# --- what is printed where, and the exit code ------------------------------------------------------------------------

OK = ["scan {}", "scan {} --json", "plan {}", "plan {} --json", "backends", "backends --json", "--version", "--help"]
USAGE = {
    "nope": "No such command 'nope'",
    "scan": "Missing argument 'SOURCE'",
    "scan {} extra": "unexpected extra argument",
    "scan {} --nope": "No such option",
    "scan {} --backend cuda": "'cuda' is not one of",
    "scan {} --reader fast": "'fast' is not one of",
    "scan {} --threads 0": "0 is not in the range",
    "scan {} --memory lots": "'lots' is not a size",
    "scan {} --memory -1": "'-1' is not a size",
    "scan {} --memory nan": "'nan' is not a size",
    "scan {} --out fingerprint.json": "does not end in .fp.safetensors",
    "scan {} --out missing/x.fp.safetensors": "missing is not a directory",
    "show": "Missing argument 'FILE'",
    "show {}": "is a directory",
    "plan": "Missing argument 'SOURCE'",
}


@pytest.mark.parametrize("line", OK)
def test_what_succeeds_says_so_on_stdout_alone(line: str, checkpoint: Path, run_main: Any) -> None:
    arguments = line.format(checkpoint).split()
    code, stdout, stderr = run_main(*arguments, *reading(arguments[0]))
    assert (code, stderr) == (0, "")
    assert stdout.endswith("\n")
    if "--json" in arguments:
        assert isinstance(json.loads(stdout, parse_constant=pytest.fail), dict)


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage_is_one_line_and_where_to_look(line: str, checkpoint: Path, run_main: Any) -> None:
    code, stdout, stderr = run_main(*line.format(checkpoint).split())
    assert (code, stdout) == (2, "")
    error, hint = stderr.splitlines()
    assert error.startswith("error: ")
    assert USAGE[line] in error
    command = line.split()[0]
    assert hint == f"hint: llmfp-fast {command + ' ' if command in COMMANDS else ''}--help"


def test_no_command_prints_the_help(run_main: Any) -> None:
    code, stdout, stderr = run_main()
    assert (code, stdout) == (2, "")
    assert stderr.startswith("Usage: llmfp-fast")


def test_the_version_is_the_packages(run_main: Any) -> None:
    assert run_main("--version") == (0, f"llmfp-fast, version {llmfp.__version__}\n", "")


def test_verbose_speaks_on_stderr_and_leaves_stdout_to_the_data(checkpoint: Path, run_main: Any) -> None:
    code, stdout, stderr = run_main("scan", checkpoint, "--json", "-v", "--backend", BACKEND)
    assert code == 0
    assert json.loads(stdout)["layers"] == [0, 1, 2]
    assert stderr.startswith("plan: llama, 12 tensors, ")
    assert len(stderr.splitlines()) == 1


def test_debug_adds_the_traceback_and_changes_nothing_else(tmp_path: Path, run_main: Any) -> None:
    plain = run_main("scan", tmp_path / "nowhere")
    code, stdout, stderr = run_main("scan", tmp_path / "nowhere", "--debug")
    assert (code, stdout) == plain[:2] == (2, "")
    assert "Traceback" in stderr
    assert "CheckpointError" in stderr
    assert stderr.endswith(plain[2])
    assert "Traceback" not in plain[2]


def test_what_nobody_expected_is_one_line_too(checkpoint: Path, run_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmfp.api, "match", lambda *_: 1 / 0)
    code, stdout, stderr = run_main("scan", checkpoint)
    assert (code, stdout) == (2, "")
    assert stderr.splitlines()[0] == "error: ZeroDivisionError: division by zero"
    assert "--debug" in stderr.splitlines()[1]


def test_a_budget_too_small_names_the_tensor_and_what_is_enough(checkpoint: Path, run_main: Any) -> None:
    code, stdout, stderr = run_main("scan", checkpoint, "--memory", "65536", "--backend", BACKEND)
    assert (code, stdout) == (2, "")
    assert re.search(r"model\.safetensors: tensor 'model\.layers\.\d\.self_attn\.\w_proj\.weight' needs", stderr)
    enough = re.search(r"hint: raise --memory to (\w+)", stderr)
    assert enough is not None
    assert run_main("scan", checkpoint, "--memory", enough[1], "--backend", BACKEND)[0] == 0


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str, run_main: Any) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.help
    assert command.short_help
    code, stdout, stderr = run_main(name, "--help")
    assert (code, stderr) == (0, "")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.opts
            assert parameter.opts[-1] in stdout
        else:
            assert parameter.make_metavar(click.Context(command)) in command.help
    assert all(len(line) <= 80 for line in stdout.splitlines())


def test_the_help_lists_every_command(run_main: Any) -> None:
    _, stdout, _ = run_main("--help")
    listed = re.findall(r"^  ([a-z]+)  +\S", stdout.partition("Commands:")[2], re.MULTILINE)
    assert tuple(listed) == COMMANDS


# --- the JSON and the table ------------------------------------------------------------------------------------------

SCAN_KEYS = {
    "schema", "source", "architecture", "layers", "heads", "kv_heads", "head_dim", "hidden_size", "std", "mean",
    "roles", "towers", "skipped", "caveats", "run", "digest", "sample",
}  # fmt: skip
RUN_KEYS = {
    "backend", "simd", "reader", "seconds", "bytes_read", "bytes_total", "second_read_bytes", "peak_rss_bytes",
    "threads", "memory_budget_bytes", "versions", "device", "device_why",
}  # fmt: skip


def scanned(run_main: Any, source: Path, *more: object) -> dict[str, Any]:
    code, stdout, stderr = run_main("scan", source, "--json", "--backend", BACKEND, *more)
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout, parse_constant=pytest.fail)
    return found


def test_scan_prints_the_documented_object(checkpoint: Path, run_main: Any) -> None:
    found = scanned(run_main, checkpoint)
    assert set(found) == SCAN_KEYS
    assert found["schema"] == "llmfp.fingerprint/1"
    assert set(found["source"]) == {"name", "base", "repo", "url", "revision", "model_type", "stored_as", "files"}
    assert found["source"]["name"] == "small-llama"
    assert found["source"]["stored_as"] == ["F32"]
    assert set(found["source"]["files"][0]) == {"name", "bytes", "sha256", "etag"}
    assert (found["architecture"], found["layers"]) == ("llama", [0, 1, 2])
    assert (found["heads"], found["kv_heads"], found["head_dim"], found["hidden_size"]) == (4, 2, 8, 24)
    for statistic in ("std", "mean"):
        assert list(found[statistic]) == ["q", "k", "v", "o"]
        assert all(len(column) == 3 for column in found[statistic].values())
    tower = {"layers", "heads", "kv_heads", "head_dim", "hidden_size", "std", "mean", "roles"}
    tower |= {"rotary", "indexed_heads", "deep"}
    assert {name: set(each) for name, each in found["towers"].items()} == {"decoder": tower}
    assert all(set(each) == {"pattern", "count", "bytes", "reason"} for each in found["skipped"])
    assert found["caveats"] == []
    assert set(found["run"]) == RUN_KEYS
    assert {"llmfp", "python"} <= set(found["run"]["versions"])
    assert re.fullmatch(r"[0-9a-f]{64}", found["digest"])


def test_the_source_tells_nothing_about_the_machine(checkpoint: Path, run_main: Any) -> None:
    assert str(checkpoint.parent) not in json.dumps(scanned(run_main, checkpoint))


def test_values_that_are_not_finite_are_null_with_a_caveat(tmp_path: Path, run_main: Any) -> None:
    model = build("llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    broken = np.array(model.tensors[name])
    broken[3, 5], broken[0, 0] = np.nan, np.inf
    found = scanned(run_main, write_model(tmp_path, {**model.tensors, name: broken}, model.config))
    assert found["std"]["k"][1] is found["mean"]["k"][1] is None
    assert [column[0] is None for column in found["std"].values()] == [False] * 4
    assert any(name in caveat and "2 non-finite values" in caveat for caveat in found["caveats"])
    code, stdout, _ = run_main("scan", tmp_path, "--backend", BACKEND)
    assert code == 0
    assert f"caveat: {found['caveats'][0]}" in stdout


def test_a_missing_config_is_a_caveat(tmp_path: Path, run_main: Any) -> None:
    found = scanned(run_main, build("llama").write(tmp_path, config=False))
    assert found["heads"] is found["kv_heads"] is found["head_dim"] is None
    assert any("config.json is missing" in caveat for caveat in found["caveats"])


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_the_table_shows_the_same_numbers_in_80_columns(family: str, tmp_path: Path, run_main: Any) -> None:
    source = build(family, layers=12).write(tmp_path / "model")
    found = scanned(run_main, source)
    _, stdout, _ = run_main("scan", source, "--backend", BACKEND)
    lines = stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if re.match(r" +\d+ ", line)]
    shown = [[float(cell) for cell in row if re.fullmatch(r"[\d.e+-]+", cell)] for row in rows]
    expected = [
        [layer, *(round(tower["std"][role][i], 6) for role in "qkvo")]
        for tower in found["towers"].values()
        for i, layer in enumerate(tower["layers"])
    ]
    assert sorted(shown) == sorted(expected)
    assert f"digest {found['digest']}" in lines


def test_the_table_holds_numbers_of_any_size_and_none(tmp_path: Path, run_main: Any) -> None:
    model = build("llama", layers=4)
    for layer, factor in enumerate((1e-12, 1e-4, 1e9, 0.0)):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        model.tensors[name] = np.asarray(model.tensors[name] * np.float32(factor))
    del model.tensors["model.layers.0.self_attn.k_proj.weight"]
    _, stdout, _ = run_main("scan", model.write(tmp_path), "--backend", BACKEND)
    table = [line for line in stdout.splitlines() if re.match(r" +\d+ ", line)]
    assert max(map(len, table)) <= 80
    columns = [re.findall(r"(?<= )(?:\d[\d.e+-]+|-)(?= |$)", line[5:]) for line in table]
    assert columns[0][1] == "-"
    for row, scale in zip(columns, (1e-12, 1e-4, 1e9), strict=False):
        assert float(row[2]) == pytest.approx(2 * scale, rel=0.5)
    assert columns[3][2] == "0.000000"


def test_names_from_files_cannot_drive_the_terminal(tmp_path: Path, run_main: Any) -> None:
    model = build("llama")
    model.tensors["\x1b[31mevil\r\n\x07.weight"] = np.ones(2, np.float32)
    source = model.write(tmp_path / "\x1b[2Jname")
    for command in ("scan", "plan"):
        code, stdout, _ = run_main(command, source, "--backend", BACKEND)
        assert code == 0
        assert stdout.replace("\n", "").isprintable()
    assert r"\x1b[{n}mevil\r\n\x07.weight" in stdout


# --- plan ------------------------------------------------------------------------------------------------------------


def sparse(folder: Path, side: int, layers: int) -> Path:
    """A Llama whose weights are one hole: nothing on the disk, and too much to read."""
    names = [f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in range(layers) for role in "qkvo"]
    nbytes = 4 * side * side
    header = {name: entry("F32", [side, side], i * nbytes, (i + 1) * nbytes) for i, name in enumerate(names)}
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(framed(header))
    try:
        os.truncate(path, path.stat().st_size + len(names) * nbytes)
    except OSError as error:
        pytest.skip(f"no sparse file of {len(names) * nbytes} bytes here: {error}")
    return folder


@pytest.mark.parametrize("reader", ["pread", "auto"])
def test_plan_reads_no_weight(reader: str, tmp_path: Path, run_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tebibyte is planned at once, and nothing behind the header is read or mapped."""
    source = sparse(tmp_path, 1 << 16, 16)

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"planning read a weight: {arguments}")

    for name in ("pread", "preadv", "read", "readv"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("mmap.mmap", refuse)
    code, stdout, stderr = run_main("plan", source, "--json", "--reader", reader, "--backend", BACKEND)
    assert code == 0, stderr
    plan = json.loads(stdout)
    assert plan["attention_bytes"] == 2**40
    assert plan["bytes_read"] == plan["bytes_total"]


def test_plan_says_what_a_scan_then_reads(checkpoint: Path, run_main: Any) -> None:
    code, stdout, _ = run_main("plan", checkpoint, "--json", "--backend", BACKEND)
    plan, found = json.loads(stdout), scanned(run_main, checkpoint)
    assert code == 0
    assert plan["schema"] == "llmfp.plan/1"
    assert plan["bytes_read"] == found["run"]["bytes_read"]
    assert plan["skipped"] == found["skipped"]
    parts = ("attention_bytes", "gain_bytes", "bias_bytes", "header_bytes")
    assert plan["bytes_read"] == sum(plan[part] for part in parts)
    assert len(plan["reads"]) == 12


def test_the_plan_lists_every_tensor_and_what_is_skipped(checkpoint: Path, run_main: Any) -> None:
    _, stdout, _ = run_main("plan", checkpoint, "--backend", BACKEND)
    for layer in range(3):
        for role in "qkvo":
            assert f"model.layers.{layer}.self_attn.{role}_proj.weight" in stdout
    assert "lm_head.weight (not attention)" in stdout
    assert max(len(line) for line in stdout.partition("skipped")[0].splitlines()) <= 80


# --- back ends -------------------------------------------------------------------------------------------------------


def test_backends_says_of_each_whether_it_runs_here(run_main: Any) -> None:
    code, stdout, stderr = run_main("backends", "--json")
    found = json.loads(stdout)
    assert (code, stderr, set(found)) == (0, "", {"schema", "backends"})
    assert tuple(each["name"] for each in found["backends"]) == BACKENDS
    for each in found["backends"]:
        assert set(each) == {"name", "usable", "reason", "variant", "dtypes"}
        assert each["usable"] == (each["reason"] is None) == (each["variant"] is not None)
        assert {"BF16", "F16", "F32"} <= set(each["dtypes"])
    table = run_main("backends")[1]
    assert [line.split()[0] for line in table.splitlines()] == list(BACKENDS)


def test_a_back_end_that_cannot_run_says_why(checkpoint: Path, run_main: Any) -> None:
    backends = json.loads(run_main("backends", "--json")[1])["backends"]
    for each in backends:
        if not each["usable"]:
            code, _, stderr = run_main("scan", checkpoint, "--backend", each["name"])
            assert code == 2
            assert stderr.splitlines()[0] == f"error: back end {each['name']} cannot run here: {each['reason']}"


# --- --out and show --------------------------------------------------------------------------------------------------


def test_a_kept_fingerprint_shows_as_it_was_scanned(checkpoint: Path, tmp_path: Path, run_main: Any) -> None:
    out = tmp_path / "x.fp.safetensors"
    found = scanned(run_main, checkpoint, "--out", out)
    assert [each.name for each in tmp_path.iterdir()] == [out.name]
    for command in ("show", "scan"):
        code, stdout, stderr = run_main(command, out, "--json")
        assert (code, stderr) == (0, "")
        assert json.loads(stdout) == found
    code, table, _ = run_main("show", out)
    assert code == 0
    assert f"digest {found['digest']}" in table


def test_where_it_was_kept_is_said(checkpoint: Path, tmp_path: Path, run_main: Any) -> None:
    out = tmp_path / "x.fp.safetensors"
    _, stdout, _ = run_main("scan", checkpoint, "--out", out, "--backend", BACKEND)
    assert stdout.splitlines()[-1] == f"kept in {out} ({out.stat().st_size:,} bytes)"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    error: BaseException, checkpoint: Path, tmp_path: Path, run_main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.fp.safetensors"
    out.write_bytes(b"the one before")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    code, stdout, stderr = run_main("scan", checkpoint, "--out", out, "--backend", BACKEND)
    assert stdout == ""
    if isinstance(error, OSError):
        assert (code, stderr) == (2, f"error: {out}: cannot be written: No space left on device\n")
    else:
        assert (code, stderr.strip()) == (130, "interrupted")
    assert out.read_bytes() == b"the one before"
    assert [each.name for each in tmp_path.iterdir()] == [out.name]


def test_a_wrong_name_is_refused_before_anything_is_read(
    checkpoint: Path, tmp_path: Path, run_main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmfp.api, "scan", lambda *_, **__: pytest.fail("scanned"))
    assert run_main("scan", checkpoint, "--out", tmp_path / "x.safetensors")[0] == 2
    assert run_main("scan", checkpoint, "--out", tmp_path)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_show_refuses_what_is_no_fingerprint(checkpoint: Path, run_main: Any) -> None:
    code, stdout, stderr = run_main("show", checkpoint / "model.safetensors")
    assert (code, stdout) == (2, "")
    assert stderr.splitlines()[0] == f"error: {checkpoint / 'model.safetensors'}: not a fingerprint"


# --- pipes, encodings, imports ---------------------------------------------------------------------------------------


def run_process(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "env": environment(), **more}
    return subprocess.run(
        [*LLMFP, *map(str, arguments)], stderr=subprocess.PIPE, text=True, encoding="utf-8", check=False, **options
    )


@pytest.mark.parametrize("line", ["scan {}", "scan {} --json", "plan {}", "--help"])
def test_a_reader_that_has_seen_enough_is_no_error(line: str, checkpoint: Path) -> None:
    """As under `| head -1`: the pipe is closed before the first line is written."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = run_process(*line.format(checkpoint).split(), stdout=write_end)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_stdout_is_an_error_in_one_line(checkpoint: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        done = run_process("scan", checkpoint, "--json", stdout=full)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


def test_a_closed_stdout_is_no_error(checkpoint: Path) -> None:
    command = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *LLMFP, "scan", str(checkpoint)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_table_prints_in_any_encoding(encoding: str, checkpoint: Path) -> None:
    command = [*LLMFP, "scan", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, env=environment(PYTHONIOENCODING=encoding), check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"layer" in done.stdout


IMPORTED = """
import sys
from llmfp.__main__ import main
code = main(sys.argv[1:]) if sys.argv[1:] else 0
heavy = {"torch", "triton", "numpy", "safetensors", "ssl", "http", "huggingface_hub"}
print(*sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def test_importing_and_scanning_leave_heavy_libraries_alone(checkpoint: Path) -> None:
    """torch takes seconds and hundreds of MB to import, NumPy as long as scanning 2 GB."""
    scans = {"": [], "numpy": ["scan", str(checkpoint), "--backend", "reference"]}
    if select_backend("auto").name == "native_cpu":
        scans[""] = ["scan", str(checkpoint), "--backend", "native_cpu", "--json"]
    for allowed, arguments in [*scans.items(), ("", []), ("", ["plan", str(checkpoint)]), ("", ["--help"])]:
        if arguments[:1] == ["plan"] and select_backend("auto").name != "native_cpu":
            continue
        command = [sys.executable, "-c", IMPORTED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
        assert (done.returncode, done.stderr.strip()) == (0, allowed), arguments


# --- terminals and interrupts ---------------------------------------------------------------------------------------


def on_a_terminal(arguments: Sequence[object], *, interrupt_at: bytes = b"", **variables: str) -> tuple[int, bytes]:
    """Runs the command line with a terminal for everything; SIGINT once it has written `interrupt_at`."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*LLMFP, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, env=environment(**variables)
    )
    os.close(slave)
    output, deadline = b"", time.monotonic() + 60
    try:
        while select.select([master], [], [], max(0, deadline - time.monotonic()))[0]:
            try:
                output += os.read(master, 65536)
            except OSError:  # EIO: the last process on the terminal has gone
                break
            if interrupt_at and interrupt_at in output:
                process.send_signal(signal.SIGINT)
                interrupt_at = b""
        else:
            pytest.fail(f"still running after a minute; so far: {output!r}")
        return process.wait(10), output
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {}])
def test_output_has_no_colour(variables: dict[str, str], checkpoint: Path) -> None:
    code, output = on_a_terminal(["scan", checkpoint], **variables)
    assert code == 0
    assert "σ Q".encode() in output
    assert b"\x1b[" not in output


def test_an_interrupt_ends_a_scan_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C once the plan is printed and the scan begins: no traceback, no file, whole or partial."""
    out = tmp_path / "out"
    out.mkdir()
    source = sparse(tmp_path / "model", 1 << 15, 32)
    scan = ["scan", source, "-v", "--out", out / "x.fp.safetensors", "--backend", BACKEND]
    code, output = on_a_terminal(scan, interrupt_at=b"plan: llama")
    assert code == 130, output
    assert output.splitlines()[-1] == b"interrupted"
    assert b"Traceback" not in output
    assert list(out.iterdir()) == []


def test_an_interrupt_under_the_progress_bar_restores_the_terminal(tmp_path: Path) -> None:
    """The bar hides the cursor; whatever was hidden is shown again, and the last line is ours."""
    source = sparse(tmp_path / "model", 1 << 15, 32)
    code, output = on_a_terminal(["scan", source, "--backend", "reference"], interrupt_at=b"B/s")
    assert code == 130, output
    assert output.splitlines()[-1] == b"interrupted"
    assert output.rfind(b"\x1b[?25h") >= output.rfind(b"\x1b[?25l")
    assert b"Traceback" not in output
