"""What numbers depend on, and nothing that says whose machine it is: no host name, no user, no path."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIBRARIES = ("numpy", "torch", "triton")
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_CACHE_WHERE_UNKNOWN = 64 << 20


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Model name with the microarchitecture's numbers where a hypervisor hides the name proper."""
    fields: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = re.sub(r"\(R\)|\(TM\)|CPU|@.*", "", fields.get("model name", platform.processor() or platform.machine()))
    if re.search(r"\d", name) is None and "model" in fields:
        name += f" family {fields['cpu family']} model {fields['model']}"
    return " ".join(name.split())


def last_level_cache_bytes() -> int:
    """Of one socket's part that core 0 sees; 64 MiB where the system does not say."""
    try:
        digits = re.fullmatch(r"(\d+)K", _CACHE.read_text().strip())
    except OSError:
        digits = None
    return int(digits[1]) << 10 if digits else _CACHE_WHERE_UNKNOWN


def memory_bytes() -> tuple[int, int]:
    """Memory of the machine, and what is available of it."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, available = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return total, int(found[1]) << 10 if found else available
    except (OSError, ValueError):
        return 4 << 30, 1 << 30


def versions(libraries: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Of this package, Python and those of these libraries that are installed."""
    from llmfp import __version__

    found = {"llmfp": __version__, "python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> tuple[list[tuple[str, str, str]], str | None]:
    """Every usable device as (torch's name, model, driver), and why there is none."""
    if importlib.util.find_spec("torch") is None:
        return [], "torch is not installed"
    try:
        import torch

        if torch.cuda.is_available():
            driver = f"hip {torch.version.hip}" if torch.version.hip else f"cuda {torch.version.cuda}"
            count = torch.cuda.device_count()
            return [(f"cuda:{n}", torch.cuda.get_device_name(n), driver) for n in range(count)], None
        if torch.backends.mps.is_available():
            return [("mps", "Apple GPU", "metal")], None
    except Exception as error:
        # a broken install or driver shows as half a dozen exception types
        return [], f"torch cannot be used ({type(error).__name__})"
    return [], "torch finds no GPU"


def describe() -> dict[str, Any]:
    total, _ = memory_bytes()
    return {
        "cpu": processor(),
        "cores": cores(),
        "memory_bytes": total,
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": ".".join(platform.release().split("-")[0].split(".")[:2]),
    }
