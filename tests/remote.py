"""What remote scans are tested on: a sharded model shaped like a mixture of experts, and a client that never waits."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmfp.hub.client import Client, Clock
from llmfp.hub.settings import Settings
from tests.checkpoints import safetensors_bytes, write_index
from tests.hub_server import HubServer

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 256, 8, 2, 32


class TestClock:
    """A clock that moves when somebody waits on it, and by `tick` seconds whenever it is read. waits: how long each."""

    __test__ = False

    def __init__(self, start: float = 1000.0, tick: float = 0.0) -> None:
        self.time, self.tick = start, tick
        self.waits: list[float] = []
        self._lock = threading.Lock()

    def now(self) -> float:
        with self._lock:
            self.time += self.tick
            return self.time

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.waits.append(seconds)
            self.time += seconds

    def clock(self) -> Clock:
        return Clock(self.now, self.sleep, lambda: 1.0)


def client(
    hub: HubServer,
    clock: TestClock | None = None,
    *,
    token: str | None = None,
    cache: Path = Path("/none"),
    stall_seconds: float = 20.0,
) -> Client:
    """stall_seconds passes in earnest: short only where a server is told to stop sending."""
    settings = Settings(endpoint=hub.endpoint, token=token, cache=cache)
    return Client(settings, clock=(clock or TestClock()).clock(), stall_seconds=stall_seconds)


def write_experts(folder: Path, *, layers: int = 4, experts: int = 4, shards: int = 4, seed: int = 0) -> Path:
    """A Qwen3-MoE of float32: tensors in name order, cut into shards of about equal size, as converters write them."""
    rng = np.random.default_rng(seed)
    draw: Callable[..., Any] = lambda *shape: rng.normal(0, 0.02, shape).astype(np.float32)  # noqa: E731
    tensors: dict[str, Any] = {"lm_head.weight": draw(64, HIDDEN), "model.embed_tokens.weight": draw(64, HIDDEN)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        sizes = {
            "q": (HEADS * HEAD_DIM, HIDDEN),
            "k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "v": (KV_HEADS * HEAD_DIM, HIDDEN),
        }
        for role, shape in (sizes | {"o": (HIDDEN, HEADS * HEAD_DIM)}).items():
            tensors[f"{block}.self_attn.{role}_proj.weight"] = draw(*shape)
        for role in "qk":
            tensors[f"{block}.self_attn.{role}_norm.weight"] = draw(HEAD_DIM) + 1
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = draw(HIDDEN) + 1
        tensors[f"{block}.mlp.gate.weight"] = draw(experts, HIDDEN)
        for expert in range(experts):
            for part in ("gate", "up", "down"):
                tensors[f"{block}.mlp.experts.{expert}.{part}_proj.weight"] = draw(HIDDEN, HIDDEN)
    folder.mkdir(parents=True)
    config = {
        "model_type": "qwen3_moe", "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN, "num_hidden_layers": layers, "num_experts": experts,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = sorted(tensors), {}
    for number in range(shards):
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in part}))
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder
