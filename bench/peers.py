"""The same work by other means, as whole programs: `python bench/peers.py PEER DIRECTORY`.

Each prints {tensor name: population std} of every attention projection as JSON. Each is written the way its library's
documentation suggests, and is given what it offers to do less work: names to filter by, threads, views without a copy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Answer = dict[str, float]
WANTED = tuple(f"self_attn.{role}_proj.weight" for role in "qkvo")


def safetensors_get_tensor(directory: Path) -> Answer:
    """safe_open and get_tensor, one tensor at a time, σ in float32: what most scripts do."""
    from safetensors import safe_open

    answer: Answer = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                if name.endswith(WANTED):
                    answer[name] = file.get_tensor(name).float().std(correction=0).item()
    return answer


def safetensors_load_file(directory: Path) -> Answer:
    """load_file, whole shards, σ in the stored dtype, as the published code takes it."""
    import torch
    from safetensors.torch import load_file

    answer: Answer = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        answer |= {name: torch.std(x, correction=0).item() for name, x in tensors.items() if name.endswith(WANTED)}
    return answer


def transformers_from_pretrained(directory: Path) -> Answer:
    """The whole model, σ in the stored dtype: how the published code does it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return {name: torch.std(x, correction=0).item() for name, x in model.named_parameters() if name.endswith(WANTED)}


def runai_model_streamer(directory: Path) -> Answer:
    """run:ai's streamer, asked for the attention tensors only, each reduced in float32 and dropped."""
    from runai_model_streamer import SafetensorsStreamer

    names = [name for name, *_ in _ranges(directory)]
    files = sorted(str(path) for path in directory.glob("*.safetensors"))
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files, tensor_names=names, owned=False)
        return {name: x.float().std(correction=0).item() for name, x in streamer.get_tensors()}


def fastsafetensors(directory: Path) -> Answer:
    """IBM's loader without GPU direct storage, filtered to the attention tensors, reduced in float32."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    answer: Answer = {}
    for path in sorted(directory.glob("*.safetensors")):
        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
        loader.set_tensor_filter(lambda name: name.endswith(WANTED))
        loader.add_filenames({0: [str(path)]})
        buffers = loader.copy_files_to_device()
        answer |= {name: buffers.get_tensor(name).float().std(correction=0).item() for name in loader.get_keys()}
        buffers.close()
        loader.close()
    return answer


def numkong(directory: Path) -> Answer:
    """NumKong's sum and sum of squares straight over the memory map."""
    return _numkong(list(_ranges(directory)))


def numkong_forked(directory: Path) -> Answer:
    """The same in one process per core, since NumKong holds the GIL."""
    import os

    ranges = list(_ranges(directory))
    cores = len(os.sched_getaffinity(0))
    pipes = []
    for n in range(1, cores):
        receive, send = os.pipe()
        if os.fork() == 0:
            with os.fdopen(send, "w") as pipe:
                json.dump(_numkong(ranges[n::cores]), pipe)
            os._exit(0)
        os.close(send)
        pipes.append(receive)
    answer = _numkong(ranges[::cores])
    for receive in pipes:
        with os.fdopen(receive) as pipe:
            answer |= json.load(pipe)
    return answer


def _numkong(ranges: list[tuple[str, Path, int, int]]) -> Answer:
    import mmap

    from numkong import moments

    answer: Answer = {}
    opened: tuple[Path, mmap.mmap] | None = None
    for name, path, offset, nbytes in ranges:
        if opened is None or opened[0] != path:
            with path.open("rb") as file:
                opened = path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        opened[1].madvise(22, start, offset + nbytes - start)  # MADV_POPULATE_READ spares it page faults
        values = memoryview(opened[1])[offset : offset + nbytes].cast("H")
        total, squares = moments(values, dtype="bfloat16")
        mean = total / len(values)
        answer[name] = (squares / len(values) - mean * mean) ** 0.5
    return answer


def _ranges(directory: Path) -> Iterator[tuple[str, Path, int, int]]:
    """(name, file, offset, bytes) of every attention tensor, from the headers."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name.endswith(WANTED):
                start, stop = entry["data_offsets"]
                yield name, path, 8 + length + start, stop - start


PEERS: dict[str, Callable[[Path], Answer]] = {
    peer.__name__: peer
    for peer in (
        safetensors_get_tensor,
        safetensors_load_file,
        transformers_from_pretrained,
        runai_model_streamer,
        fastsafetensors,
        numkong,
        numkong_forked,
    )
}

if __name__ == "__main__":
    print(json.dumps(PEERS[sys.argv[1]](Path(sys.argv[2]))))
