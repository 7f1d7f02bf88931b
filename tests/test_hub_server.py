"""The test Hub is a Hub: the real client lists, describes, downloads and is refused there as it would be elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.checkpoints import build
from tests.hub_server import HubServer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", layers=2).write(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer(page=3) as server:
        for number in range(7):
            server.add(f"org/model-{number}", model, base_models=("org/model-0",) if number else ())
        server.add("other/model", model)
        yield server


def test_lists_an_organisation_over_pages(hub: HubServer) -> None:
    found = list(HfApi(hub.endpoint, token=False).list_models(author="org", expand=["sha", "siblings", "baseModels"]))
    assert [each.id for each in found] == [f"org/model-{n}" for n in range(7)]
    assert found[1].base_models == {"relation": "finetune", "models": [{"_id": "0" * 24, "id": "org/model-0"}]}
    assert hub.count("api") == 3


def test_describes_files_with_their_hashes(hub: HubServer) -> None:
    info = HfApi(hub.endpoint, token=False).model_info("org/model-1", revision="main", files_metadata=True)
    files = {each.rfilename: each for each in info.siblings or ()}
    weights = files["model.safetensors"]
    assert info.sha == hub.repos["org/model-1"].refs["main"]
    assert weights.lfs is not None
    assert weights.lfs["sha256"] == hub.repos["org/model-1"].commits[info.sha]["model.safetensors"].sha256
    assert files["config.json"].lfs is None


def test_downloads_what_was_stored(hub: HubServer, model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        got = hf_hub_download("org/model-2", name, endpoint=hub.endpoint, cache_dir=tmp_path, token="hf_secret")
        assert Path(got).read_bytes() == (model / name).read_bytes()
    assert [each.authorized for each in hub.asked("storage")] == [False] * hub.count("storage")
    assert hub.bytes_sent("storage") == (model / "model.safetensors").stat().st_size


def test_refuses_as_the_hub_does(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add("org/gated", model, gated="manual")
    api = HfApi(hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/nowhere")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/model-1", revision="nowhere")
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/gated", "config.json", endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
    assert api.model_info("org/gated").gated == "manual"


def test_says_what_is_left_of_a_rate_limit(model: Path) -> None:
    with HubServer(limits={"api": 2}, clock=lambda: 1000.0) as hub:
        hub.add("org/model", model)
        api = HfApi(hub.endpoint, token=False)
        for _ in range(2):
            api.model_info("org/model")
        with pytest.raises(HfHubHTTPError, match="Retry after 300 seconds"):
            api.model_info("org/model")
